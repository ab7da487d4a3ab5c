"""The mixture: from group rates and dataset sizes to integer weights, and from virtual time to draws.

Within a group a dataset's share is proportional to the square root of its size. Shares become integers P_d that sum to
2^32; before virtual time t dataset d has had floor((t * P_d + phase_d) / 2^32) draws. So the draws of any window can be
computed without its history, and no dataset is ever one draw or more away from its exact share.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Mapping, Sequence

import pydantic

SCALE = 2**32  # the sum of all integer weights


class MixtureError(ValueError):
    """A mixture cannot be used: a dataset is empty, or its share rounds to 0."""


class Member(pydantic.BaseModel, extra="forbid", frozen=True):
    """Weight of a dataset in its group: sqrt(size) * factor. `size` defaults to its number of samples.

    Datasets with one name in `part_of` are the parts of a whole: its weight sqrt(size) * factor, with the size of all
    parts together, is divided among them by their numbers of samples.
    """

    size: int | None = pydantic.Field(default=None, gt=0)  # in place of its number of samples
    factor: float = pydantic.Field(default=1.0, gt=0)  # multiplies its weight
    part_of: str | None = None  # name of the whole that it is a part of


class MixtureGroup(pydantic.BaseModel, extra="forbid", frozen=True):
    """Datasets with one common rate. The rates of all groups are normalised to sum to 1."""

    rate: float = pydantic.Field(gt=0)  # how often the group is drawn, relative to the other groups
    datasets: dict[str, Member | None] = pydantic.Field(min_length=1)  # by name; null: the defaults


class MixtureSpec(pydantic.BaseModel, extra="forbid", frozen=True):
    """A recipe's mixture: groups by name."""

    groups: dict[str, MixtureGroup] = pydantic.Field(min_length=1)

    @pydantic.model_validator(mode="after")
    def _once(self) -> MixtureSpec:
        names = self.dataset_names
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"datasets in more than one group: {', '.join(twice)}")
        return self

    def without(self, names: Sequence[str]) -> MixtureSpec:
        """A copy of the mixture without some datasets and without groups that become empty; rates are normalised again.

        Raises:
            MixtureError: a name is not in the mixture, or no dataset is left.
        """
        if unknown := sorted(set(names) - set(self.dataset_names)):
            raise MixtureError(f"not in the mixture, so they cannot be left out: {', '.join(unknown)}")
        groups = {
            name: group.model_copy(update={"datasets": {d: m for d, m in group.datasets.items() if d not in names}})
            for name, group in self.groups.items()
        }
        left = {name: group for name, group in groups.items() if group.datasets}
        if not left:
            raise MixtureError("every dataset of the mixture is left out")
        return MixtureSpec(groups=left)

    @property
    def group_of(self) -> dict[str, str]:
        """The group of every dataset."""
        return {name: group for group, spec in self.groups.items() for name in spec.datasets}

    @property
    def dataset_names(self) -> tuple[str, ...]:
        """All datasets, in the order of the recipe."""
        return tuple(name for group in self.groups.values() for name in group.datasets)


def shares(spec: MixtureSpec, sizes: Mapping[str, int]) -> dict[str, float]:
    """The exact share of every dataset; the shares sum to 1.

    Raises:
        MixtureError: a dataset has no samples.
    """
    empty = [name for name in spec.dataset_names if sizes[name] == 0]
    if empty:
        raise MixtureError(f"datasets without samples: {', '.join(empty)}; take them out of the mixture")
    total_rate = math.fsum(group.rate for group in spec.groups.values())
    result = {}
    for group in spec.groups.values():
        members = {name: member or Member() for name, member in group.datasets.items()}
        wholes: Counter[str] = Counter()  # the number of samples by whole; a dataset that is no part is one by itself
        for name, member in members.items():
            wholes[member.part_of or name] += sizes[name]
        roots = {}
        for name, member in members.items():
            whole = wholes[member.part_of or name]
            roots[name] = math.sqrt(member.size or whole) * member.factor * sizes[name] / whole
        total = math.fsum(roots.values())
        result.update({name: group.rate / total_rate * root / total for name, root in roots.items()})
    return result


def integer_weights(spec: MixtureSpec, sizes: Mapping[str, int]) -> dict[str, int]:
    """Integer weights that sum to 2^32, rounded by largest remainder; ties go to the name that sorts first.

    Raises:
        MixtureError: a dataset has no samples, or its share is so small that its weight is 0.
    """
    exact = {name: share * SCALE for name, share in shares(spec, sizes).items()}
    weights = {name: math.floor(value) for name, value in exact.items()}
    left = SCALE - sum(weights.values())
    for name in sorted(exact, key=lambda n: (weights[n] - exact[n], n))[:left]:
        weights[name] += 1
    vanishing = [name for name, weight in weights.items() if weight == 0]
    if vanishing:
        raise MixtureError(f"shares below 2^-32: {', '.join(vanishing)}; raise their rate or take them out")
    return weights


def phase(seed: int, name: str) -> int:
    """A dataset's offset, 0 .. 2^32 - 1, which spreads the first draws of rare datasets over virtual time."""
    return int.from_bytes(hashlib.sha256(f"phase\0{seed}\0{name}".encode()).digest()[:4], "little")


def draws_before(time: int, weight: int, offset: int) -> int:
    """Number of draws before virtual time `time`. Python integers keep it exact at any time."""
    return (time * weight + offset) // SCALE
