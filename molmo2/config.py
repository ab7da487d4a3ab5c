"""Recipes: one YAML file that specifies a whole training run.

An unknown key is an error, and all errors are reported at once, each with its dotted path and the nearest known name.
Numbers that follow from others (DeepSpeed's config, micro-steps, token totals) are derived where they are used.
Paths are relative to `MOLMO2_DATA` (default `./data`). `data.mixture` may name a YAML file, relative to the recipe, so
that several recipes share one. This file imports no torch, so that tools load recipes fast.
"""

from __future__ import annotations

import difflib
import os
import re
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
from shards.stream.reader import DAMAGE_BUDGET

CHUNK_CROPS = 32  # crops that the vision transformer recomputes at once; they take about 1 GiB with So400m
Recompute = Literal["none", "light", "full"]
Component = Literal["vit", "connector", "llm"]
COMPONENTS: tuple[Component, ...] = typing.get_args(Component)
Fraction = typing.Annotated[float, Field(ge=0, le=1)]
GONE = {  # keys of earlier versions
    "data.block": "is gone, since it saved no seeks; delete the key",
    "train.activation_checkpointing": "was replaced: write recompute: full for true, none for false",
}


class RecipeError(ValueError):
    """A recipe cannot be read or contradicts itself; the message lists every error."""


class Data(pydantic.BaseModel, extra="forbid", frozen=True):
    """The data of a run. Only the last five settings may change without changing the batches."""

    roots: tuple[str, ...] = Field(min_length=1)  # folders of datasets; a dataset is taken from the first that has it
    mixture: MixtureSpec  # groups of datasets, or the path of a file with them
    leave_out: tuple[str, ...] = ()  # datasets of the mixture to leave out, such as those not downloaded
    sequence_length: PositiveInt  # maximum tokens of a pack
    max_crops: NonNegativeInt  # maximum ViT inputs of a pack
    window: PositiveInt = 4096  # draws that are packed together
    seed: NonNegativeInt = 0  # decides the order of the samples
    workers: NonNegativeInt = 2  # reader processes per rank; 0 reads in the training process
    prefetch: PositiveInt = 4  # decoded micro-batches that each worker holds ready
    read_ahead_mib: NonNegativeInt = 256  # MiB of stored samples that a rank reads ahead from a bucket
    damage_budget: float = Field(default=DAMAGE_BUDGET, ge=0, lt=1)  # fraction of a dataset; 0: none may be
    cache_mib: NonNegativeInt = 4096  # MiB of a machine's disk for small datasets from a bucket, as whole shards

    @pydantic.model_validator(mode="after")
    def _check(self) -> Data:
        self.mixture.without(self.leave_out)
        return self

    @property
    def drawn_mixture(self) -> MixtureSpec:
        """The mixture without the datasets of `leave_out`."""
        return self.mixture.without(self.leave_out)


class MeasuredCost(pydantic.BaseModel, extra="forbid", frozen=True):
    """What one token, one crop and one allowed pair of tokens add to the time of a pack, in any unit."""

    token: float = Field(ge=0, allow_inf_nan=False)  # cost of a token
    crop: float = Field(ge=0, allow_inf_nan=False)  # cost of a crop or frame
    pair: float = Field(ge=0, allow_inf_nan=False)  # cost of a (query, key) pair


