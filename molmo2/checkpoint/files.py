"""Checkpoints: `runs/<name>/checkpoints/step-00001000/`, written atomically.

    deepspeed/            model and optimizer states as DeepSpeed writes them, one file a rank
    plan.json             the place in the data: a few integers and digests
    recipe.json           the resolved recipe
    model.json            the model's configuration
    weights.safetensors   float32 weights, only in the last checkpoint of a run (others are consolidated when read)
    meta.json             step, ranks, versions, and the size and hash of every other file; written last

A checkpoint is written under a temporary name and then renamed. Sizes and hashes reveal a truncated or changed
checkpoint, which is skipped with a message. Resuming on another number of ranks is in `molmo2.checkpoint.reshard`.
"""

from __future__ import annotations

import functools
import json
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import deepspeed
import torch
import torch.distributed as dist
import xxhash
from safetensors.torch import save_file

from molmo2.config import Recipe
from molmo2.model.presets import ModelConfig
from shards.atomic import sync

if TYPE_CHECKING:
    from molmo2.checkpoint.consolidate import Readers

STEP_NAME = re.compile(r"step-[0-9]{8,12}")
FORMAT = 1  # version of the layout above; another one is refused
META, PLAN, RECIPE, MODEL, WEIGHTS, STATES = (
    "meta.json",
    "plan.json",
    "recipe.json",
    "model.json",
    "weights.safetensors",
    "deepspeed",
)
# DeepSpeed's converter to the universal format refuses a checkpoint without this entry.
CLIENT_STATE = {"universal_checkpoint_info": {"universal_checkpoint_version": 0.2}}
OPTIMIZED = "optimized_parameters"  # entry of a checkpoint of ZeRO 0: the parameters' names in the optimizer's order


class CheckpointError(ValueError):
    """A checkpoint is missing or damaged, does not fit this run, or cannot be written."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A whole checkpoint: its directory and its `meta.json`."""

    path: Path
    meta: dict[str, Any]

    @property
    def step(self) -> int:
        """The number of optimizer steps done."""
        return int(self.meta["step"])

    @property
    def model_config(self) -> ModelConfig:
        """The configuration of its model."""
        return ModelConfig.from_json(self.read(MODEL))

    def read(self, name: str) -> Any:
        """Parse one of its JSON files."""
        return json.loads((self.path / name).read_text())


def checkpoints_dir(run_dir: Path) -> Path:
    """The folder with the checkpoints of a run."""
    return run_dir / "checkpoints"


# --- writing ---------------------------------------------------------------------------------------------------------


def save(
    engine: Any,
    recipe: Recipe,
    model_config: ModelConfig,
    step: int,
    plan_state: dict[str, Any],
    *,
    sp: int,
    history: Mapping[str, Any] = MappingProxyType({}),
    in_use: Collection[Path] = (),
) -> Path:
    """Write a checkpoint and delete the superseded ones; every rank must call it.

    `history`, which a resumed run needs to know of the steps before, is kept in `meta.json`. Checkpoints that are
    `in_use` stay for now.

    Raises:
        CheckpointError: on every rank, if any could not write, for example because its disk is full; earlier
            checkpoints stay.
    """
    directory = checkpoints_dir(recipe.run_dir)
    final = directory / f"step-{step:08d}"
    temporary = directory / f".tmp-{final.name}"
    first = dist.get_rank() == 0
    _agree(final, temporary, _attempt(lambda: _make_empty(temporary)) if first else None)
    _agree(final, temporary, _write_states(engine, temporary))
    meta = _meta(recipe, step, sp) | dict(history)
    finish = functools.partial(_finish, temporary, final, recipe, model_config, plan_state, meta)
    _agree(final, temporary, _attempt(finish) if first else None)
    if first:
        _rotate(directory, recipe.train.keep_last, recipe.train.keep_every, in_use)
    return final


def _attempt(action: Callable[[], None]) -> str | None:
    try:
        action()
    except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return None


