"""The Python of the README, as written but for the recipe, which the demo's shards would be needed for."""

import contextlib
import io
import re
from pathlib import Path

import pytest
import toy_run

README = Path(__file__).resolve().parents[2] / "README.md"


def test_a_batch_is_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toy_run.build_toy(tmp_path)
    monkeypatch.setenv("MOLMO2_DATA", str(tmp_path))
    recipe = toy_run.write_recipe(tmp_path / "r.yaml", "r", steps=2)
    (code,) = (
        block for block in re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL) if "prepare" in block
    )
    code = code.replace("recipes/demo/stage2.yaml", str(recipe))
    outputs = []
    for _ in range(2):
        with contextlib.redirect_stdout(io.StringIO()) as output:
            exec(compile(code, "README.md", "exec"), {})
        outputs.append(output.getvalue())
    assert re.fullmatch(r"torch.Size\(\[1, \d+\]\) torch.Size\(\[\d+, \d+, \d+, 3\]\) [\d.]+\n", outputs[0])
    assert outputs[0] == outputs[1]