class Train(pydantic.BaseModel, extra="forbid", frozen=True):
    """The length of a run, its batch size, precision, parallelism and checkpoints."""

    steps: PositiveInt  # optimizer steps of the run
    packs_per_step: PositiveInt  # the global batch: packs of one optimizer step over all ranks
    micro_batch: PositiveInt = 1  # packs that one rank (or group of sp ranks) computes at once
    sp: PositiveInt = 1  # ranks that share one pack (Ulysses sequence parallelism)
    sp_across_machines: bool = False  # let ranks of several machines share a pack: every layer waits for the network
    pack_cost: MeasuredCost | None = None  # by which packs are dealt to ranks; null: operations, from the model's sizes
    freeze: tuple[Component, ...] = ()  # components that are not trained: no gradients, no optimizer states
    precision: Literal["fp32", "bf16"] = "bf16"  # weights and activations; master weights are fp32
    zero_stage: Literal[0, 1, 2, 3] = 2  # what ranks partition: 1 optimizer states, 2 gradients too, 3 weights too
    recompute: Recompute = "full"  # activations computed again in backward; "light": all but those around attention
    compile: bool | None = None  # torch.compile for the parts of layers; null: on a GPU, except under ZeRO-3
    activation_budget: float = Field(default=1.0, gt=0, le=1)  # the part that compiled graphs keep of their activations
    fp8: bool = False  # 8-bit products in the language model's layers, by torchao; needs an H100 or newer
    visual_first: bool = False  # visual tokens stand before the others of their sample: attention masks less
    offload: tuple[Literal["activations", "optimizer"], ...] = ()  # kept in CPU memory: slower, with less GPU memory
    z_loss: float = Field(default=1e-4, ge=0)  # factor of weight * logsumexp^2
    residual_dropout: float = Field(default=0.0, ge=0, lt=1)  # on the output of every sublayer of the language model
    dropout_on: Literal["all", "response"] = "all"  # "response": only on tokens that predict a token with loss
    seed: NonNegativeInt = 6198  # for the initial weights and for dropout
    checkpoint_every: PositiveInt = 1000  # optimizer steps
    keep_last: PositiveInt = 2  # number of the newest checkpoints to keep
    keep_every: PositiveInt | None = None  # checkpoints at multiples of this many steps are kept too
    mirror: str | None = None  # a bucket, s3://…, to which checkpoints are copied, and from which a run can resume
    mirror_deadline: PositiveFloat = 3600.0  # seconds that the end of a run waits for its last copy to the mirror
    on_full_disk: Literal["stop", "warn"] = "stop"  # when a checkpoint cannot be written; older ones stay
    phase_deadline: PositiveFloat = 1800.0  # seconds without progress after which the watchdog ends a rank
    log_every: PositiveInt = 1  # steps between updates of the progress bar; without a terminal lines may be rarer

    @pydantic.model_validator(mode="after")
    def _check(self) -> Train:
        if self.keep_every is not None and self.keep_every % self.checkpoint_every:
            raise ValueError(
                f"keep_every {self.keep_every} is not a multiple of checkpoint_every {self.checkpoint_every}: there "
                "would be no checkpoint to keep at some of its steps"
            )
        # For bf16 at stage 1 DeepSpeed uses an optimizer whose files cannot be consolidated, and at stage 0 it has no
        # optimizer with fp32 master weights.
        if self.precision == "bf16" and self.zero_stage < 2:
            raise ValueError(f"precision bf16 needs zero_stage 2 or 3, not {self.zero_stage}")
        if set(self.freeze) == set(COMPONENTS):
            raise ValueError("freeze: every component is frozen, so nothing is trained; leave one out")
        if "optimizer" in self.offload and self.zero_stage == 0:
            raise ValueError("offload of the optimizer needs zero_stage 1, 2 or 3")
        if "activations" in self.offload and self.recompute != "full":
            raise ValueError("offload of activations needs recompute: full, since only inputs of layers are offloaded")
        if self.mirror and "://" in self.mirror and not self.mirror.startswith(("s3://", "file://")):
            raise ValueError(f"mirror {self.mirror}: cannot be written; give s3://bucket/runs or a folder")
        if self.compile and self.zero_stage == 3:
            raise ValueError("compile: ZeRO-3 gathers parameters inside layers; use zero_stage 2, or compile: false")
        if self.activation_budget < 1 and (not self.compile or self.recompute != "none"):
            raise ValueError("activation_budget below 1 needs compile: true and recompute: none")
        if self.fp8 and self.precision != "bf16":
            raise ValueError("fp8 needs precision: bf16")
        return self

    def compiles(self, on_gpu: bool) -> bool:
        """Whether parts of layers are compiled."""
        return self.zero_stage < 3 and on_gpu if self.compile is None else self.compile

    @property
    def chunk_crops(self) -> int | None:
        """The number of crops that the vision transformer processes at once; None: all.

        Under ZeRO-3 every call of a layer is a collective, and ranks have different numbers of crops, so each rank
        makes one call with all its crops.
        """
        return CHUNK_CROPS if self.recompute != "none" and self.zero_stage < 3 else None

    @property
    def overlaps_reduction(self) -> bool:
        """Whether DeepSpeed reduces gradients beside backward, on a stream of its own; it can from ZeRO-2 on.

        With sequence parallelism backward has collectives of its groups too. Collectives of two groups whose order
        differs between ranks can wait for each other for ever.
        """
        return self.sp == 1 and self.zero_stage >= 2


