"""requirements.lock and the ranges of setup.cfg agree, both ways, for every Python that the lock is for."""

import configparser
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PYTHONS = ["3.11", "3.12"]
OWN = "nanomolmo2 (setup.cfg)"


def ranges() -> list[Requirement]:
    """Every requirement of setup.cfg, those of the extras too, except `hopper`, which only one kind of GPU can use."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    extras = [text for name, text in setup["options.extras_require"].items() if name != "hopper"]
    texts = [setup["options"]["install_requires"], *extras]
    lines = [line for text in texts for line in text.splitlines() if line and not line.startswith("#")]
    return [Requirement(line) for line in lines]


def pins(python: str) -> dict[str, tuple[str, str]]:
    """Name -> (version, who asks for it) of the packages that a Python on Linux gets."""
    environment = {"python_version": python, "python_full_version": f"{python}.0", "sys_platform": "linux"}
    environment |= {
        "platform_machine": "x86_64",
        "platform_system": "Linux",
        "platform_python_implementation": "CPython",
    }
    found = {}
    for line in (ROOT / "requirements.lock").read_text().splitlines():
        text, _, users = line.partition("# via ")
        if not text or text.startswith("#"):
            continue
        pin = Requirement(text.strip())
        if pin.marker is None or pin.marker.evaluate(environment):
            (version,) = (specifier.version for specifier in pin.specifier)
            assert canonicalize_name(pin.name) not in found, f"{pin.name} stands twice for Python {python}"
            found[canonicalize_name(pin.name)] = (version, users)
    return found


@pytest.mark.parametrize("python", PYTHONS)
def test_every_range_has_a_pinned_version_in_it(python: str) -> None:
    locked = pins(python)
    assert len(locked) > 100
    missing = [str(r) for r in ranges() if canonicalize_name(r.name) not in locked]
    outside = [
        f"{r}, locked {locked[canonicalize_name(r.name)][0]}"
        for r in ranges()
        if canonicalize_name(r.name) in locked and locked[canonicalize_name(r.name)][0] not in r.specifier
    ]
    assert not missing + outside, "run `make lock`"


@pytest.mark.parametrize("python", PYTHONS)
def test_what_the_lock_takes_from_setup_cfg_stands_there(python: str) -> None:
    asked = {name for name, (_, users) in pins(python).items() if OWN in users}
    assert asked == {canonicalize_name(requirement.name) for requirement in ranges()}, "run `make lock`"


def test_torch_and_torchvision_are_one_pair() -> None:
    """torchvision 0.N+15 is built for torch 2.N, and neither imports beside another."""
    (torch, _), (vision, _) = (pins("3.11")[name] for name in ("torch", "torchvision"))
    major, minor, patch = torch.split(".")
    assert (major, f"0.{int(minor) + 15}.{patch}") == ("2", vision)
