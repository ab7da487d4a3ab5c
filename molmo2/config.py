"""Recipes: one YAML file that says everything about one training run.

Strict: an unknown key is an error, and all errors are told at once, each with its dotted path and the nearest known
name. Numbers that follow from others (DeepSpeed's config, micro-steps, token totals) are derived where they are used.
Paths are relative to `MOLMO2_DATA` (default `./data`). `data.mixture` may name a YAML file beside the recipe, so that
recipes share one. This file imports no torch, so that tools read recipes fast.
"""

from __future__ import annotations

import difflib
import os
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import pydantic
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt
from yaml import YAMLError

from shards.stream.mixture import MixtureSpec
from shards.stream.plan import PlanSettings

CHUNK_CROPS = 32  # crops that the vision transformer recomputes at once: about 1 GiB of So400m
COMPONENTS = ("vit", "connector", "llm")
Fraction = typing.Annotated[float, Field(ge=0, le=1)]


class RecipeError(ValueError):
    """A recipe that cannot be read or that contradicts itself; the message lists every error."""


class Data(pydantic.BaseModel, extra="forbid", frozen=True):
    """What is read. Of these only the last four may change without changing the batches."""

    roots: tuple[str, ...] = Field(min_length=1)  # folders of datasets; a dataset is taken from the first that has it
    mixture: MixtureSpec
    leave_out: tuple[str, ...] = ()  # datasets of the mixture that are not at hand
    sequence_length: PositiveInt  # tokens of a pack, at most
    max_crops: NonNegativeInt  # ViT inputs of a pack, at most
    window: PositiveInt = 4096  # draws that are packed together
    seed: NonNegativeInt = 0
    block: PositiveInt = 1  # neighbours in a shard that are read one after another, where seeks are dear; 1: none
    workers: NonNegativeInt = 2  # reader processes per rank; 0 reads in the training process
    prefetch: PositiveInt = 4  # micro-batches that each worker holds ready, decoded
    read_ahead_mib: NonNegativeInt = 256  # of samples as stored, that a rank reads from a bucket before they are needed
    cache_mib: NonNegativeInt = 0  # of whole shards of tiny samples that a machine keeps on its disk, from a bucket

    @pydantic.model_validator(mode="after")
    def _check(self) -> Data:
        self.mixture.without(self.leave_out)
        return self

    @property
    def drawn(self) -> MixtureSpec:
        """The mixture of what is at hand."""
        return self.mixture.without(self.leave_out)


class Train(pydantic.BaseModel, extra="forbid", frozen=True):
    """How long, how large, and in what arithmetic."""

    steps: PositiveInt
    packs_per_step: PositiveInt  # the global batch: packs of one optimizer step over all ranks
    micro_batch: PositiveInt = 1  # packs that one rank (or group of sp ranks) computes at once
    sp: PositiveInt = 1  # ranks that share one pack (Ulysses sequence parallelism)
    precision: Literal["fp32", "bf16"] = "bf16"
    zero_stage: Literal[0, 1, 2, 3] = 2
    activation_checkpointing: bool = True
    offload: tuple[Literal["activations", "optimizer"], ...] = ()  # kept in the CPU's memory: slower, and less of a GPU
    z_loss: float = Field(default=1e-4, ge=0)  # times weight * logsumexp^2
    residual_dropout: float = Field(default=0.0, ge=0, lt=1)  # on what every sublayer of the language model adds
    dropout_on: Literal["all", "response"] = "all"  # tokens, or those alone that predict one with a loss
    seed: NonNegativeInt = 6198  # of weights that start from nothing, and of dropout
    checkpoint_every: PositiveInt = 1000
    keep_last: PositiveInt = 2
    mirror: str | None = None  # a bucket, s3://…, to which checkpoints are copied, and from which a run continues
    on_full_disk: Literal["stop", "warn"] = "stop"  # when a checkpoint cannot be written; the last whole one stays
    phase_deadline: PositiveFloat = 1800.0  # seconds without progress after which a rank says where it is, and ends
    log_every: PositiveInt = 1  # steps between two refreshes of the progress bar and of TensorBoard

    @pydantic.model_validator(mode="after")
    def _check(self) -> Train:
        # DeepSpeed has another optimizer for bf16 at stage 1, whose files cannot be consolidated, and none with fp32
        # masters at stage 0.
        if self.precision == "bf16" and self.zero_stage < 2:
            raise ValueError(f"precision bf16 needs zero_stage 2 or 3, not {self.zero_stage}")
        if "optimizer" in self.offload and self.zero_stage == 0:
            raise ValueError("offload of the optimizer needs zero_stage 1, 2 or 3")
        if "activations" in self.offload and not self.activation_checkpointing:
            raise ValueError(
                "offload of activations needs activation_checkpointing: the inputs of layers are what moves"
            )
        return self

    @property
    def chunk_crops(self) -> int | None:
        """Crops that the vision transformer takes at once; None: all.

        Under ZeRO-3 every call of a layer is a collective, and ranks have different numbers of crops: one call each.
        """
        return CHUNK_CROPS if self.activation_checkpointing and self.zero_stage < 3 else None


