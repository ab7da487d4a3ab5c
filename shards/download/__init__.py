"""Download of raw folders as the catalog describes: Hub repositories, archives, images behind URLs."""
