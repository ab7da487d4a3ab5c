"""The command lines of all pages: the program exists and its own parser takes the line, with the names in it.

Names are make targets, recipes and keys of `--set`, datasets of a catalog and benchmarks. Beyond that, test_guide.py
runs the commands of the pages in `STEPS`: those in the last section of docs/guide.md, and `RUN_AFTER_GUIDE` of
page_commands.py. For every other command `NOT_RUN` names the test that runs it, or the reason why none does, so that a
new command fails here until it is run or has a reason. The commands of the other pages are only parsed here: the demo
runs those of README.md, and own-data.md and adding-a-dataset.md have tests of their own.
"""

import argparse
import functools
import importlib.util
import re
import runpy
import shlex
import sys
from pathlib import Path
from typing import Any, NoReturn

import pytest
from page_commands import RUN_AFTER_GUIDE, commands_of, is_command

from molmo2.__main__ import COMMANDS
from molmo2.config import load_recipe
from molmo2.eval.benchmarks import choose
from shards.catalog import load_catalog

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES.remove(ROOT / "docs/log.md")  # it has commands as they were on the day
ORIGINAL = (ROOT / "tests/docs/original_guide.txt").read_text(encoding="utf-8").splitlines()
STEPS = ("guide", "building", "download", "evaluation", "export", "inspect", "long-context", "finetune", "operations")
EXAMPLE = "shop-signs"  # the new dataset of adding-a-dataset.md
MODULES = {"lmms_eval", "vllm.entrypoints.openai.api_server", "http.server", "pytest"}  # programs of others
HUB = "needs the published files"
INSTALL = "installs packages or logs in"
SAME = "a part of it or the same with other names runs in test_guide.py"
NOT_RUN = {
    # guide.md
    "make install": INSTALL,
    "make demo": "takes minutes; each of its programs runs in test_guide.py",
    "molmo2 build": "needs the arguments of the program; test_command.py",
    "molmo2 --help": "test_command.py",
    "python tools/make_tokenizer.py --source Qwen/Qwen3-4B-Instruct-2507 --model 4b": f"{HUB}; test_qwen3_tokenizer.py",
    "python tools/build_shards.py --stage sft --datasets pixmo-cap tulu4 --workers 32": SAME,
    "python tools/build_shards.py --stage sft --task 3/8": "test_task.py",
    "python tools/inspect_shards.py data/shards/sft --html sft.html": SAME,
    "deepspeed molmo2/train.py --recipe recipes/stage1.yaml --set name=try train.steps=20 train.checkpoint_every=10": (
        SAME
    ),
    "deepspeed molmo2/train.py --recipe recipes/stage2.yaml": SAME,
    "deepspeed molmo2/train.py --recipe recipes/stage3.yaml --check-sp": "needs two ranks; test_check_sp.py",
    "deepspeed molmo2/train.py --recipe recipes/stage2.yaml --checkpoint stage1/checkpoints/step-00090000": SAME,
    "python molmo2/train.py --recipe recipes/stage2.yaml --replay 1234": SAME,
    "python tools/build_shards.py --stage eval --catalog demo": SAME,
    "python tools/evaluate.py --checkpoint stage2 --benchmarks demo": SAME,
    "python tools/preview_mixture.py RECIPE --ranks 64": SAME,
    "python tools/chat.py --checkpoint stage3 --web": "a server that does not exit; test_web_page.py",
    # building.md
    "sbatch --array=0-7 recipes/launch/build.slurm sft": "needs Slurm; test_slurm.py",
    "sbatch recipes/launch/build.slurm sft": "needs Slurm; test_slurm.py",
    "python tools/build_on_datatrove.py --engine slurm --tasks 64 --partition cpu --cpus 16"
    " -- --stage sft --workers 16": ("needs Slurm; test_datatrove.py runs it with the engine `local`"),
    "pip install -e '.[datatrove]'": INSTALL,
    # download.md
    "hf auth login": INSTALL,
    # evaluation.md
    "python tools/download_data.py --stage eval --datasets chart-qa next-qa": SAME,
    "python tools/build_shards.py --stage eval --datasets chart-qa next-qa": SAME,
    "python tools/evaluate.py --checkpoint demo-stage3 --benchmarks demo": SAME,
    "python tools/evaluate.py --checkpoint mine --catalog mine.yaml": "test_own_data.py",
    "torchrun --nproc-per-node 8 tools/evaluate.py --checkpoint stage3 --benchmarks video": (
        "several ranks: test_eval_runs.py"
    ),
    "python tools/evaluate.py --checkpoint stage3 --benchmarks molmo2-cap-eval --judge http://localhost:8000/v1": (
        "needs a judge: test_eval_judge.py"
    ),
    "pip install -c requirements.lock -e '.[lmms]'": INSTALL,
    "python -m lmms_eval --model nanomolmo2 --model_args checkpoint=OWNER/NAME --tasks mvbench --batch_size 8"
    " --output_path out": f"{HUB}; test_lmms.py has a task of its own",
    "torchrun --nproc-per-node 8 -m lmms_eval --model nanomolmo2 --model_args checkpoint=stage3,max_frames=128"
    " --tasks videomme --output_path out": f"{HUB}; test_lmms.py has a task of its own",
    "python -m molmo2.eval.lmms.tasks": "test_lmms.py",
    "python -m molmo2.eval.lmms.tasks mvbench egoschema": "test_lmms.py",
    "pip install -e '.[eval]'": INSTALL,
    "make install-dev": INSTALL,
    # export.md
    "python tools/export_model.py --checkpoint data/runs/demo-stage3 --out data/runs/demo-export": SAME,
    "python -m vllm.entrypoints.openai.api_server": "a server of another environment; test_vllm.py",
    "python -m vllm.entrypoints.openai.api_server --model data/exports/stage3-vllm --trust-remote-code": (
        "a server of another environment; test_vllm.py"
    ),
    'hf download allenai/Molmo2-4B --local-dir data/raw/molmo2-4b --include "*.py" "*.json"': HUB,
    "python tools/export_model.py --checkpoint stage3 --out data/exports/stage3"
    " --remote-code-from data/raw/molmo2-4b": (f"{HUB}; test_export_card.py"),
    "make test-engines": "installs vLLM in an environment of its own",
    # inspect.md
    "python tools/inspect_data.py --catalog demo --stage sft": SAME,
    "python tools/inspect_data.py --catalog demo demo-points --num-samples 10": SAME,
    "python molmo2/train.py --recipe R.yaml --inspect": SAME,
    # long-context.md
    "python benchmarks/bench_long.py": "takes minutes: a benchmark",
    "python molmo2/train.py --recipe … --dry-run": SAME,
    "pip install -e '.[fp8]'": INSTALL,
    # finetune.md
    "python molmo2/train.py --recipe recipes/lora.yaml": f"{HUB}; test_lora.py",
    "python tools/chat.py --checkpoint lora --image photo.jpg": "waits for questions; test_chat.py",
    "python tools/export_model.py --checkpoint lora --out lora-export": f"{HUB}; test_adapters.py",
    "python tools/export_model.py --checkpoint lora --adapters-for allenai/Molmo2-4B --out lora-adapters": (
        f"{HUB}; test_adapters.py"
    ),
    "python molmo2/train.py --recipe recipes/lora.yaml --dry-run --gpu-memory 24": "test_finetune.py has its figures",
    "pip install peft": INSTALL,
    "python tools/evaluate.py --checkpoint allenai/Molmo2-4B --benchmarks image": HUB,
    # operations.md
    "python molmo2/train.py --recipe R.yaml": SAME,
    "deepspeed molmo2/train.py --recipe R.yaml": "several ranks: test_train.py",
    "torchrun --nproc_per_node 8 molmo2/train.py --recipe R.yaml": "several ranks: test_train.py",
    "accelerate launch --multi_gpu --num_processes 8 molmo2/train.py --recipe R.yaml": "several ranks: test_launch.py",
    "deepspeed --hostfile recipes/launch/hostfile …": "several machines: test_launch.py",
    "torchrun --nnodes 2 --node_rank I --master_addr A …": "several machines: test_launch.py",
    "sbatch recipes/launch/train.slurm R.yaml": "needs Slurm; test_slurm.py",
    "python -m http.server": "an example of a server that is refused",
    "tools/verify_shards.py DIR": SAME,
    "tools/verify_shards.py DIR --repair": SAME,
}


