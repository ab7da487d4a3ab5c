"""The plan: every draw once, nothing over a limit, and steps that depend on nothing but their arguments."""

import dataclasses
import itertools
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from toy import write_dataset, write_lengths

import shards.stream.plan
from shards.format import digest
from shards.stream.dataset import Dataset
from shards.stream.mixture import MixtureSpec, shares
from shards.stream.plan import Cursor, Draw, Plan, PlanError, PlanSettings, StepSpec, open_plan

SIZES = {"one": 1, "few": 7, "some": 60, "many": 900}
MIXTURE = MixtureSpec.model_validate(
    {
        "groups": {
            "a": {"rate": 3, "datasets": {"one": {"size": 5}, "many": None}},
            "b": {"rate": 1, "datasets": {"few": {"factor": 0.3}, "some": None}},
        }
    }
)
SETTINGS = PlanSettings(sequence_length=1000, max_crops=20, packs_per_step=8, window=200, seed=5)


def lengths_for(name: str) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.Generator(np.random.Philox(len(name)))
    return rng.integers(20, 900, (SIZES[name], 3)), rng.integers(0, 12, (SIZES[name], 3))


@pytest.fixture(scope="module")
def datasets(tmp_path_factory: pytest.TempPathFactory) -> list[Dataset]:
    root = tmp_path_factory.mktemp("plan")
    return [write_lengths(root, name, *lengths_for(name), num_shards=min(3, SIZES[name])) for name in SIZES]


@pytest.fixture(scope="module")
def plan(datasets: list[Dataset]) -> Plan:
    return Plan(datasets, MIXTURE, SETTINGS)


def walk(plan: Plan, cursor: Cursor | None = None) -> Iterator[StepSpec]:
    cursor = cursor or Cursor()
    while True:
        step = plan.step(cursor)
        yield step
        cursor = step.cursor


def step_digest(step: StepSpec) -> str:
    """Digest of everything in a step but the pairs of its draws, which determine no batch."""
    last = Draw._fields.index("num_pairs")
    packs = [(pack.step, pack.slot, [draw[:last] for draw in pack.draws]) for pack in step.packs]
    return digest([packs, step.divisor])


def until(plan: Plan, window: int) -> list[StepSpec]:
    """Steps up to the one that first touches a window."""
    steps = []
    for step in walk(plan):
        steps.append(step)
        if step.cursor.window >= window:
            return steps
    raise AssertionError


def test_every_draw_exactly_once_in_every_epoch(plan: Plan) -> None:
    """Cutting at a step that ends a window: nobody has had a sample two times more than another."""
    steps = until(plan, 40)
    seen = Counter((d.dataset, d.shard, d.row) for step in steps for pack in step.packs for d in pack.draws)
    planned = plan.draws_until(steps[-1].cursor.window)
    rest = plan._window(steps[-1].cursor.window)[: steps[-1].cursor.offset]
    seen.subtract((d.dataset, d.shard, d.row) for draws in rest for d in draws)
    for number, dataset in enumerate(plan.datasets):
        counts = [seen[number, s, r] for s, rows in enumerate(dataset.sidecars) for r in range(len(rows))]
        assert sum(counts) == planned[dataset.name]
        assert max(counts) - min(counts) <= 1


def test_draws_are_counted_inside_the_window_under_way(plan: Plan) -> None:
    counts: Counter[str] = Counter()
    assert sum(plan.draws_at(Cursor()).values()) == 0
    for step in until(plan, 2):
        counts.update(plan.datasets[draw.dataset].name for pack in step.packs for draw in pack.draws)
        assert plan.draws_at(step.cursor) == {name: counts[name] for name in plan.weights}


def test_shares_hold_to_one_draw_at_every_window(plan: Plan) -> None:
    exact = shares(MIXTURE, SIZES)
    for window in (*range(1, 300), 10**6, 10**12):
        for name, count in plan.draws_until(window).items():
            time = window * SETTINGS.window
            assert abs(count - plan.weights[name] * time / 2**32) < 1 + 1e-15 * count
            assert abs(plan.weights[name] / 2**32 - exact[name]) < 2**-32


def test_packs_hold_their_limits_and_tell_true_lengths(plan: Plan) -> None:
    for step in until(plan, 10):
        assert [pack.slot for pack in step.packs] == list(range(8))
        for pack in step.packs:
            assert 0 < sum(draw.num_tokens for draw in pack.draws) <= 1000
            assert sum(draw.num_crops for draw in pack.draws) <= 20
            for draw in pack.draws:
                row = plan.datasets[draw.dataset].sidecars[draw.shard][draw.row]
                assert (draw.num_tokens, draw.num_crops) == (
                    row["num_tokens"][draw.variant],
                    row["num_crops"][draw.variant],
                )
                assert (draw.offset, draw.span, draw.xxh64) == (row["offset"], row["span"], row["xxh64"])
        assert step.divisor == sum(len(pack.draws) for pack in step.packs)


