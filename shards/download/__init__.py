"""Fill raw folders as the catalog says: Hub repositories, archives, images behind URLs. One manifest per folder."""
