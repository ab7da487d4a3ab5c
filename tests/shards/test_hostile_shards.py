"""Shards that somebody made to do harm: each is one finding or one masked sample, and nothing hangs or ends a run."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import itertools
import json
import re
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from toy import LAYOUT, make_sample, write_dataset
from webdataset.autodecode import Decoder, DecodingError, imagehandler

from shards.build.repair import repair_dataset
from shards.build.verify import Finding, verify_dataset
from shards.build.writer import npy_bytes, row_facts
from shards.format import BLOCK, FormatError, parse_index, span_hash, tar_members
from shards.stream.dataset import open_dataset
from shards.stream.loader import make_loader
from shards.stream.mixture import MixtureSpec
from shards.stream.plan import Cursor, Draw, Plan, PlanError, PlanSettings
from shards.stream.reader import Damage, read_sample
from shards.tar_headers import whole_headers

Change = Callable[[dict[str, bytes]], Any]
NEGATIVE = {"octal": b"-0000001000\0", "binary": b"\xff" * 10 + b"\xfe\x00", "spaced": b" -1000      "}


def header(name: str, size: bytes) -> bytes:
    """A tar header with these bytes as its size, and a valid checksum."""
    data = bytearray(tarfile.TarInfo(name).tobuf(tarfile.USTAR_FORMAT))
    data[124:136] = size.ljust(12, b"\0")
    data[148:156] = b" " * 8
    data[148:156] = f"{sum(data):06o}\0 ".encode()
    return bytes(data)


def findings(folder: Path) -> list[Finding]:
    return [found for found in verify_dataset(str(folder)) if isinstance(found, Finding)]


def draws(root: Path, name: str) -> list[Draw]:
    rows = open_dataset(str(root), name).sidecars[0]
    return [
        Draw(0, 0, i, 0, *(row[f].item() for f in ("offset", "span", "xxh64")), 0, 0, 0.0) for i, row in enumerate(rows)
    ]


@pytest.mark.parametrize("size", NEGATIVE.values(), ids=NEGATIVE)
@pytest.mark.timeout(10)
def test_a_negative_size_is_no_header(size: bytes) -> None:
    data = header("a.json", size) + bytes(BLOCK)
    with pytest.raises(FormatError, match=r"size in the tar header of 'a\.json'"):
        tar_members(data)
    good = io.BytesIO()
    with tarfile.open(fileobj=good, mode="w") as tar:
        tar.addfile(tarfile.TarInfo("b.json"))
    assert [key for _, _, key in whole_headers(data + good.getvalue())] == ["b"]


@pytest.mark.parametrize("size", NEGATIVE.values(), ids=NEGATIVE)
@pytest.mark.timeout(20)
def test_a_member_of_negative_size_is_one_damage(tmp_path: Path, size: bytes) -> None:
    folder = write_dataset(tmp_path, "toy", 5)
    tar = folder / "000000.tar"
    data = bytearray(tar.read_bytes())
    place = draws(tmp_path, "toy")[1].offset
    data[place : place + BLOCK] = header("toy-00001.json", size)
    tar.write_bytes(data)
    dataset = open_dataset(str(tmp_path), "toy")
    damaged = [isinstance(read_sample(dataset.tars, draw), Damage) for draw in draws(tmp_path, "toy")]
    assert damaged == [False, True, False, False, False]
    assert [found.key for found in findings(folder) if "checksum" in found.problem] == ["toy-00001"]
    (done,) = repair_dataset(folder)
    assert (done.kept, len(done.dropped)) == (4, 1)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("sha256", "../../../../somewhere/file"),
        ("sha256", "0" * 64 + "\n"),
        ("sha256", "A" * 64),
        ("index_sha256", "/etc/passwd"),
        ("samples", -1),
        ("bytes", -(10**9)),
        ("max_tokens", -1),
        ("max_crops", -1),
        ("name", "\N{ARABIC-INDIC DIGIT ONE}" * 6),
    ],
)
def test_an_index_names_no_other_files_and_has_no_negative_counts(tmp_path: Path, field: str, value: object) -> None:
    path = write_dataset(tmp_path, "toy", 3) / "index.json"
    index = json.loads(path.read_text())
    index["shards"][0][field] = value
    with pytest.raises(FormatError, match=field):
        parse_index(json.dumps(index).encode(), str(path))


def test_an_index_has_no_negative_totals(tmp_path: Path) -> None:
    index = json.loads((write_dataset(tmp_path, "toy", 3) / "index.json").read_text())
    for field in index["totals"]:
        with pytest.raises(FormatError, match=field):
            parse_index(json.dumps({**index, "totals": {**index["totals"], field: -1}}).encode(), "index.json")


# --- samples whose hashes are all true -------------------------------------------------------------------------------


def reshaped(folder: Path, number: int, change: Change, **sidecar: Any) -> None:
    """Change the files of a sample of the first shard and fields of its sidecar row, with every hash made true."""
    tar, rows = (folder / "000000.tar").read_bytes(), np.load(folder / "000000.idx.npy")
    spans = [tar[row["offset"] :][: row["span"]] for row in rows]
    files = {name.partition(".")[2]: bytes(data) for name, data in tar_members(spans[number]).items()}
    key = next(iter(tar_members(spans[number]))).partition(".")[0]
    change(files)
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(f"{key}.{name}")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        spans[number] = buffer.getvalue()[: archive.offset]
    for row, span, end in zip(rows, spans, np.cumsum([len(span) for span in spans]), strict=True):
        row["offset"], row["span"], row["xxh64"] = end - len(span), len(span), span_hash(span)
    for field, value in sidecar.items():
        rows[field][number] = value
    data, table = b"".join(spans) + bytes(1024), npy_bytes(rows)
    (folder / "000000.tar").write_bytes(data)
    (folder / "000000.idx.npy").write_bytes(table)
    index = json.loads((folder / "index.json").read_text())
    index["shards"][0] |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} | row_facts(rows, table)
    (folder / "index.json").write_text(json.dumps(index))


def record(**fields: Any) -> Change:
    """Replace fields of the record."""
    return lambda files: files.update(json=json.dumps(json.loads(files["json"]) | fields).encode())


def visual(**fields: Any) -> Change:
    """Replace fields of the first visual."""

    def change(files: dict[str, bytes]) -> None:
        content = json.loads(files["json"])
        content["visuals"][0] |= fields
        files["json"] = json.dumps(content).encode()

    return change


def token(place: int, **fields: Any) -> Change:
    """Replace fields of one token of every variant."""

    def change(files: dict[str, bytes]) -> None:
        for name in [name for name in files if name.startswith("tokens")]:
            tokens = np.load(io.BytesIO(files[name]))
            for field, value in fields.items():
                tokens[field][place] = value
            files[name] = npy_bytes(tokens)

    return change


def header_of(height: int, width: int) -> Change:
    """Give the first image these sizes in its header."""

    def change(files: dict[str, bytes]) -> None:
        data = bytearray(files["000.jpg"])
        place = data.index(b"\xff\xc0") + 5
        data[place : place + 4] = height.to_bytes(2) + width.to_bytes(2)
        files["000.jpg"] = bytes(data)

    return change


def raw(name: str, data: bytes) -> Change:
    return lambda files: files.update({name: data})


def npy_of(header: bytes) -> Change:
    """Replace the tokens of the first variant by an .npy file of this header."""
    return raw("tokens0.npy", b"\x93NUMPY\x01\x00\x76\x00" + header.ljust(118))


HOSTILE: dict[str, Change] = {
    "token beyond the vocabulary": token(-2, id=100_000),
    "negative token": token(-2, id=-1),
    "least token": token(-2, id=-(2**31)),
    "im_patch in the text": token(-2, id=LAYOUT.tokens.im_patch),
    "frame_end in the text": token(-2, id=LAYOUT.tokens.frame_end),
    "placeholder in the text": token(-2, id=LAYOUT.tokens.image),
    "infinite weight": token(-2, weight=np.inf),
    "undefined weight": token(-2, weight=np.nan),
    "negative weight": token(-2, weight=-0.5),
    "other weight": token(-2, weight=7.5),
    "branch below": token(-2, branch=-1),
    "branch beyond": token(-2, branch=30_000),
    "deep JSON": raw("json", b"[" * 200_000),
    "deep objects": raw("json", b'{"a":' * 200_000),
    "a list in place of the record": raw("json", b"[]"),
    "a number in place of the record": raw("json", b"3"),
    "no variants": record(variants=[]),
    "variants of another type": record(variants=[[], []]),
    "visuals of another type": record(visuals={"a": 1}),
    "numbers for visuals": record(visuals=[1]),
    "visuals by number beyond": record(variants=[{"visuals": [99]}] * 2),
    "visuals by text": record(variants=[{"visuals": "ab"}] * 2),
    "huge tiling": visual(tiling=[5000, 5000]),
    "long tiling": visual(tiling=[1, 60_000]),
    "empty and long": visual(tiling=[0, 10**9]),
    "negative tiling": visual(tiling=[-1, -1]),
    "tiling of floats": visual(tiling=[1.0, 1e308]),
    "tiling of booleans": visual(tiling=[True, 10**30]),
    "tiling of texts": visual(tiling=["a", 3]),
    "tiling of one": visual(tiling=[2]),
    "tiling of three": visual(tiling=[1, 1, 1]),
    "no tiling": visual(tiling=None),
    "another kind": visual(kind=["image"]),
    "view beyond": visual(view=10**30),
    "view of another type": visual(view=[0]),
    "JPEG of 65500 x 65500": header_of(65500, 65500),
    "JPEG of no size": header_of(0, 0),
    "JPEG cut": raw("000.jpg", b"\xff\xd8\xff"),
    "tokens of objects": npy_of(b"{'descr': '|O', 'fortran_order': False, 'shape': (1,), }"),
    "tokens of 10^12": npy_of(b"{'descr': '<i8', 'fortran_order': False, 'shape': (1000000000000,), }"),
    "deep npy header": npy_of(b"(" * 118),
    "npy header cut": raw("tokens0.npy", b"\x93NUMPY\x01"),
    "unknown member": raw("weights.pyd", b"\x80\x04."),
    "pickle": raw("extra.pkl", b"cos\nsystem\n."),
}


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """A damaged sample is read three times, with pauses that would be most of these tests' time."""
    monkeypatch.setattr("shards.stream.reader.PAUSE", 0.001)


