"""Shares by the published rule, and draws that never stray from them."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shards.stream.mixture import SCALE, MixtureError, MixtureSpec, draws_before, integer_weights, phase, shares


def spec(**groups: tuple[float, dict[str, object]]) -> MixtureSpec:
    return MixtureSpec.model_validate(
        {"groups": {name: {"rate": rate, "datasets": sets} for name, (rate, sets) in groups.items()}}
    )


def test_shares_follow_the_published_rule() -> None:
    """The demo group of Molmo2's SFT mixture, beside another group: Table 13 prints these percentages."""
    mixture = spec(
        demo=(
            0.15,
            {
                "pixmo_cap": {"size": 100_000},
                "ask": None,
                "cap_qa": {},
                "multi_image": None,
                "molmo2_cap": {"factor": 1.5},
                "human_qa": None,
            },
        ),
        rest=(0.95, {"rest": None}),
    )
    sizes = {"pixmo_cap": 710_000, "ask": 71_000, "cap_qa": 190_000, "multi_image": 45_000, "molmo2_cap": 100_000}
    found = shares(mixture, sizes | {"human_qa": 43_000, "rest": 5})
    percent = [round(100 * found[name], 1) for name in (*sizes, "human_qa")]
    assert percent == [2.3, 1.9, 3.1, 1.5, 3.4, 1.5]
    assert math.isclose(sum(found.values()), 1)


def test_parts_share_the_root_of_their_whole_by_size() -> None:
    sizes = {"label": 89, "spans": 11, "big": 300, "small": 100, "other": 100}
    joint = {name: {"part_of": "a"} for name in ("label", "spans")}
    fixed = {name: {"part_of": "b", "size": 400, "factor": 0.5} for name in ("big", "small")}
    found = shares(spec(g=(1, {**joint, **fixed, "other": None})), sizes)  # roots 10, 20 / 2 and 10
    expected = {"label": 0.89, "spans": 0.11, "big": 0.75, "small": 0.25, "other": 1}
    assert found == pytest.approx({name: value / 3 for name, value in expected.items()})


@given(
    sizes=st.lists(st.integers(1, 10**7), min_size=1, max_size=40),
    rates=st.lists(st.floats(0.001, 100), min_size=3, max_size=3),
)
def test_weights_sum_exactly_and_are_nearest(sizes: list[int], rates: list[float]) -> None:
    names = {f"d{i}": size for i, size in enumerate(sizes)}
    groups = {f"g{g}": (rates[g], {name: None for i, name in enumerate(names) if i % 3 == g}) for g in range(3)}
    mixture = spec(**{name: group for name, group in groups.items() if group[1]})
    weights, exact = integer_weights(mixture, names), shares(mixture, names)
    assert sum(weights.values()) == SCALE
    assert all(abs(weights[name] - exact[name] * SCALE) < 1 + 1e-3 for name in names)


@given(
    weight=st.integers(1, SCALE),
    offset=st.integers(0, SCALE - 1),
    time=st.integers(0, 2**80),
    length=st.integers(0, 10**6),
)
def test_every_stretch_of_time_is_within_one_draw(weight: int, offset: int, time: int, length: int) -> None:
    """Exact in integers, so at any time: also the window that begins after 2^80 draws."""
    first, last = draws_before(time, weight, offset), draws_before(time + length, weight, offset)
    assert abs(first * SCALE - time * weight) < SCALE
    assert abs((last - first) * SCALE - length * weight) < SCALE


def test_nothing_is_drawn_before_time_0() -> None:
    assert draws_before(0, SCALE - 1, SCALE - 1) == 0


def test_phases_differ_by_seed_and_name() -> None:
    found = {phase(seed, name) for seed in range(10) for name in "abc"}
    assert len(found) == 30
    assert all(0 <= value < SCALE for value in found)


def test_order_in_the_recipe_changes_nothing() -> None:
    sizes = {"a": 10, "b": 999, "c": 7, "d": 123}
    one = spec(x=(1, {"a": None, "b": None}), y=(2, {"c": None, "d": None}))
    two = spec(y=(2, {"d": None, "c": None}), x=(1, {"b": None, "a": None}))
    assert integer_weights(one, sizes) == integer_weights(two, sizes)


def test_bad_mixtures_are_refused() -> None:
    with pytest.raises(MixtureError, match="without samples: empty;"):
        integer_weights(spec(g=(1, {"empty": None, "full": None})), {"empty": 0, "full": 3})
    with pytest.raises(MixtureError, match=r"below 2\^-32: tiny"):
        integer_weights(spec(g=(1, {"tiny": None}), h=(1e12, {"big": None})), {"tiny": 1, "big": 1})
    with pytest.raises(ValueError, match="more than one group: twice"):
        spec(g=(1, {"twice": None}), h=(1, {"twice": None}))
    with pytest.raises(ValueError, match="greater than 0"):
        spec(g=(0, {"a": None}))


def test_without_drops_datasets_and_empty_groups() -> None:
    groups = {"a": {"rate": 3, "datasets": {"x": None, "y": {"factor": 2}}}, "b": {"rate": 1, "datasets": {"z": None}}}
    spec = MixtureSpec.model_validate({"groups": groups})
    assert spec.without([]) == spec
    assert spec.without(["z", "x"]).dataset_names == ("y",)
    assert shares(spec.without(["x"]), {"y": 5, "z": 7}) == {"y": 0.75, "z": 0.25}
    for names, message in ((["w"], "not in the mixture.*: w"), (["x", "y", "z"], "every dataset")):
        with pytest.raises(MixtureError, match=message):
            spec.without(names)
