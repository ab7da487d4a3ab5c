"""Scores of benchmarks during training: `eval.benchmarks` of a recipe.

The questions are divided among the ranks, except under ZeRO-3, where every forward is a collective: there each rank
answers all of them, always to the full length. Only means over questions are computed, not the scores of all answers
together; `tools/evaluate.py` on a checkpoint gives both.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import torch
import torch.distributed as dist

from molmo2.config import Evaluation, data_path, root_paths
from molmo2.eval.benchmarks import STAGE, Benchmark, choose, own_suite
from molmo2.eval.questions import Question, as_batch, first_draws, questions_of, read_samples
from molmo2.model.generate import PromptTensors, generate
from molmo2.model.molmo2 import Molmo2
from molmo2.processing.batch_prompt import prompt_of
from molmo2.processing.contract import ProcessorSettings, read_contract
from molmo2.training.run import Run
from shards.format import INDEX_NAME
from shards.storage.open import open_storage
from shards.stream.dataset import Dataset, check_processor, open_dataset
from shards.stream.reader import Damage, ReadError, read_sample

NO_END_TOKEN: Final = -1  # given as the end-of-text id: no model predicts it, so generation runs to the full length


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenBenchmark:
    """A benchmark with its dataset and the questions that are asked at every validation."""

    benchmark: Benchmark
    dataset: Dataset
    questions: tuple[Question, ...]


class Scorer:
    """Scores a model in training, on all ranks together."""

    def __init__(self, run: Run):
        """Open the benchmarks of `run.recipe.eval`, and score an empty answer to check facts and libraries.

        Raises:
            ValueError: a benchmark is unknown, is not built, or cannot be scored.
            ImportError: a library of the extra "eval" is missing.
        """
        self.run = run
        self.collective = run.recipe.train.zero_stage == 3
        assert run.recipe.eval is not None
        self.benchmarks = tuple(open_benchmarks(run, run.recipe.eval))

    @torch.no_grad()
    def __call__(self, model: Molmo2) -> dict[str, float]:
        """The mean scores by "score.<benchmark>"; questions of damaged samples are left out; collective."""
        scores = {}
        for opened in self.benchmarks:
            sums = torch.zeros(2, dtype=torch.float64, device=self.run.device)
            mesh, questions = self.run.mesh, opened.questions
            for question in questions if self.collective else questions[mesh.rank :: mesh.world]:
                answer = self._answer(model, opened, question)
                if answer is not None:
                    score = opened.benchmark.metric(answer, question.asked, question.asked.facts)
                    sums += torch.tensor([score.value, 1.0], dtype=torch.float64, device=sums.device)
            dist.all_reduce(sums)
            total, count = sums.tolist()
            if count:
                scores[f"score.{opened.benchmark.name}"] = total / count
        return scores

    def _answer(self, model: Molmo2, opened: OpenBenchmark, question: Question) -> str | None:
        """The greedy answer; None if the sample is damaged, under ZeRO-3 on any rank."""
        prompt = read_prompt(self.run, opened.dataset, question)
        if self.collective:
            missing = torch.tensor(float(prompt is None), device=self.run.device)
            dist.all_reduce(missing)
            prompt = None if missing else prompt
        if prompt is None:
            return None
        tokenizer = self.run.tokenizer
        end = NO_END_TOKEN if self.collective else tokenizer.eos
        (ids,) = generate(model, [prompt], opened.benchmark.max_new_tokens, end)
        return tokenizer.decode(ids[: ids.index(tokenizer.eos)] if tokenizer.eos in ids else ids)


def read_prompt(run: Run, dataset: Dataset, question: Question) -> PromptTensors | None:
    """The prompt of a question on the run's device; None if the sample is damaged."""
    stored = read_sample(dataset.tars, question.draw)
    if isinstance(stored, Damage):
        return None
    try:
        prompt = prompt_of(as_batch(run.layout, question.draw, stored), question.number)
    except ReadError:
        return None
    return None if prompt is None else PromptTensors.of(prompt[0], run.device)


def open_benchmarks(run: Run, settings: Evaluation) -> Iterator[OpenBenchmark]:
    """Open the benchmarks of a recipe, each with its first `questions` questions."""
    names = ",".join(settings.benchmarks)
    source, catalog = "eval.benchmarks", settings.catalog
    suites = choose(names, source) if catalog is None else [own_suite(catalog, names, source)]
    tokenizer = str(data_path(run.recipe.tokenizer))
    contract = read_contract(
        ProcessorSettings(preset=run.recipe.model, tokenizer_dir=tokenizer, stage=STAGE, num_variants=1)
    )
    for benchmark, home in ((benchmark, suite.catalog) for suite in suites for benchmark in suite.benchmarks):
        dataset = _find(benchmark.dataset, root_paths(settings.roots), home)
        check_processor(dataset, contract.settings)
        questions: list[Question] = []
        for draw, stored in read_samples(dataset.tars, first_draws(dataset, settings.questions)):
            questions += questions_of(draw, stored)
        chosen = tuple(questions[: settings.questions])
        benchmark.metric("", chosen[0].asked, chosen[0].asked.facts)
        yield OpenBenchmark(benchmark=benchmark, dataset=dataset, questions=chosen)


def _find(name: str, roots: list[str], catalog: str) -> Dataset:
    for root in roots:
        if open_storage(f"{root}/{name}").size(INDEX_NAME) is not None:
            return open_dataset(root, name)
    command = f"python tools/build_shards.py --catalog {catalog} --stage {STAGE} --datasets {name}"
    raise ValueError(f"eval.benchmarks: {name} is in none of eval.roots ({', '.join(roots)}); build it:\n  {command}")
