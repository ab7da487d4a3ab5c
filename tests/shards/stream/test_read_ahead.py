"""Reading ahead: every draw is announced once, to the worker that will take it, within the budget."""

import itertools
from collections import Counter
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shards.stream.plan import Cursor, Draw, PackSpec
from shards.stream.read_ahead import DEPTH, MicroSpec, ReadAhead, look_ahead


def draw(row: int, span: int) -> Draw:
    return Draw(0, 0, row, 0, 0, span, 0, 1, 0, 1.0)


def specs(spans: list[list[int]]) -> list[MicroSpec]:
    rows = itertools.count()
    packs = [PackSpec(0, slot, tuple(draw(next(rows), span) for span in each)) for slot, each in enumerate(spans)]
    return [MicroSpec((pack,), 1.0, Cursor()) for pack in packs]


@given(
    spans=st.lists(st.lists(st.integers(1, 60), min_size=1, max_size=4), min_size=1, max_size=60),
    lanes=st.integers(1, 4),
    budget=st.integers(0, 400),
)
def test_what_is_begun_fits_the_budget_and_comes_to_its_worker(spans: list[list[int]], lanes: int, budget: int) -> None:
    wanted = specs(spans)
    found = list(look_ahead(wanted, lanes, budget))
    assert [spec._replace(ahead=()) for spec in found] == wanted
    for lane in range(lanes):
        begun: dict[Draw, int] = {}
        for spec in found[lane::lanes]:
            for each in spec.draws:
                begun.pop(each, None)
            assert not begun.keys() & set(spec.ahead)
            begun |= {each: each.span for each in spec.ahead}
            assert sum(begun.values()) <= budget / lanes
        assert not begun, "announced to a worker that never takes it"


def test_with_room_everything_is_begun_before_it_is_needed() -> None:
    found = list(look_ahead(specs([[10, 10]] * 40), 2, 10**6))
    assert Counter(each for spec in found for each in spec.ahead) == Counter(
        each for spec in found[2:] for each in spec.draws
    )
    assert len(found[0].ahead) == 2 * DEPTH


def test_without_an_end_only_as_much_is_planned_as_is_looked_at() -> None:
    planned = 0

    def endless() -> Iterator[MicroSpec]:
        nonlocal planned
        for spec in itertools.cycle(specs([[5]])):
            planned += 1
            yield spec

    list(itertools.islice(look_ahead(endless(), 3, 10**6), 10))
    assert planned <= 10 + 3 * DEPTH + 1
    planned = 0
    list(itertools.islice(look_ahead(endless(), 3, 0), 10))
    assert planned == 10


def test_a_draw_is_read_once_and_its_error_comes_when_it_is_taken() -> None:
    reads: list[int] = []

    def read(each: Draw) -> int:
        reads.append(each.row)
        if each.row == 2:
            raise OSError("no such place")
        return each.row

    ahead = ReadAhead(read)
    ahead.begin([draw(0, 1), draw(1, 1), draw(0, 1), draw(2, 1)])
    assert [ahead.take(draw(row, 1)) for row in (1, 0, 5)] == [1, 0, 5]
    with pytest.raises(OSError, match="no such place"):
        ahead.take(draw(2, 1))
    assert sorted(reads) == [0, 1, 2, 5] and not ahead.under_way
