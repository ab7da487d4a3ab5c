"""A plugin of lmms-eval: `--model nanomolmo2 --model_args checkpoint=DIR` runs its tasks with our frames and prompts.

The entry point `lmms_eval.models` names `manifest`. Only tasks of type generate_until are supported; `tasks` lists the
others. Only these two modules import lmms-eval, and nothing else of the project imports them. Requests are read in
`requests` and answered in `replies`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

import torch
from accelerate import Accelerator
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from loguru import logger
from tqdm import tqdm

from molmo2.eval.lmms.replies import Failures, limits_of, prepared_ahead, replies
from molmo2.eval.lmms.requests import Generation, example_of, generation_of
from molmo2.eval.lmms.tasks import check_command_line
from molmo2.model.generate import PromptTensors
from molmo2.model.molmo2 import Molmo2
from molmo2.processing.contract import ProcessorSettings
from molmo2.processing.processor import build_processor
from molmo2.weights.load import open_model
from shards.schema import RejectedError


def manifest() -> ModelManifest:
    """The manifest that lmms-eval's registry loads from the entry point."""
    return ModelManifest(model_id="nanomolmo2", chat_class_path=f"{__name__}.NanoMolmo2")


class NanoMolmo2(lmms):
    """The model in lmms-eval's interface. Every rank has the whole model on its device and answers its own requests."""

    is_simple = False  # requests hold chat messages

    def __init__(
        self,
        checkpoint: str,
        device: str | None = None,
        batch_size: int | str = 1,
        max_frames: int | None = None,
        max_batch_size: int | None = None,
        precision: str | None = None,
    ):
        """Load the model.

        Args:
            checkpoint: a run, a checkpoint, a model's directory, or OWNER/NAME.
            device: "cuda" is this rank's GPU; None takes a GPU if there is one.
            batch_size: questions that are answered together.
            max_batch_size: ignored; lmms-eval passes it if it is on its command line.
            max_frames: maximum frames of a video; None takes the number of `tools/evaluate.py`.
            precision: "bf16" or "fp32"; None is bf16 on a GPU and fp32 on a CPU.

        Raises:
            ValueError: no such model, an argument out of its range, or a task on lmms-eval's command line that this
                model cannot run.
        """
        super().__init__()
        check_command_line(sys.argv[1:])
        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        self.device = self.accelerator.device if device in (None, "cuda") else torch.device(str(device))
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise ValueError(f"batch_size={batch_size}: a number of questions, 1 or more")
        self.batch_size = int(batch_size)
        self._limits = limits_of(max_frames)
        opened = open_model(str(checkpoint))
        self.model = Molmo2.for_inference(opened.config, opened.weights, self.device, precision)
        self._processor = build_processor(
            ProcessorSettings(
                preset=opened.config.name, tokenizer_dir=str(opened.tokenizer_dir), stage="eval", num_variants=1
            )
        )

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """The answer to every request; those with equal generation arguments share batches.

        Raises:
            TooManyFailuresError: more questions have no prompt than the budget allows.
        """
        results = [GenerationResult(text="")] * len(requests)
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[2], sort_keys=True), []).append(number)
        failures = Failures(len(requests))
        seed = self.rank
        with tqdm(total=len(requests), desc="nanomolmo2", unit="question", disable=self.rank > 0) as bar:
            for arguments, members in groups.items():
                if ignored := generation_of(json.loads(arguments)).ignored:
                    logger.warning(f"generation_kwargs that this model does not know are left out: {ignored}")
                for batch in prepared_ahead(
                    lambda number: self._prompt(requests[number], failures), members, self.batch_size
                ):
                    seed += self.world_size
                    prompts = [(number, prompt) for number, prompt in batch if prompt is not None]
                    for number, answer in self._answers(prompts, generation_of(json.loads(arguments), seed)):
                        results[number] = answer
                    bar.update(len(batch))
        if failures.found:
            logger.warning(f"{len(failures.found)} of {len(requests)} questions could not be asked")
        return results

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Not supported: lmms-eval's tasks do not agree on whether it is a loss or a log probability."""
        raise NotImplementedError("nanomolmo2 runs tasks of type generate_until, not of loglikelihood")

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Not supported."""
        raise NotImplementedError("nanomolmo2 runs tasks of type generate_until, not of generate_until_multi_round")

    def _prompt(self, request: Instance, failures: Failures) -> PromptTensors | None:
        """The prompt of a request, on the CPU; None if no prompt can be made, which counts as a failure."""
        _, messages_of, _, doc_id, task, split = request.args
        try:
            example = example_of(messages_of(self.task_dict[task][split][doc_id]))
            return PromptTensors.of(self._processor.prompt(example, self._limits))
        except RejectedError as error:
            logger.warning(failures.add(f"{task} {doc_id}", error))
            return None

    def _answers(
        self, asked: Sequence[tuple[int, PromptTensors]], generation: Generation
    ) -> list[tuple[int, GenerationResult]]:
        """The answers of one batch, by the requests' numbers."""
        if not asked:
            return []
        prompts = [PromptTensors.of(prompt, self.device) for _, prompt in asked]
        answers = replies(self.model, self._processor.tokenizer, prompts, generation)
        counts = [
            TokenCounts(input_tokens=len(prompt.input_ids), output_tokens=reply.num_tokens)
            for prompt, reply in zip(prompts, answers, strict=True)
        ]
        return [
            (number, GenerationResult(text=reply.text, token_counts=count))
            for (number, _), reply, count in zip(asked, answers, counts, strict=True)
        ]