class Group(pydantic.BaseModel, extra="forbid", frozen=True):
    """One component's learning rate: linear warm-up to `lr`, then a cosine; gradients clipped to norm `clip`."""

    lr: float = Field(ge=0)
    warmup_steps: NonNegativeInt = 200
    clip: PositiveFloat = 1.0


class Lora(pydantic.BaseModel, extra="forbid", frozen=True):
    """Low-rank adapters on the language model, whose own weights stay as they are."""

    rank: PositiveInt = 16
    alpha: PositiveFloat = 32.0  # what an adapter adds is multiplied by alpha / rank


class Optim(pydantic.BaseModel, extra="forbid", frozen=True):
    """AdamW over three groups of parameters."""

    vit: Group
    connector: Group
    llm: Group
    betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    eps: PositiveFloat = 1e-6
    weight_decay: float = Field(default=0.0, ge=0)
    final_lr_fraction: Fraction = 0.1
    lora: Lora | None = None
    freeze_base_embedding: bool = True  # Molmo2 leaves the base token table as it is; a new model must learn it


class Anomalies(pydantic.BaseModel, extra="forbid", frozen=True):
    """What to do about a loss that is no number or that jumps. A step that is skipped changes no weight."""

    nonfinite: Literal["stop", "skip"] = "stop"
    spike_factor: float | None = Field(default=None, gt=1)  # a spike: above this times the median of the last 100
    spike: Literal["record", "skip", "stop"] = "record"
    max_skips: PositiveInt = 5  # in a row


class Evaluation(pydantic.BaseModel, extra="forbid", frozen=True):
    """What a run is judged by while it trains: shards that it does not train on. Nothing here changes the training."""

    roots: tuple[str, ...] = Field(min_length=1)  # as in `data`
    datasets: tuple[str, ...] = Field(min_length=1)
    every: PositiveInt = 1000  # training steps
    steps: PositiveInt = 1  # batches of train.packs_per_step packs, always the same
    samples: NonNegativeInt = 4  # answers that are generated and shown
    max_new_tokens: PositiveInt = 64  # of an answer


class Logging(pydantic.BaseModel, extra="forbid", frozen=True):
    """What is written beside `log.jsonl`, which is always written."""

    tensorboard: bool = True
    wandb: str | None = None  # a project's name


class FirstWeights(pydantic.BaseModel, extra="forbid", frozen=True):
    """Other people's weights to start from: directories, or OWNER/NAME or OWNER/NAME@REVISION on the Hugging Face hub.

    Either both base models, whose connector and added embedding rows are then drawn, or a whole Molmo2.
    """

    llm: str | None = None  # Qwen3 or Olmo-3
    vit: str | None = None  # SigLIP2
    molmo2: str | None = None  # a released, exported or native Molmo2

    @pydantic.model_validator(mode="after")
    def _check(self) -> FirstWeights:
        if (self.llm is None, self.vit is None, self.molmo2 is None) not in ((False, False, True), (True, True, False)):
            raise ValueError("name llm and vit, both of them, or molmo2 alone")
        return self


def _read_init(value: Any) -> Any:
    """Choose by the kind of value, so that an error has one path and not one for each alternative."""
    if isinstance(value, dict):
        return FirstWeights.model_validate(value)
    if value is None or isinstance(value, str | FirstWeights):
        return value
    raise ValueError("write null, the name of a run, or a mapping of llm and vit, or of molmo2")


