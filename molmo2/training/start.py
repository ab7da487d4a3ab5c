"""The model before the first step: rank 0 reads its weights once and sends them, tensor by tensor, to all ranks.

The model is made on the meta device. Each parameter is then placed on the rank's device in the precision of the run
and, under ZeRO-3, partitioned before the next one. So beside its own part of the model a rank needs memory for one
tensor only, rank 0 too, whatever it reads from. The optimizer and its states are in `molmo2.training.engine`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Mapping

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor, nn

from molmo2.checkpoint.files import WEIGHTS, Checkpoint, CheckpointError, base_weights, consolidate
from molmo2.config import FirstWeights, Recipe, data_path
from molmo2.model.molmo2 import Molmo2
from molmo2.model.presets import ModelConfig, config_differences
from molmo2.parallel.agree import all_ranks_ok, write_line
from molmo2.parallel.mesh import Mesh
from molmo2.training.engine import deepspeed_config
from molmo2.training.run import Run

Weights = Iterator[tuple[str, Tensor]]  # float32 weights by name, in the order of the model's parameters


def starting_model(run: Run, checkpoint: Checkpoint | None = None, *, whole: bool, read: bool = True) -> Molmo2:
    """Build the model with the weights with which the run starts or resumes; collective.

    Args:
        run: the run.
        checkpoint: the checkpoint from which the run resumes, whose weights are read in place of the recipe's `init`.
        whole: every rank gets the whole model under ZeRO-3 too.
        read: False leaves all weights zero, for an engine that loads every one of them from the checkpoint.

    Raises:
        AgreedError: weights cannot be read, or are not those of the recipe's model; rank 0 has printed the reason.
    """
    weights: Weights | None = None
    with all_ranks_ok():
        if run.mesh.rank == 0 and read:
            weights = _resumed_weights(run.model_config, checkpoint) if checkpoint else first_weights_of(run)
    with all_ranks_ok():
        return place_weights(run.model_config, run.recipe, run.mesh, run.device, weights, whole=whole, send=read)


def first_weights_of(run: Run) -> Weights:
    """The weights of a new run: random, those of an earlier run, or pretrained ones.

    Raises:
        ValueError: they cannot be found, or belong to another model.
    """
    recipe, config = run.recipe, run.model_config
    if recipe.init is None:
        return _empty(config).random_weights(recipe.train.seed)
    if isinstance(recipe.init, FirstWeights):
        from molmo2.weights.pretrained import first_weights

        tokenizer = data_path(recipe.tokenizer)
        return in_order(config, first_weights(recipe.init, config, tokenizer, recipe.train.seed, write_line))
    from molmo2.checkpoint.lookup import open_checkpoint

    source = open_checkpoint(recipe.init, write_line)
    differing = config_differences(source.model_config, config)
    if differing:
        raise CheckpointError(
            f"init {recipe.init}: its model ({source.model_config.name}) is not the recipe's ({recipe.model}): "
            f"{'; '.join(differing)}; name the same preset in both stages"
        )
    if not source.meta["finished"]:
        write_line(f"{recipe.name}: init {recipe.init} stopped at step {source.step}, before its end")
    if not (source.path / WEIGHTS).exists():
        return in_order(config, consolidate(source.path))
    from molmo2.weights.names import open_tensors

    return in_order(config, open_tensors(source.path))


def _resumed_weights(config: ModelConfig, checkpoint: Checkpoint) -> Weights:
    return in_order(config, base_weights(checkpoint.path))


def _empty(config: ModelConfig) -> Molmo2:
    with torch.device("meta"):
        return Molmo2(config)


def in_order(config: ModelConfig, weights: Mapping[str, Callable[[], Tensor]]) -> Weights:
    """Read weights in the order of the model's parameters, each when it is wanted."""
    names = [name for name, _ in _empty(config).named_parameters()]
    if differing := sorted(set(names) ^ set(weights)):
        raise CheckpointError(f"the weights are not those of the model; missing or unexpected: {', '.join(differing)}")
    return ((name, weights[name]()) for name in names)


def place_weights(
    config: ModelConfig,
    recipe: Recipe,
    mesh: Mesh,
    device: torch.device,
    weights: Weights | None,
    *,
    whole: bool = True,
    send: bool = True,
) -> Molmo2:
    """Make a model and place its weights parameter by parameter; collective.

    Args:
        config: the model.
        recipe: the run, which determines precision and ZeRO stage.
        mesh: this rank's place.
        device: where the weights go.
        weights: on rank 0 the weights, on other ranks None.
        whole: see `starting_model`.
        send: whether there are weights; False leaves them all zero.

    Raises:
        ValueError, OSError: on rank 0, if a tensor could not be read; only after all ranks have got as far, so that
            none of them waits for another.
    """
    model, failure = _empty(config), None
    dtype = torch.bfloat16 if recipe.train.precision == "bf16" else torch.float32
    partition = None if whole or recipe.train.zero_stage < 3 else Partitioner(recipe)
    for name, meta in list(model.named_parameters()):
        tensor = torch.zeros(meta.shape, dtype=dtype, device=device)
        if weights is not None and failure is None:
            try:
                found, weight = next(weights)
                assert found == name and weight.shape == meta.shape, (found, name, weight.shape, meta.shape)
                tensor.copy_(weight)
                del weight
            except (ValueError, OSError) as error:
                failure = error
        if send and mesh.world > 1:
            dist.broadcast(tensor.view(-1).view(torch.uint8), 0)  # gloo knows bytes in any version
        owner, _, last = name.rpartition(".")
        parameter = nn.Parameter(tensor)
        setattr(model.get_submodule(owner), last, parameter)
        if partition is not None:
            partition(parameter)
        del tensor, parameter
        return_freed_memory()
    if failure is not None:
        raise failure
    return model


def return_freed_memory() -> None:
    """Give freed memory back to the system.

    glibc keeps it in holes between the tensors that stay; they added up to as much as the model (62 M parameters,
    float32, ZeRO-3 on 2 ranks: a peak of 233 MiB for 119 MiB).
    """
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)


class Partitioner:
    """Partitions parameters over the ranks for ZeRO-3, one at a time, as the engine would do with the whole model."""

    def __init__(self, recipe: Recipe) -> None:
        self.config = deepspeed_config(recipe)
        self.first: nn.Parameter | None = None

    def __call__(self, parameter: nn.Parameter) -> None:
        """Keep only this rank's part of a parameter; collective."""
        if self.first is None:
            holder = nn.ParameterList([parameter])
            deepspeed.zero.Init(module=holder, config_dict_or_path=self.config, dtype=parameter.dtype)
            self.first = parameter
        else:
            self.first.convert_to_zero_parameters(param_list=[parameter])  # type: ignore[attr-defined]
