"""Raw data and shards that mean harm, shown by `tools/inspect_data.py`: one finding each, and the others are shown."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import PIL.Image
import pytest
import yaml

ESCAPE = "\x1b[2J\x1b]0;x\x07[red]hi[/red]</script><b>\u202e"
GOOD = json.dumps({"image": "1.png", "question": "What?", "answer": "Red."})
TABLES: dict[str, bytes] = {  # name of a dataset -> its rows, which cannot be read
    "deep": f"{GOOD}\n{'[' * 200_000}".encode(),
    "column": json.dumps({ESCAPE: 1}).encode(),
    "surrogate": b'{"\\ud83d": 1}',
    "numbers": b"3\n4",
    "bytes": bytes(range(256)) * 10,
    "parquet": b"PAR1" + b"\xff" * 100 + b"PAR1",
    "arrow": b"ARROW1\0\0" + b"\xff" * 100,
    "npy": b"\x93NUMPY\x01\x00\x76\x00" + b"(" * 118,
    "gzip": b"\x1f\x8b" + b"\xff" * 40,
}
SHOWN: dict[str, bytes] = {  # rows that cannot be used, and honest ones last
    "levels": ('{"image": %s, "question": "a", "answer": "b"}' % ("[" * 900 + "]" * 900)).encode(),
    "objects": ('{"image": "1.png", "answer": "b", "question": %s}' % ('{"a":' * 900 + "1" + "}" * 900)).encode(),
    "escape": json.dumps({"image": ESCAPE, "question": ESCAPE, "answer": ESCAPE}).encode(),
    "text": json.dumps({"image": "1.png", "question": ESCAPE, "answer": ESCAPE}).encode(),
    "good": GOOD.encode(),
}
INDEXES: dict[str, bytes] = {
    "deep": b"[" * 200_000,
    "levels": b'{"a":' * 200_000,
    "column": b"null",
    "numbers": b"\xff",
    "text": b'{"format_version": "\x1b[2J"}',
    "escape": b'{"format_version": 1e999}',
}


@pytest.fixture
def options(tmp_path: Path) -> list[str]:
    """The folders with these datasets, and the options that name them."""
    rows = []
    for name, content in {**TABLES, **SHOWN}.items():
        folder = tmp_path / "raw" / name
        folder.mkdir(parents=True)
        (folder / "rows.jsonl").write_bytes(content)
        PIL.Image.new("RGB", (60, 40), "red").save(folder / "1.png")
        row = {"name": name, "stages": ["sft"], "files": {"train": "rows.jsonl"}, "converter": "image_qa"}
        rows.append(row | {"columns": {field: field for field in ("image", "question", "answer")}})
        rows[-1]["options"] = {"style": "user_qa"}
        (tmp_path / "shards/sft" / name).mkdir(parents=True)
        if name in INDEXES:
            (tmp_path / "shards/sft" / name / "index.json").write_bytes(INDEXES[name])
    (tmp_path / "shards/sft/objects/index.json").mkdir()
    (tmp_path / "shards/sft/bytes").rmdir()
    (tmp_path / "shards/sft/bytes").write_bytes(b"no folder")
    (tmp_path / "raw/good/manifest.json").mkdir()
    (tmp_path / "raw/text/manifest.json").write_bytes(b"[" * 200_000)
    (tmp_path / "own.yaml").write_text(yaml.safe_dump({"base": "molmo2", "rows": rows}))
    return ["--catalog", f"{tmp_path}/own.yaml", "--raw", f"{tmp_path}/raw", "--shards", f"{tmp_path}/shards"]


def inspect(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[str, str]:
    """What `tools/inspect_data.py` prints to both streams; a traceback fails the test."""
    monkeypatch.setattr(sys, "argv", ["tools/inspect_data.py", *arguments])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path("tools/inspect_data.py", run_name="__main__")
    out, err = capsys.readouterr()
    return out, err + (ended.value.code if isinstance(ended.value.code, str) else "")


def test_the_inventory_reads_every_dataset(
    options: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, err = inspect(monkeypatch, capsys, *options, "--stage", "sft")
    states = {line.split()[0]: line for line in out.splitlines() if line.strip()}
    assert not err and all(name in states for name in (*TABLES, *SHOWN))
    damaged = {name for name in (*TABLES, *SHOWN) if "damaged" in states[name]}
    assert damaged == {*INDEXES, "objects", "bytes"}


@pytest.mark.parametrize("page", [False, True])
def test_each_dataset_is_one_finding_and_the_others_are_shown(
    options: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, page: bool
) -> None:
    html = ["--html", f"{tmp_path}/page.html"] if page else []
    out, err = inspect(monkeypatch, capsys, *options, *html, *TABLES, *SHOWN)
    assert f"not shown: {', '.join(TABLES)}" in err
    assert [line.split(": ")[1] for line in err.splitlines() if ": " in line][: len(TABLES)] == list(TABLES)
    shown = (tmp_path / "page.html").read_text() if page else out
    assert "Red." in shown and all(name in shown for name in SHOWN)
    assert all(c.isprintable() or c == "\n" for c in out + err)
    if page:
        assert "[red]hi[/red]&lt;/script&gt;" in shown and "<b>\u202e" not in shown


def test_an_error_of_a_command_moves_no_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "own.yaml").write_text(json.dumps({"rows": [{"like": ESCAPE}]}))
    _, err = inspect(monkeypatch, capsys, "--catalog", f"{tmp_path}/own.yaml")
    assert "own.yaml" in err and all(c.isprintable() or c == "\n" for c in err)
