"""lmms-eval runs our model: tasks of local images and a video, answers equal to our own, scores, choices, two ranks."""

import importlib.util
import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from catalog_cases import image, video
from fork_server import python

from molmo2.chat.conversation import answer, conversation
from molmo2.export.card import About
from molmo2.export.model import export_model
from molmo2.model.generate import GREEDY
from molmo2.model.molmo2 import Molmo2
from molmo2.model.presets import PRESETS
from molmo2.processing.contract import ProcessorSettings
from molmo2.processing.new_tokenizer import train_demo_tokenizer
from molmo2.processing.processor import build_processor
from shards.schema import Turn

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("lmms_eval") is None, reason="lmms-eval is not installed: make install-dev installs it"
)

NEW_TOKENS = 9
DOCS: list[tuple[str, list[str]]] = [  # questions and their media
    ("what is there?", ["a.png"]),
    ("red or blue?", ["a.png", "b.png"]),
    ("and red?", ["b.png"]),
    ("a field?", []),
    ("what is blue?", ["v.mp4"]),
    ("what is red?", ["v.mp4"]),
]
UTILS = """
import PIL.Image

def visuals(doc):
    return [PIL.Image.open(path) if path.endswith("png") else path for path in doc["media"]]

def clip(doc):
    parts = [{"type": "video", "url": doc["clip"], "start_time": 0.5, "end_time": 1.5}]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": doc["question"]}]}]
"""
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.visuals
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{target}}}}"
generation_kwargs: {{max_new_tokens: {tokens}, temperature: 0, until: {until}}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""


class Local:
    """A folder with an exported model and media, and the answers that our own chat gives."""

    def __init__(self, root: Path):
        self.root = root
        train_demo_tokenizer(["what is there? a field, red and blue, user assistant"] * 4, root / "tokenizer", 512)
        model = Molmo2(PRESETS["tiny"]).init_weights(2)
        with torch.no_grad():
            model.lm_head.weight.mul_(30)
        export_model(model.config, dict(model.state_dict()), root / "tokenizer", root / "model", About(origin={}))
        (root / "a.png").write_bytes(image("60x40:red"))
        (root / "b.png").write_bytes(image("40x60:blue"))
        (root / "v.mp4").write_bytes(video("64x48:30:10"))
        (root / "tasks").mkdir()
        (root / "tasks/utils.py").write_text(UTILS)
        self.model = model.eval()
        self.processor = build_processor(
            ProcessorSettings(preset="tiny", tokenizer_dir=str(root / "tokenizer"), stage="eval", num_variants=1)
        )
        self.answers = [self.answer(*doc) for doc in DOCS]

    def answer(self, question: str, media: list[str], start: float | None = None, end: float | None = None) -> str:
        """What our chat says to a question about images, or about a clip of a video; lmms-eval drops outer blanks."""
        paths = [self.root / name for name in media]
        video = next((path for path in paths if path.suffix == ".mp4"), None)
        example = conversation([Turn(role="user", text=question)], [] if video else paths, video)
        if example.video is not None:
            example = replace(example, video=replace(example.video, start=start, end=end))
        return "".join(answer(self.model, self.processor, example, GREEDY, NEW_TOKENS)).strip()

    def add_task(self, name: str, targets: list[str], *, until: str = "", more: str = "") -> None:
        """Describe a task of `DOCS` to lmms-eval, with a stop text, or with further lines of YAML."""
        data = self.root / f"tasks/{name}.jsonl"
        docs = [
            {"question": question, "media": [str(self.root / one) for one in media], "target": wanted}
            | {"clip": str(self.root / "v.mp4")}
            for (question, media), wanted in zip(DOCS, targets, strict=True)
        ]
        data.write_text("".join(json.dumps(doc) + "\n" for doc in docs))
        text = TASK.format(name=name, data=data, tokens=NEW_TOKENS, until=json.dumps([until]))
        (self.root / f"tasks/{name}.yaml").write_text(text + more)

    def run(self, tasks: str, ranks: int = 1) -> tuple[dict[str, Any], dict[str, list[str]]]:
        """Results by task, and the answers of every task in the order of the documents."""
        out = self.root / ("out-" + tasks.replace(",", "-"))
        launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "-m"] if ranks > 1 else ["-m"]
        command = [python(), *launcher, "lmms_eval", "--model", "nanomolmo2", "--device", "cpu"]
        command += ["--model_args", f"checkpoint={self.root / 'model'}", "--include_path", str(self.root / "tasks")]
        command += ["--tasks", tasks, "--batch_size", "4", "--log_samples", "--output_path", str(out)]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(self.root / "hf"), "PYTHON_EXEC": python()}
        run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
        found = list(out.rglob("*_results.json"))
        assert run.returncode == 0 and len(found) == 1, run.stdout[-2000:] + run.stderr[-6000:]
        texts = {}
        for path in sorted(out.rglob("*_samples_*.jsonl")):
            lines = [json.loads(line) for line in path.read_text().splitlines()]
            lines.sort(key=lambda line: line["doc_id"])
            texts[path.stem.split("_samples_")[1]] = [line["filtered_resps"] for line in lines]
        return json.loads(found[0].read_text())["results"], texts


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Local:
    return Local(tmp_path_factory.mktemp("lmms"))