def test_a_sample_changes_its_text_every_epoch(plan: Plan) -> None:
    """After m epochs every one of the 3 variants was read m / 3 times, and samples did not begin with the same one."""
    variants: dict[tuple[int, int, int], list[int]] = {}
    for window in range(20):
        for draw in itertools.chain.from_iterable(plan._window(window)):
            variants.setdefault(draw[:3], []).append(draw.variant)
    assert max(map(len, variants.values())) > 100
    for drawn in variants.values():
        counts = [drawn.count(variant) for variant in range(3)]
        assert max(counts) - min(counts) <= 1
    assert len({drawn[0] for drawn in variants.values()}) == 3


def test_a_step_depends_on_its_cursor_alone(datasets: list[Dataset], plan: Plan) -> None:
    steps = until(plan, 12)
    rng = np.random.Generator(np.random.Philox(0))
    for i in rng.integers(1, len(steps), 10).tolist():
        fresh = Plan(datasets[::-1], MIXTURE, SETTINGS)
        assert fresh.step(steps[i - 1].cursor) == steps[i]
    assert len({step_digest(step) for step in steps}) == len(steps)


def test_small_windows_and_large_steps(datasets: list[Dataset]) -> None:
    """A window may hold no draw at all, and a step many windows."""
    settings = PlanSettings(sequence_length=1000, max_crops=20, packs_per_step=30, window=1, seed=5)
    plan = Plan(datasets, MIXTURE, settings)
    assert not all(plan._window(window) for window in range(100))
    step = plan.step(Cursor())
    assert len(step.packs) == 30
    assert step.cursor.window > 5


def test_seed_changes_order_and_not_shares(datasets: list[Dataset], plan: Plan) -> None:
    other = Plan(datasets, MIXTURE, PlanSettings(sequence_length=1000, max_crops=20, packs_per_step=8, window=200))
    assert other.step(Cursor()) != plan.step(Cursor())
    assert other.weights == plan.weights


def test_resume_plans_one_window_and_reads_no_file(datasets: list[Dataset], monkeypatch: pytest.MonkeyPatch) -> None:
    plan = Plan(datasets, MIXTURE, SETTINGS)
    packed = []
    monkeypatch.setattr(
        shards.stream.plan, "pack", lambda *a, pack=shards.stream.plan.pack: packed.append(1) or pack(*a)
    )
    monkeypatch.setattr("shards.storage.local.LocalStorage.read", lambda *a: pytest.fail("a resume read a file"))
    plan.step(Cursor(step=10**6, window=10**6, offset=3))
    assert len(packed) == 1


def test_state_is_small_and_restores(plan: Plan) -> None:
    cursor = until(plan, 3)[-1].cursor
    text = json.dumps(plan.state(cursor))
    assert len(text) < 1000
    assert plan.restore(json.loads(text)) == cursor
    assert isinstance(plan.restore(json.loads(text)), Cursor)


def test_a_state_of_before_restores_unless_its_order_is_gone(plan: Plan) -> None:
    """Earlier versions had a setting `block`; 1 is the order of today."""
    cursor = until(plan, 3)[-1].cursor
    state = json.loads(json.dumps(plan.state(cursor)))
    state["identity"]["settings"]["block"] = 1
    assert plan.restore(state) == cursor and plan.change_over(state) == (cursor, [])
    state["identity"]["settings"]["block"] = 64
    with pytest.raises(PlanError, match=r"settings.block: None, wanted 64"):
        plan.restore(state)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 6}, "settings.seed: 6, wanted 5"),
        ({"window": 100}, "settings.window: 100, wanted 200"),
        ({"sequence_length": 2000}, "settings.sequence_length"),
        ({"max_crops": 21}, "settings.max_crops"),
        ({"packs_per_step": 16}, "settings.packs_per_step"),
    ],
)
def test_restore_refuses_other_settings(
    datasets: list[Dataset], plan: Plan, change: dict[str, int], named: str
) -> None:
    values = {"sequence_length": 1000, "max_crops": 20, "packs_per_step": 8, "window": 200, "seed": 5} | change
    with pytest.raises(PlanError) as error:
        Plan(datasets, MIXTURE, PlanSettings(**values)).restore(plan.state(Cursor()))
    lines = str(error.value).splitlines()
    assert named in lines[1]
    assert len(lines) == 3