def _agree(final: Path, temporary: Path, failure: str | None) -> None:
    """Raise a CheckpointError on every rank if there is a failure on any; collective."""
    failures: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(failures, failure)
    reasons = [f"rank {rank}: {text}" for rank, text in enumerate(failures) if text]
    if reasons:
        shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(
            f"{final}: cannot be written ({'; '.join(reasons)}); free some space or lower train.keep_last, and start "
            "again: the run continues from its last whole checkpoint"
        )


def _make_empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


class _Writer:
    """DeepSpeed's writer of checkpoint files, except that a failed write is noted and not raised.

    DeepSpeed has barriers after its writes. A rank that left by an exception would leave the others waiting there.
    """

    def __init__(self, writer: Any) -> None:
        self.writer = writer
        self.failure: str | None = None  # the first one

    def __getattr__(self, name: str) -> Any:
        return getattr(self.writer, name)

    def save(self, state_dict: Any, path: str) -> None:
        """Write a file; nothing after the first failure."""
        self.failure = self.failure or _attempt(lambda: self.writer.save(state_dict, path))

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Make a folder; nothing after the first failure."""
        self.failure = self.failure or _attempt(lambda: self.writer.makedirs(path, exist_ok=exist_ok))


def _write_states(engine: Any, temporary: Path) -> str | None:
    """Have DeepSpeed write this rank's files, and return why it could not; collective."""
    writer = engine.checkpoint_engine
    engine.checkpoint_engine = noting = _Writer(writer)
    engine._copy_recovery_script = lambda _: None  # a script for conversion, which `load_weights` makes unnecessary
    try:
        state = CLIENT_STATE | {OPTIMIZED: _optimized(engine)}
        engine.save_checkpoint(str(temporary), tag=STATES, client_state=state, save_latest=False)
    finally:
        engine.checkpoint_engine = writer
    return noting.failure


def _optimized(engine: Any) -> list[str] | None:
    """Names of the optimizer's parameters in its order; None under ZeRO 1-3, where it has flat partitions."""
    if engine.zero_optimization_stage() > 0:
        return None
    names = {parameter: name for name, parameter in engine.module.named_parameters()}
    return [names[parameter] for group in engine.optimizer.param_groups for parameter in group["params"]]


def _finish(
    temporary: Path,
    final: Path,
    recipe: Recipe,
    model_config: ModelConfig,
    plan_state: dict[str, Any],
    meta: dict[str, Any],
) -> None:
    documents = {PLAN: plan_state, RECIPE: recipe.model_dump(mode="json"), MODEL: model_config.to_json()}
    for name, value in documents.items():
        _write_json(temporary / name, value)
    if meta["finished"]:
        save_file({name: read() for name, read in consolidate(temporary).items()}, str(temporary / WEIGHTS))
    files = sorted(path for path in temporary.rglob("*") if path.is_file())
    meta["files"] = {path.relative_to(temporary).as_posix(): [path.stat().st_size, file_hash(path)] for path in files}
    for path in files:
        sync(path)
    _write_json(temporary / META, meta)
    sync(temporary)
    if final.exists():
        shutil.rmtree(final)
    os.replace(temporary, final)
    sync(final.parent)


def _meta(recipe: Recipe, step: int, sp: int) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "run": recipe.name,
        "stage": recipe.stage,
        "step": step,
        "finished": step >= recipe.train.steps,
        "world": dist.get_world_size(),
        "sp": sp,
        "precision": recipe.train.precision,
        "zero_stage": recipe.train.zero_stage,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "deepspeed": deepspeed.__version__,
        },
        "commit": _commit(),
    }


def _commit() -> str | None:
    """The commit of the running code, marked if the working tree has changes; None outside a git checkout."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--match="]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n")
    sync(path)


def file_hash(path: Path) -> str:
    """The xxh3-64 of a file's bytes, as hexadecimal digits."""
    state = xxhash.xxh3_64()
    with open(path, "rb") as file:
        while block := file.read(1 << 24):
            state.update(block)
    return state.hexdigest()


def superseded(names: Iterable[str], keep_last: int, keep_every: int | None) -> list[str]:
    """Names of checkpoints to delete: all but the newest `keep_last` and those at multiples of `keep_every` steps."""
    older = sorted(names)[:-keep_last]
    return [name for name in older if keep_every is None or step_of(name) % keep_every]


