"""How files of tests are dealt to processes, markers that fixtures imply, and a note of the test that is running."""

import functools
import os
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from xdist.scheduler import LoadScopeScheduling

ROOT = Path(__file__).resolve().parents[1]
# A busy machine makes an example slow, and that is no failure.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")


@functools.cache
def group_of(file: str) -> str:
    """The group of a file's tests: "ranks" for files that start ranks, else the file itself."""
    return "ranks" if "pytest.mark.dist" in (ROOT / file).read_text() else file


class ByGroup(LoadScopeScheduling):
    """A process runs a group from its first test to its last.

    A file stays together so that its fixtures are made once. All files that start ranks are one group: ranks of two
    tests at a time would wait for each other's cores.
    """

    def _split_scope(self, nodeid: str) -> str:
        return group_of(nodeid.split("::")[0])


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> ByGroup:
    """The scheduler of pytest-xdist; its own `--dist loadgroup` does not see the groups under pytest 9.2."""
    return ByGroup(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests by the fixtures they take."""
    for item in items:
        for fixture in {"browser", "server"} & set(getattr(item, "fixturenames", ())):
            item.add_marker(fixture)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Note for tests/guard.py which test this process runs."""
    if folder := os.environ.get("MOLMO2_TEST_RUN"):
        Path(folder, f"running-{os.getpid()}").write_text(item.nodeid)


def pytest_make_parametrize_id(config: pytest.Config, val: object, argname: str) -> str | None:
    """Name parameters of bytes by their argument: gzip writes the time, and both processes must find equal names."""
    return argname if isinstance(val, bytes) else None