@pytest.mark.parametrize("kind", HOSTILE)
@pytest.mark.timeout(60)
def test_a_hostile_sample_is_one_finding_and_one_masked_sample(tmp_path: Path, kind: str) -> None:
    folder = write_dataset(tmp_path, "toy", 9)
    reshaped(folder, 4, lambda files: None)
    assert [found for found in findings(folder) if found.offset >= 0] == []
    reshaped(folder, 4, HOSTILE[kind])
    assert [found.key for found in findings(folder) if found.offset >= 0] == ["toy-00004"]
    dataset = open_dataset(str(tmp_path), "toy")
    settings = PlanSettings(sequence_length=4096, max_crops=64, packs_per_step=1, window=18)
    mixture = MixtureSpec.model_validate({"groups": {"g": {"rate": 1, "datasets": {"toy": None}}}})
    loader = make_loader(Plan([dataset], mixture, settings), Cursor(), LAYOUT)
    masked = {item.row for batch in itertools.islice(loader, 4) for item in batch.masked}
    loader.close()
    assert masked == (set() if kind in {"unknown member", "pickle"} else {4})  # the reader does not open them
    (done,) = repair_dataset(folder)
    if kind == "other weight":  # the tar is what the index says, and the sidecar is not: it is made anew
        assert (done.kept, done.dropped) == (9, ())
    else:
        assert (done.kept, [found.key for found in done.dropped]) == (8, ["toy-00004"])
    assert findings(folder) == []