def step_of(name: str) -> int:
    """The number of steps in the name of a checkpoint, as `step-00001000`."""
    return int(name.removeprefix("step-"))


def step_folders(directory: Path) -> list[Path]:
    """The checkpoints in a directory, the oldest first; other names, such as `step-old`, are left alone."""
    return sorted(path for path in directory.glob("step-*") if STEP_NAME.fullmatch(path.name))


def _rotate(directory: Path, keep_last: int, keep_every: int | None, in_use: Collection[Path]) -> None:
    for name in superseded((path.name for path in step_folders(directory)), keep_last, keep_every):
        path = directory / name
        if path in in_use:
            continue
        doomed = path.with_name(f".old-{path.name}")
        os.replace(path, doomed)  # renamed first, so that a half-deleted checkpoint is never read
        shutil.rmtree(doomed, ignore_errors=True)


# --- finding and reading ---------------------------------------------------------------------------------------------


def find_damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, or None; reads every file, and unpickles none."""
    from molmo2.checkpoint.untrusted import BAD_META, find_foreign_code, listed_files

    try:
        meta = json.loads((path / META).read_text())
        files = listed_files(meta)
    except FileNotFoundError:
        return f"no {META}: it was never finished"
    except BAD_META as error:
        return f"{META} cannot be read: {type(error).__name__}: {error}"
    if meta.get("format") != FORMAT:
        return f"checkpoint format {meta.get('format')!r}, this code reads {FORMAT}"
    for name, (size, digest) in files.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes of {size}"
        if file_hash(file) != digest:
            return f"{name} does not match its hash"
    return find_foreign_code(path / STATES)


def find_newest(directory: Path, say: Callable[[str], None]) -> Checkpoint | None:
    """The newest whole checkpoint in a directory, or None; each damaged one is reported with `say`."""
    for path in reversed(step_folders(directory)):
        wrong = find_damage(path)
        if wrong is None:
            return Checkpoint(path, json.loads((path / META).read_text()))
        say(f"{path}: skipped: {wrong}")
    return None


def clear_after(directory: Path, step: int) -> None:
    """Prepare the directory for a run that resumes after `step`.

    Later checkpoints, which are damaged, are renamed to `damaged-*`, since their steps will be written again.
    Unfinished ones are deleted.
    """
    directory.mkdir(parents=True, exist_ok=True)
    for leftover in [path for kind in (".tmp-*", ".old-*", ".universal-*") for path in directory.glob(kind)]:
        shutil.rmtree(leftover, ignore_errors=True)
    for path in step_folders(directory):
        if step_of(path.name) > step:
            aside = path.with_name(f"damaged-{path.name}")
            shutil.rmtree(aside, ignore_errors=True)
            os.replace(path, aside)


def consolidate(directory: Path) -> Readers:
    """Functions that read the float32 weights of DeepSpeed's files, on the CPU, with adapters merged."""
    from molmo2.checkpoint.consolidate import open_states  # loaded when a whole model is read or written

    states, recipe = open_states(directory / STATES), json.loads((directory / RECIPE).read_text())
    if recipe["optim"].get("lora") is None:
        return states
    from molmo2.model.lora import merged

    return merged(states, recipe)


def base_weights(directory: Path) -> Readers:
    """As `consolidate`, but without adapters, which are added to the weights afterwards."""
    from molmo2.checkpoint.consolidate import open_states
    from molmo2.model.lora import without_adapters

    return without_adapters(open_states(directory / STATES))


def load_states(engine: Any, directory: Path) -> None:
    """Load model and optimizer states into an engine; every rank must call it.

    Raises:
        CheckpointError: DeepSpeed finds no states in the directory.
    """
    loaded, _ = engine.load_checkpoint(str(directory), tag=STATES)
    if loaded is None:
        raise CheckpointError(f"{directory}: DeepSpeed found nothing to load in {STATES}/")
    optimizer = getattr(engine.optimizer, "optimizer", engine.optimizer)  # ZeRO wraps ours
    for state in optimizer.state.values():
        # DeepSpeed gives all groups one step tensor when it loads the universal format at stage 3; each increments it.
        state["step"] = state["step"].clone()
