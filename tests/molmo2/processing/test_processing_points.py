import pytest
from hypothesis import given
from hypothesis import strategies as st

from molmo2.processing.points import NO_TRACKS, format_points, format_tracks, parse_points
from shards.schema import PointGroup, RejectedError, TrackGroup

fractions = st.floats(0, 1, allow_nan=False)
pairs = st.tuples(fractions, fractions)


def test_points_of_one_image() -> None:
    groups = [PointGroup(at=1, points=((0.73, 0.4), (0.5004, 0.25), (0.5, 1.2)))]
    text = format_points(groups, "dog", seconds=False, separator=";")
    assert text == '<points coords="1 1 500 250 2 500 1000 3 730 400">dog</points>'


@pytest.mark.parametrize(("separator", "between"), [(";", ";"), ("\t", "\t")])
def test_points_of_frames_are_numbered_through(separator: str, between: str) -> None:
    groups = [
        PointGroup(at=2.0, points=((0.0, 1.0),)),
        PointGroup(at=1.0, points=()),
        PointGroup(at=0.5, points=((0.02, 0.25),)),
    ]
    text = format_points(groups, "a b", seconds=True, separator=separator)
    assert text == f'<points coords="0.5 1 020 250{between}2.0 2 000 1000">a b</points>'


def test_tracks_number_objects_where_they_appear() -> None:
    groups = [
        TrackGroup(time=0.0, objects=((7, 0.9, 0.1),)),
        TrackGroup(time=0.5, objects=()),
        TrackGroup(time=1.0, objects=((9, 0.5, 0.5), (3, 0.1, 0.2), (7, 0.8, 0.1))),
    ]
    text = format_tracks(groups, "x", separator=";")
    assert text == '<tracks coords="0.0 1 900 100;1.0 1 800 100 2 100 200 3 500 500">x</tracks>'
    assert format_tracks([TrackGroup(time=0.0, objects=())], "x", separator=";") == NO_TRACKS


@given(
    st.lists(st.tuples(st.integers(0, 600), st.lists(pairs, min_size=1, max_size=5)), unique_by=lambda g: g[0]),
    st.sampled_from("\t;"),
)
def test_points_round_trip(raw, separator) -> None:
    groups = [PointGroup(at=at / 2, points=tuple(points)) for at, points in raw]
    found = parse_points("Here: " + format_points(groups, "label", seconds=True, separator=separator) + ".")
    want = sorted((g.at, round(1000 * x) / 1000, round(1000 * y) / 1000) for g in groups for x, y in g.points)
    assert sorted((p.at, p.x, p.y) for p in found) == want
    assert [p.id for p in found] == list(range(1, len(want) + 1))


@given(
    st.lists(st.dictionaries(st.integers(0, 5), pairs, max_size=4), max_size=6),
    st.sampled_from("\t;"),
    st.floats(0, 1),
)
def test_tracks_round_trip_and_truncation(frames, separator, cut) -> None:
    groups = [
        TrackGroup(time=i / 2, objects=tuple((obj, x, y) for obj, (x, y) in frame.items()))
        for i, frame in enumerate(frames)
    ]
    text = format_tracks(groups, "label", separator=separator)
    found = parse_points(text)
    assert len(found) == sum(len(frame) for frame in frames)
    for group in groups:
        here = {(p.x, p.y) for p in found if p.at == group.time}
        assert here == {(round(1000 * x) / 1000, round(1000 * y) / 1000) for _, x, y in group.objects}
    early = parse_points(text[: int(cut * len(text))])  # a generation that ended too soon
    assert [(p.at, p.id) for p in early] == [(p.at, p.id) for p in found[: len(early)]]
    assert all(a == b for a, b in zip(early[:-1], found, strict=False))


def test_truncated_track_keeps_what_is_there() -> None:
    found = parse_points('<tracks coords="0.0 1 100 200;0.5 1 110 21')
    assert [(p.at, p.x, p.y) for p in found] == [(0.0, 0.1, 0.2)]


def test_parse_drops_what_cannot_be() -> None:
    assert parse_points('<points alt="a" coords="1 1 1001 200 2 500 500">x</points>')[0].id == 2
    assert len(parse_points('<tracks coords="0.0 1 100 200 1 300 400">x</tracks>')) == 1
    assert len(parse_points('<points coords="0.0 1 100 200 1 300 400">x</points>')) == 2
    assert parse_points("no points here, 1 2 3") == []


def test_coordinates_must_be_numbers() -> None:
    with pytest.raises(RejectedError, match="a coordinate is nan"):
        format_points([PointGroup(at=1, points=((float("nan"), 0.5),))], "x", seconds=False, separator=";")


LONG = 200_000


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    "text",
    [
        "<points " * LONG,
        '<points coords="1 ' + "1" * LONG,
        '<points coords="' + "9" * LONG + ' 1 500 500">',
        '<points coords="1 ' + "1 " * LONG,
        '<tracks coords="' + "1 1 500 500 " * LONG,
        '<points coords="' * LONG,
    ],
    ids=["tags", "digits", "time", "numbers", "points", "quotes"],
)
def test_long_nonsense_is_read_in_one_pass(text: str) -> None:
    """Reading that took time with the square of the length would need minutes."""
    assert all(point.id == 1 for point in parse_points(text))