@pytest.mark.parametrize(
    ("field", "value"),
    [("num_tokens", 9999), ("loss_weight", np.inf), ("loss_weight", np.nan), ("loss_weight", -1.0), ("num_crops", 99)],
)
def test_a_sidecar_that_lies_is_found_planned_around_and_made_anew(tmp_path: Path, field: str, value: float) -> None:
    folder = write_dataset(tmp_path, "toy", 9)
    good = np.load(folder / "000000.idx.npy")
    reshaped(folder, 4, lambda files: None, **{field: value})
    assert [found.key for found in findings(folder) if found.offset >= 0] == ["toy-00004"]
    index = json.loads((folder / "index.json").read_text())
    index["shards"][0] |= {"max_tokens": 50, "max_crops": 5, "bytes": 3}  # so that the plan does not refuse it by these
    (folder / "index.json").write_text(json.dumps(index))
    settings = PlanSettings(sequence_length=4096, max_crops=64, packs_per_step=1, window=18)
    mixture = MixtureSpec.model_validate({"groups": {"g": {"rate": 1, "datasets": {"toy": None}}}})
    plan = Plan([open_dataset(str(tmp_path), "toy")], mixture, settings)
    with pytest.raises(PlanError, match=r"toy, shard 0, sample 4: .* run tools/verify_shards\.py"):
        plan.step(Cursor())
    (done,) = repair_dataset(folder)
    assert (done.kept, done.dropped) == (9, ()) and findings(folder) == []
    again = np.load(folder / "000000.idx.npy")
    assert all((again[name] == good[name]).all() for name in ("num_tokens", "num_crops", "loss_weight", "num_pairs"))


