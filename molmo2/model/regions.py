"""Regional compilation: the parts of the model that are compiled, each as one graph that all its layers share.

A decoder layer has a graph before attention and one after it; attention itself, and with it every collective of
sequence parallelism, stays outside. A block of the vision transformer, the connector and a chunk of the loss are one
graph each. The number of graphs does not grow with the number of layers, and the dimensions that differ between packs
(crops, visual tokens, rows with loss) are dynamic, so that no new pack is compiled for.

Only training uses the graphs: evaluation sees too many lengths for what it would gain. ZeRO-3 gathers parameters in
hooks of the modules, which no graph can hold, so that nothing is compiled under it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch._dynamo
import torch._functorch.config

from molmo2.model.connector import Connector
from molmo2.model.decoder import Layer
from molmo2.model.loss import chunk_sums
from molmo2.model.molmo2 import Molmo2
from molmo2.model.vit import Block


def compile_regions(model: Molmo2, backend: str | Callable[..., Any] = "inductor", budget: float = 1.0) -> None:
    """Compile the regions of a model, in place; its parameters and their names stay as they are.

    A graph is made when it is first needed. `fullgraph` makes an operation that cannot be compiled an error.

    Args:
        model: the model.
        backend: torch.compile's.
        budget: what graphs keep for backward of what they would: with 0.5, what costs most time for its memory is kept
            in half the memory, and the rest is computed again. It holds for all graphs of this process.
    """
    torch._functorch.config.activation_memory_budget = budget

    def compiled(function: Callable[..., Any], dynamic: tuple[int, ...] = ()) -> Callable[..., Any]:
        """`function` as a graph; `dynamic`: numbers of the arguments whose first dimension differs between packs."""
        graph = torch.compile(function, fullgraph=True, backend=backend)

        @functools.wraps(function)
        def run(*arguments: Any) -> Any:
            if not model.training:
                return function(*arguments)
            for number in dynamic:
                torch._dynamo.maybe_mark_dynamic(arguments[number], 0)
            return graph(*arguments)

        return run

    model.text.pre, model.text.post = compiled(Layer.pre), compiled(Layer.post)
    model.vit.block = compiled(Block.forward, dynamic=(1,))
    model.connector.forward = functools.partial(  # type: ignore[method-assign]
        compiled(Connector.forward, dynamic=(1, 2)), model.connector
    )
    model.lm_head.chunk_sums = compiled(chunk_sums, dynamic=(0, 1, 2))