class Recipe(pydantic.BaseModel, extra="forbid", frozen=True):
    """One run of one stage: `runs/<name>/`."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    stage: Literal["pretraining", "sft", "long"]
    model: str  # a preset of molmo2.model.presets
    tokenizer: str = "raw/tokenizer"
    # Nothing, the run (or the path of a checkpoint) whose weights this one starts from, or other people's weights.
    init: typing.Annotated[str | FirstWeights | None, pydantic.BeforeValidator(_read_init)] = None
    data: Data
    train: Train
    optim: Optim
    anomalies: Anomalies = Anomalies()
    eval: Evaluation | None = None
    logging: Logging = Logging()

    @pydantic.model_validator(mode="after")
    def _check(self) -> Recipe:
        if self.init == self.name:
            raise ValueError(f"init names the run itself ({self.name}); name the run of the stage before, or null")
        if self.optim.lora is not None and self.train.zero_stage == 3:
            raise ValueError(
                "optim.lora with train.zero_stage 3 is not tried by us and refused; frozen weights have no optimizer "
                "states, so train.zero_stage=2 needs little more memory"
            )
        if self.data.sequence_length % self.train.sp:
            raise ValueError(
                f"data.sequence_length {self.data.sequence_length} is not a multiple of train.sp {self.train.sp}: "
                "the ranks of a group share a pack in equal parts"
            )
        if self.train.packs_per_step % self.train.micro_batch:
            raise ValueError(
                f"train.packs_per_step {self.train.packs_per_step} is not a multiple of "
                f"train.micro_batch {self.train.micro_batch}"
            )
        return self

    @property
    def plan_settings(self) -> PlanSettings:
        """What the order of batches depends on."""
        data = self.data
        return PlanSettings(
            sequence_length=data.sequence_length,
            max_crops=data.max_crops,
            packs_per_step=self.train.packs_per_step,
            window=data.window,
            seed=data.seed,
            block=data.block,
        )

    @property
    def roots(self) -> list[str]:
        """The folders of datasets, as paths and URLs."""
        return root_paths(self.data.roots)

    @property
    def run_dir(self) -> Path:
        """Where the log and the checkpoints of this run lie."""
        return data_path(f"runs/{self.name}")


def data_path(name: str | Path = "") -> Path:
    """A path below `MOLMO2_DATA` (default `./data`); an absolute `name` stays as it is."""
    return Path(os.environ.get("MOLMO2_DATA", "data")) / name


def root_paths(roots: Sequence[str]) -> list[str]:
    """Folders of datasets, as paths and URLs."""
    return [root if "://" in root else str(data_path(root)) for root in roots]


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe; `overrides` are `a.b=value`, the value in YAML.

    Raises:
        RecipeError: the file is missing or no YAML, or anything in it is unknown, missing or wrong.
    """
    try:
        loaded = OmegaConf.load(path)
        shared = OmegaConf.select(loaded, "data.mixture")
        if isinstance(shared, str):
            loaded.data.mixture = OmegaConf.load(Path(path).parent / shared)
        malformed = [item for item in overrides if "=" not in item]
        if malformed:
            raise RecipeError(f"{path}: --set {' '.join(malformed)}: write key.path=value")
        values = OmegaConf.to_container(OmegaConf.merge(loaded, OmegaConf.from_dotlist(list(overrides))), resolve=True)
    except FileNotFoundError as error:
        raise RecipeError(f"{path}: no such recipe or mixture: {error.filename}") from None
    except (OSError, YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot be read: {error}") from None
    return parse_recipe(values, str(path))


def parse_recipe(values: Any, where: str) -> Recipe:
    """Validate plain values; `where` stands in the message.

    Raises:
        RecipeError: every error at once, one a line: dotted path, what is wrong, the value, the nearest known name.
    """
    try:
        return Recipe.model_validate(values)
    except pydantic.ValidationError as error:
        found = error.errors(include_url=False)
        lines = "\n".join(f"  {_describe(item)}" for item in found)
        raise RecipeError(f"{where}: {len(found)} error{'s' if len(found) > 1 else ''}\n{lines}") from None


def _describe(error: Any) -> str:
    path = ".".join(str(part) for part in error["loc"]) or "recipe"
    if error["type"] == "extra_forbidden":
        known = _known_names(error["loc"][:-1])
        near = difflib.get_close_matches(str(error["loc"][-1]), known, n=1, cutoff=0.5)
        return f"{path}: unknown key; " + (f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}")
    if error["type"] == "missing":
        return f"{path}: missing"
    message = error["msg"].removeprefix("Value error, ")
    value = "" if isinstance(error["input"], dict | pydantic.BaseModel) else f" (got {error['input']!r})"
    return f"{path}: {message}{value}"


def _models(annotation: Any) -> list[type[pydantic.BaseModel]]:
    """The pydantic models inside a type such as `dict[str, Model] | None`."""
    if isinstance(annotation, type) and issubclass(annotation, pydantic.BaseModel):
        return [annotation]
    return [model for part in typing.get_args(annotation) for model in _models(part)]


def _known_names(location: Sequence[int | str]) -> list[str]:
    """Names of the fields at a location; steps into lists and dicts do not change the type."""
    annotation: Any = Recipe
    for part in location:
        fields = {name: field for model in _models(annotation) for name, field in model.model_fields.items()}
        annotation = fields[str(part)].annotation if part in fields else annotation
    return sorted({name for model in _models(annotation) for name in model.model_fields})