def test_wrong_sizes_in_the_index_of_whole_files_are_put_right(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path, "toy", 9)
    index = json.loads((folder / "index.json").read_text())
    tar = (folder / "000000.tar").read_bytes()
    (folder / "index.json").write_text(
        json.dumps(index | {"shards": [index["shards"][0] | {"bytes": 7, "samples": 8}]})
    )
    assert findings(folder)
    (done,) = repair_dataset(folder)
    assert (done.kept, done.dropped) == (9, ()) and findings(folder) == []
    assert (folder / "000000.tar").read_bytes() == tar


LAYOUTS: list[Any] = [
    *(None, [], 3, {}, LAYOUT.to_json() | {"tokens": 3}, LAYOUT.to_json() | {"crop_size": "48"}),
    *(LAYOUT.to_json() | {"crop_size": 10**9, "patch_size": 1}, LAYOUT.to_json() | {"patch_size": 0}),
    *(LAYOUT.to_json() | {"image_pool": -1}, LAYOUT.to_json() | {"overlap_margin": 40}, LAYOUT.to_json() | {"x": 1}),
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=range(len(LAYOUTS)))
def test_an_odd_layout_is_one_finding(tmp_path: Path, layout: Any) -> None:
    folder = write_dataset(tmp_path, "toy", 3, processor={"layout": layout})
    (found,) = findings(folder)
    assert "unusable index.json" in found.problem


@pytest.mark.parametrize("data", [b"[" * 200_000, b'{"a":' * 200_000, b"\xff", b"null"], ids=range(4))
def test_an_odd_index_is_one_finding(tmp_path: Path, data: bytes) -> None:
    folder = write_dataset(tmp_path, "toy", 3)
    (folder / "index.json").write_bytes(data)
    (found,) = findings(folder)
    assert "unusable index.json" in found.problem


def test_no_finding_or_damage_moves_the_terminal() -> None:
    escape = "\x1b[2J\x07\r\n\u202e"
    damage = Damage(dataset="a", shard="b", row=1, key=escape, offset=0, reason=escape)
    for text in (str(Finding(dataset="a", problem=escape, key=escape)), str(damage)):
        assert text.isprintable() and r"\x1b[2J" in text


@pytest.mark.parametrize("page", ["README.md", "docs/shard-format.md"])
def test_the_pages_read_shards_with_webdataset_without_pickles(tmp_path: Path, page: str) -> None:
    """The members that the pages name are decoded, and a pickle beside them stays bytes."""
    text = (Path(__file__).parents[2] / page).read_text()
    (only,) = re.findall(r"\.decode\(\"rgb8\", only=(\[.*?\])\)", text)
    mark = tmp_path / "ran"
    code = b"cos\nmkdir\n(V" + str(mark).encode() + b"\ntR."
    images = {f"{number:03d}.jpg": data for number, data in enumerate(make_sample("toy", 1).images)}
    sample = {"json": b"{}", **images, "a.pkl": code, "pth": code, "a.pickle.gz": gzip.compress(code)}
    decoded = Decoder([imagehandler("rgb8")], only=json.loads(only))(sample)  # as `.decode` makes it
    assert not mark.exists() and decoded["a.pkl"] == code
    assert decoded["000.jpg"].shape == (48, 48, 3) and decoded["json"] == {}
    with contextlib.suppress(DecodingError):
        Decoder([imagehandler("rgb8")])(sample)
    assert mark.exists()  # what the pages warn of