@pytest.mark.slow
def test_answers_and_scores(local: Local) -> None:
    assert len(set(local.answers)) == len(DOCS)
    wanted = [text if number % 3 else "wrong" for number, text in enumerate(local.answers)]  # 2 of 6 are wrong
    stop = local.answers[0][3:5]
    local.add_task("local_qa", wanted)
    local.add_task("local_stop", wanted, until=stop)
    local.add_task("local_clip", wanted, more="doc_to_messages: !function utils.clip\n")
    results, texts = local.run("local_qa,local_stop,local_clip")
    assert texts["local_qa"] == local.answers
    assert texts["local_stop"] == [text.split(stop)[0].strip() for text in local.answers]
    assert texts["local_clip"] == [local.answer(question, ["v.mp4"], 0.5, 1.5) for question, _ in DOCS]
    assert texts["local_clip"][4:] != local.answers[4:]  # the same question of the whole video
    assert results["local_qa"]["exact_match,none"] == pytest.approx(4 / 6)


@pytest.mark.slow
def test_two_ranks_share_the_questions(local: Local) -> None:
    local.add_task("local_ranks", local.answers)
    results, texts = local.run("local_ranks", ranks=2)
    assert texts["local_ranks"] == local.answers
    assert results["local_ranks"]["exact_match,none"] == 1


def describe(folder: Path, name: str, text: str) -> None:
    (folder / f"{name}.yaml").write_text(text)


@pytest.mark.slow
def test_tasks_that_cannot_run_are_listed_and_refused(tmp_path: Path) -> None:
    """By name, in a group, by a template that they include, and by a pattern; their functions are not imported."""
    from molmo2.eval.lmms.tasks import check_command_line, refused_tasks

    task = "task: {}\ndataset_path: none\noutput_type: {}\ndoc_to_text: !function missing.text\n"
    describe(tmp_path, "fine", task.format("fine_one", "generate_until"))
    describe(tmp_path, "choice", task.format("choice_one", "multiple_choice"))
    describe(tmp_path, "_rounds_template", "dataset_path: none\noutput_type: generate_until_multi_round\n")
    describe(tmp_path, "rounds", "include: _rounds_template.yaml\ntask: rounds_one\n")
    describe(tmp_path, "group", "group: mixed_group\ntask:\n  - fine_one\n  - group: inner\n    task: [rounds_one]\n")
    folder = str(tmp_path)
    assert refused_tasks(["fine_one", "choice_one"], folder) == {"choice_one": "multiple_choice"}
    assert refused_tasks(["mixed_group"], folder) == {"rounds_one": "generate_until_multi_round"}
    assert set(refused_tasks(["*_one"], folder)) == {"choice_one", "rounds_one"}
    everything = refused_tasks()
    assert "arc_easy" in everything and "mvbench" not in everything and "choice_one" not in everything
    check_command_line(["--include_path", folder, "--tasks", "fine_one", "--model", "x"])
    with pytest.raises(ValueError, match="leave out of --tasks:\n  choice_one: multiple_choice\n  rounds_one: gen"):
        check_command_line(["--include_path", folder, "--tasks=choice_one,mixed_group"])


@pytest.mark.slow
def test_a_refused_task_ends_the_run_before_the_model_is_loaded(tmp_path: Path) -> None:
    describe(tmp_path, "choice", "task: choice_one\ndataset_path: none\noutput_type: multiple_choice\n")
    command = [python(), "-m", "lmms_eval", "--model", "nanomolmo2", "--model_args", "checkpoint=no-such-run"]
    command += ["--include_path", str(tmp_path), "--tasks", "choice_one", "--device", "cpu"]
    run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert (
        "leave out of --tasks:" in run.stderr + run.stdout and "choice_one: multiple_choice" in run.stderr + run.stdout
    )
    assert "no-such-run:" not in run.stderr + run.stdout