class OptimGroup(pydantic.BaseModel, extra="forbid", frozen=True):
    """Learning rate and clipping of one component: linear warm-up to `lr`, then cosine; gradient norm up to `clip`."""

    lr: float = Field(ge=0)  # the largest learning rate
    warmup_steps: NonNegativeInt = 200  # steps from 0 to `lr`
    warmup_fraction: Fraction | None = None  # fraction of the steps of the run, in place of warmup_steps
    clip: PositiveFloat = 1.0  # largest norm of the component's gradient

    def warmup(self, num_steps: int) -> int:
        """The warm-up of a run of `num_steps`, in steps."""
        return self.warmup_steps if self.warmup_fraction is None else round(self.warmup_fraction * num_steps)


class Lora(pydantic.BaseModel, extra="forbid", frozen=True):
    """Low-rank adapters on the language model; its own weights are frozen."""

    rank: PositiveInt = 16  # width of an adapter
    alpha: PositiveFloat = 32.0  # the output of an adapter is multiplied by alpha / rank


class Optim(pydantic.BaseModel, extra="forbid", frozen=True):
    """AdamW over three groups of parameters."""

    vit: OptimGroup  # the vision transformer
    connector: OptimGroup  # the connector and the added embeddings
    llm: OptimGroup  # the language model
    betas: tuple[Fraction, Fraction] = (0.9, 0.95)  # decay of the two moments
    eps: PositiveFloat = 1e-6  # added to the root of the second moment
    weight_decay: float = Field(default=0.0, ge=0)  # AdamW's, for all trained weights
    final_lr_fraction: Fraction = 0.1  # fraction of `lr` at the last step
    lora: Lora | None = None  # adapters in place of the weights of the language model; null: none
    freeze_base_embedding: bool = True  # as Molmo2 does; a model trained from scratch must train it


class Anomalies(pydantic.BaseModel, extra="forbid", frozen=True):
    """The reaction to a loss spike or a loss that is not finite. A skipped step changes no weight."""

    nonfinite: Literal["stop", "skip"] = "stop"  # what to do about a loss or gradient that is not finite
    spike_factor: float | None = Field(default=None, gt=1)  # a spike exceeds this times the median of the last 100
    spike: Literal["record", "skip", "stop"] = "record"  # what to do about a spike
    max_skips: PositiveInt = 5  # the run stops after this many skipped steps in a row


class Evaluation(pydantic.BaseModel, extra="forbid", frozen=True):
    """Validation during training, on shards that are not trained on. Nothing here changes the training."""

    roots: tuple[str, ...] = Field(min_length=1)  # folders of datasets, as in `data`
    datasets: tuple[str, ...] = Field(min_length=1)  # names of the datasets
    every: PositiveInt = 1000  # training steps between validations
    steps: PositiveInt = 1  # batches of train.packs_per_step packs, the same at every validation
    samples: NonNegativeInt = 4  # number of answers to generate
    max_new_tokens: PositiveInt = 64  # maximum length of an answer, in tokens
    benchmarks: tuple[str, ...] = ()  # benchmarks (or suites) that are scored, with their datasets in `roots`
    catalog: str | None = None  # the catalog of these benchmarks; null: those of tools/evaluate.py
    questions: PositiveInt = 64  # questions of each benchmark


