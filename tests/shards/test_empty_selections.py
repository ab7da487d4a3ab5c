"""A stage or a name without rows is an error of every command that works on datasets, never a success."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from fork_server import python

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.parametrize("tool", ["build_shards", "download_data", "inspect_data"])
@pytest.mark.parametrize(
    ("names", "match"), [([], "no dataset of the catalog has stage long; it has sft"), (["a"], "")]
)
def test_nothing_to_do_is_an_error(tmp_path: Path, tool: str, names: list[str], match: str) -> None:
    (tmp_path / "mine.yaml").write_text(
        "preset: tiny\ntokenizer: tokenizer\n"
        "stages: {sft: {num_variants: 1, examples_per_shard: 5, limits: {sequence_length: 768, max_crops: 32}}}\n"
        "folders: {mine: {download: {kind: none}}}\n"
        "rows:\n  - {name: a, raw: mine, stages: [sft], files: {train: t.jsonl}, converter: chat,"
        " columns: {messages: messages}, options: {style: user_qa}}\n"
    )
    flag = [] if tool == "inspect_data" or not names else ["--datasets"]
    run = subprocess.run(
        [python(), ROOT / f"tools/{tool}.py", "--catalog", tmp_path / "mine.yaml", "--stage", "long", *flag, *names],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 1
    assert "Traceback" not in run.stderr
    message = "not in stage long: a" if names else "no dataset of the catalog has stage long; it has sft"
    assert message in run.stderr
