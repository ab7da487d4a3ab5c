from pathlib import Path

import pytest
from build_cases import make_raw


@pytest.fixture(scope="session")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Raw data of the demo at three hundredths of its size."""
    return make_raw(tmp_path_factory.mktemp("data") / "raw")