class Logging(pydantic.BaseModel, extra="forbid", frozen=True):
    """Where metrics go besides `log.jsonl`, which is always written, and the GPU's peak for one of them."""

    tensorboard: bool = True  # write TensorBoard's files into the run's folder
    wandb: str | None = None  # name of the W&B project
    peak_tflops: PositiveFloat | None = None  # dense bfloat16 peak of a GPU for MFU; null: that of the GPU if known


class FirstWeights(pydantic.BaseModel, extra="forbid", frozen=True):
    """Pretrained weights to start from: directories, or OWNER/NAME or OWNER/NAME@REVISION on the Hugging Face hub.

    They are either both base models, in which case connector and added embeddings are initialized at random, or a whole
    Molmo2.
    """

    llm: str | None = None  # a Qwen3 or Olmo-3 model
    vit: str | None = None  # a SigLIP2 model
    molmo2: str | None = None  # a released or exported Molmo2, or one of this project's checkpoints

    @pydantic.model_validator(mode="after")
    def _check(self) -> FirstWeights:
        if (self.llm is None, self.vit is None, self.molmo2 is None) not in ((False, False, True), (True, True, False)):
            raise ValueError("give both llm and vit, or only molmo2")
        return self


def _read_init(value: Any) -> Any:
    """Choose by the type of the value, so that an error has one path and not one for each alternative."""
    if isinstance(value, dict):
        return FirstWeights.model_validate(value)
    if value is None or isinstance(value, str | FirstWeights):
        return value
    raise ValueError("write null, the name of a run, or a mapping of llm and vit, or of molmo2")


class Recipe(pydantic.BaseModel, extra="forbid", frozen=True):
    """The recipe of one run of one stage, whose files are in `runs/<name>/`."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")  # names the run and its folder
    stage: Literal["pretraining", "sft", "long"]  # the stage whose shards it reads; it decides how questions are asked
    model: str  # a preset of molmo2.model.presets
    tokenizer: str = "raw/tokenizer"  # folder of the tokenizer
    # The weights to start from: null for random ones, the name of a run, the path of a checkpoint, or pretrained ones.
    init: typing.Annotated[str | FirstWeights | None, pydantic.BeforeValidator(_read_init)] = None
    data: Data  # see `data`
    train: Train  # see `train`
    optim: Optim  # see `optim`
    anomalies: Anomalies = Anomalies()  # see `anomalies`
    eval: Evaluation | None = None  # see `eval`; null: no validation
    logging: Logging = Logging()  # see `logging`

    @pydantic.model_validator(mode="after")
    def _check(self) -> Recipe:
        data_path()  # refuses a URL
        if self.init == self.name:
            raise ValueError(f"init names the run itself ({self.name}); name the run of the stage before, or null")
        if self.optim.lora is not None and "llm" in self.train.freeze:
            raise ValueError(
                "train.freeze has llm, but optim.lora trains adapters on it and freezes its own weights; remove one"
            )
        if self.optim.lora is not None and self.train.fp8:
            raise ValueError("train.fp8 computes with the layers that optim.lora adapts; remove one")
        if self.optim.lora is not None and self.train.zero_stage == 3:
            raise ValueError(
                "optim.lora with train.zero_stage 3 is untested and refused; set train.zero_stage=2, which needs "
                "little more memory, since frozen weights have no optimizer states"
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
    def frozen(self) -> frozenset[Component]:
        """The components whose own weights get no gradients; with LoRA the language model has only adapters' ones."""
        return frozenset(self.train.freeze) | frozenset(() if self.optim.lora is None else ("llm",))

    @property
    def plan_settings(self) -> PlanSettings:
        """The settings that determine the order of batches."""
        data = self.data
        return PlanSettings(
            sequence_length=data.sequence_length,
            max_crops=data.max_crops,
            packs_per_step=self.train.packs_per_step,
            window=data.window,
            seed=data.seed,
        )

    @property
    def roots(self) -> list[str]:
        """The folders of datasets as paths and URLs, with `MOLMO2_DATA` applied."""
        return root_paths(self.data.roots)

    @property
    def run_dir(self) -> Path:
        """The folder with the log and the checkpoints of this run."""
        return data_path(f"runs/{self.name}")