class ParsedError(BaseException):
    """Raised in place of a program's work, when it has parsed its command line."""


def parse(script: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> argparse.Namespace:
    """The arguments as the program's own parser takes them; the program does nothing more."""
    parse_args = argparse.ArgumentParser.parse_args

    def stop(self: argparse.ArgumentParser, *args: Any) -> NoReturn:
        raise ParsedError(parse_args(self, *args))

    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", stop)
        patch.setattr(sys, "argv", [script, *arguments])
        patch.syspath_prepend((ROOT / script).parent)
        with pytest.raises(ParsedError) as parsed:
            runpy.run_path(str(ROOT / script), run_name="__main__")
    namespace: argparse.Namespace = parsed.value.args[0]
    return namespace


def without_launcher(words: list[str]) -> list[str]:
    """The program and its arguments, after the launcher's own parser has taken its options."""
    start = next((i for i, word in enumerate(words) if word.endswith(".py") or word == "-m"), None)
    if start is None:  # the page leaves the program out
        return []
    name, options, program = words[0], words[1:start], words[start:]
    if name == "deepspeed":
        from deepspeed.launcher.runner import parse_args

        parse_args([*options, *program])
    elif name == "torchrun":
        from torch.distributed.run import get_args_parser

        get_args_parser().parse_args([*options, *program])
    else:
        from accelerate.commands.launch import launch_command_parser

        assert options.pop(0) == "launch"
        launch_command_parser().parse_args([*options, *program])
    return program


@functools.cache
def rows_of(catalog: str) -> set[str]:
    return {row.name for row in load_catalog(catalog).rows}


def check_names(script: str, arguments: argparse.Namespace) -> None:
    """Compare the names in a command with what has them; any other recipe or catalog is a user's own."""
    given = {key: value for key, value in vars(arguments).items() if value}
    if script == "molmo2/train.py" and "set" in given:
        recipe = given["recipe"] if str(given["recipe"]).startswith("recipes/") else "recipes/stage2.yaml"
        load_recipe(ROOT / recipe, given["set"])
    catalog = given.get("catalog") or "molmo2"
    if script == "tools/evaluate.py" and "benchmarks" in given and "catalog" not in given:
        assert choose(given["benchmarks"])
    elif "datasets" in given and isinstance(given["datasets"], list) and catalog != "mine.yaml":
        assert set(given["datasets"]) <= rows_of(catalog) | rows_of("molmo2-eval") | {EXAMPLE}


def check(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    words = shlex.split(command)
    while "=" in words[0]:  # a variable of the environment
        words.pop(0)
    for word in words:
        if word.startswith(("recipes/", "tests/", "benchmarks/")):
            assert (ROOT / word).exists()
    if words[0] in {"deepspeed", "torchrun", "accelerate"}:
        words = ["python", *without_launcher(words)]
    if words[0] == "molmo2":
        words = ["python", COMMANDS[words[1]], *words[2:]] if words[1] != "--help" else ["python"]
    if words[0].endswith(".py"):
        words.insert(0, "python")
    if words[0] == "make":
        makefile = (ROOT / "Makefile").read_text()
        targets = [word for word in words[1:] if "=" not in word]
        assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)
    elif words[0] == "pip":
        extras = re.findall(r"\.\[(\w+)\]", command)
        assert all(re.search(rf"^{extra} =", (ROOT / "setup.cfg").read_text(), re.MULTILINE) for extra in extras)
    elif words[0] == "python" and words[1:2] == ["-m"]:
        assert words[2] in MODULES or importlib.util.find_spec(words[2])
    elif words[0] == "python" and len(words) > 2:  # a program alone is only mentioned
        check_names(words[1], parse(words[1], words[2:], monkeypatch))
    elif words[0] == "python" and len(words) == 2 and words[1].endswith(".py"):
        assert (ROOT / words[1]).exists()


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_programs_take_the_commands(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for command in commands_of(page):
        if is_command(command) and command not in ORIGINAL:
            try:
                check(command, monkeypatch)
            except (SystemExit, Exception) as error:
                raise AssertionError(f"{page.name}: {command}") from error


@pytest.mark.slow
def test_settings_in_the_text_are_those_of_a_recipe() -> None:
    """`--set a.b=c` and `a.b=c` in code font, without a program."""
    pattern = re.compile(r"`(?:--set )?'?([a-z_]+(?:\.[a-z_*]+)+=[^`']+)'?`")
    found = {settings for page in PAGES for settings in pattern.findall(page.read_text(encoding="utf-8"))}
    settings = {item for line in found for item in re.split(r" (?=[a-z_.]+=)", line) if not item.startswith("a.b=")}
    assert len(settings) > 20
    overrides = sorted(setting.replace("*", "llm") for setting in settings)
    for order in (overrides, overrides[::-1]):  # the last value of a key counts
        load_recipe(ROOT / "recipes/stage2.yaml", order)


def test_every_command_is_run_or_has_a_reason() -> None:
    guide = (ROOT / "docs/guide.md").read_text(encoding="utf-8").partition("## 9. ")[2]
    run = set(re.findall(r"^\|[^|]*\| `([^`]+)` \|", guide, re.MULTILINE)) | set(RUN_AFTER_GUIDE)
    listed = [command for name in STEPS for command in commands_of(ROOT / f"docs/{name}.md") if is_command(command)]
    unknown = [command for command in listed if command not in run | set(NOT_RUN) | set(ORIGINAL)]
    assert not unknown
    assert not (set(RUN_AFTER_GUIDE) | set(NOT_RUN)) - set(listed), "these are on no page"
    for name in re.findall(r"test_\w+\.py", " ".join(NOT_RUN.values())):
        assert list((ROOT / "tests").rglob(name)), name