def test_restore_refuses_other_data_and_mixtures(tmp_path: Path, datasets: list[Dataset], plan: Plan) -> None:
    tokens, crops = lengths_for("some")
    tokens[0, 0] += 1
    changed = write_lengths(tmp_path, "some", tokens, crops)
    replaced = [changed if dataset.name == "some" else dataset for dataset in datasets]
    with pytest.raises(PlanError, match=r"\n  datasets.some: '\w+', wanted '\w+'\nto resume, restore"):
        Plan(replaced, MIXTURE, SETTINGS).restore(plan.state(Cursor()))
    mixture = MixtureSpec.model_validate({"groups": {"a": {"rate": 1, "datasets": dict.fromkeys(SIZES)}}})
    with pytest.raises(PlanError, match=r"weights.few: \d+, wanted \d+"):
        Plan(datasets, mixture, SETTINGS).restore(plan.state(Cursor()))
    mixture = MixtureSpec.model_validate({"groups": {"a": {"rate": 1, "datasets": {"some": None}}}})
    with pytest.raises(PlanError, match=r"datasets.many: None, wanted"):
        Plan([datasets[2]], mixture, SETTINGS).restore(plan.state(Cursor()))


def test_samples_above_the_limits_are_refused(tmp_path: Path) -> None:
    dataset = write_lengths(tmp_path, "d", np.array([[10, 1001], [1000, 20], [5, 1200]]), np.array([[1, 21]] * 3))
    mixture = MixtureSpec.model_validate({"groups": {"g": {"rate": 1, "datasets": {"d": None}}}})
    with pytest.raises(PlanError, match=r"dataset d: 2 of 3 samples have more than 1000 tokens \(at most 1200\)"):
        Plan([dataset], mixture, SETTINGS)
    with pytest.raises(PlanError, match=r"dataset d: 3 of 3 samples have more than 20 crops \(at most 21\)"):
        Plan([dataset], mixture, PlanSettings(sequence_length=2000, max_crops=20, packs_per_step=1))


def test_a_step_without_any_loss_is_an_error(tmp_path: Path) -> None:
    dataset = write_lengths(tmp_path, "d", np.full((9, 1), 10), np.zeros((9, 1), int), weights=0.0)
    mixture = MixtureSpec.model_validate({"groups": {"g": {"rate": 1, "datasets": {"d": None}}}})
    with pytest.raises(PlanError, match="step 0: no sample has a loss weight"):
        Plan([dataset], mixture, SETTINGS).step(Cursor())


def test_open_plan_checks_the_processor(tmp_path: Path) -> None:
    write_dataset(tmp_path, "d", 4)
    mixture = MixtureSpec.model_validate({"groups": {"g": {"rate": 1, "datasets": {"d": None}}}})
    plan = open_plan([str(tmp_path)], mixture, SETTINGS)
    assert len(plan.datasets[0]) == 4
    with pytest.raises(ValueError, match="built by another processor"):
        open_plan([str(tmp_path)], mixture, SETTINGS, {"layout": None})


def test_steps_are_pinned(plan: Plan) -> None:
    """These digests must never change: running trainings would see other batches after a resume."""
    cursors = [Cursor(), plan.step(Cursor()).cursor, Cursor(step=7, window=10**6, offset=2)]
    assert [step_digest(plan.step(cursor)) for cursor in cursors] == [
        "87c47fe044f28d2e",
        "1be9d672f16fc69c",
        "1eed4db2ac9a6a42",
    ]


def test_steps_of_balanced_packs_are_pinned(datasets: list[Dataset]) -> None:
    """Many samples to a pack: here the packs are balanced by cost, which they are not above."""
    plan = Plan(datasets, MIXTURE, dataclasses.replace(SETTINGS, sequence_length=9000, max_crops=180, packs_per_step=4))
    step = plan.step(Cursor(step=3, window=17, offset=1))
    crops = [pack.sizes.crops for pack in step.packs]
    assert max(crops) - min(crops) < 30
    assert step_digest(step) == "04508a7cd297ea46"


def test_a_changed_plan_takes_over_at_the_same_virtual_time(datasets: list[Dataset], plan: Plan) -> None:
    cursor = Cursor()
    while cursor.window < 2 or not cursor.offset:
        cursor = plan.step(cursor).cursor
    assert plan.change_over(plan.state(cursor)) == (cursor, [])
    values = {**dataclasses.asdict(SETTINGS), "window": SETTINGS.window // 2, "seed": SETTINGS.seed + 1}
    other = Plan(datasets, MIXTURE, PlanSettings(**values))
    found, changed = other.change_over(plan.state(cursor))
    assert found == Cursor(cursor.step, 2 * (cursor.window + 1), 0)  # windows are half as long
    assert len(changed) == 2
    assert other.step(found).step == cursor.step
    at_an_end = Cursor(cursor.step, 3, 0)
    assert other.change_over(plan.state(at_an_end))[0] == Cursor(cursor.step, 6, 0)