def data_path(name: str | Path = "") -> Path:
    """A path below `MOLMO2_DATA` (default `./data`); an absolute `name` stays as it is."""
    folder = os.environ.get("MOLMO2_DATA", "data")
    if "://" in folder:
        raise RecipeError(
            f"MOLMO2_DATA={folder}: runs and raw data are kept on a disk; set it to a local folder, name buckets of "
            "shards in data.roots, and a bucket for copies of the checkpoints in train.mirror"
        )
    return Path(folder) / name


def root_paths(roots: Sequence[str]) -> list[str]:
    """Folders of datasets as paths and URLs, with `MOLMO2_DATA` applied to the paths."""
    return [root if "://" in root else str(data_path(root)) for root in roots]


def load_recipe(path: str | Path, overrides: Sequence[str] = (), init: str | FirstWeights | None = None) -> Recipe:
    """Read a recipe; `overrides` are `a.b=value`, the value in YAML; `init`, if given, replaces the recipe's.

    Raises:
        RecipeError: the file is missing or is not YAML, or keys or values are unknown, missing or wrong.
    """
    try:
        from shards.yaml_limits import checked  # imported here, since only recipes that are read as files need it

        loaded = OmegaConf.load(checked(Path(path)))
        shared = OmegaConf.select(loaded, "data.mixture")
        if isinstance(shared, str):
            loaded.data.mixture = OmegaConf.load(checked(Path(path).parent / shared))
        if malformed := [item for item in overrides if "=" not in item]:
            raise RecipeError(f"{path}: --set {' '.join(malformed)}: write key.path=value")
        merged = OmegaConf.merge(loaded, OmegaConf.from_dotlist(list(overrides)))
        if resolver := re.search(r"\$\{[^{}]*:", OmegaConf.to_yaml(merged)):
            raise RecipeError(
                f"{path}: {resolver[0]}...}}: a recipe may refer to its own keys only, `${{train.steps}}`, as it is "
                "stored with the run; give a value of the environment with --set"
            )
        values = OmegaConf.to_container(merged, resolve=True)
    except FileNotFoundError as error:
        raise RecipeError(f"{path}: no such recipe or mixture: {error.filename}") from None
    except (OSError, YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot be read: {error}") from None
    return parse_recipe(values if init is None else {**values, "init": init}, str(path))


def parse_recipe(values: Any, where: str) -> Recipe:
    """Validate plain values as a recipe; `where` begins the error message.

    Raises:
        RecipeError: the message has a line for each error: dotted path, what is wrong, the value, the nearest name.
    """
    try:
        return Recipe.model_validate(values)
    except pydantic.ValidationError as error:
        errors = error.errors(include_url=False)
        lines = "\n".join(f"  {_describe(item)}" for item in errors)
        raise RecipeError(f"{where}: {len(errors)} error{'s' if len(errors) > 1 else ''}\n{lines}") from None


def _describe(error: Any) -> str:
    path = ".".join(str(part) for part in error["loc"]) or "recipe"
    if error["type"] == "extra_forbidden" and path in GONE:
        return f"{path}: {GONE[path]} (got {error['input']!r})"
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
    """Names of the fields at a location; an index of a list or a key of a dict does not change the type."""
    annotation: Any = Recipe
    for part in location:
        fields = {name: field for model in _models(annotation) for name, field in model.model_fields.items()}
        annotation = fields[str(part)].annotation if part in fields else annotation
    return sorted({name for model in _models(annotation) for name in model.model_fields})
