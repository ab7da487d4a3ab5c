"""Scores of benchmarks during training: `eval.benchmarks` of a recipe.

The questions are divided among the ranks, except under ZeRO-3, where every forward is a collective: there each rank
answers all of them, always to the full length. The answers are gathered, and rank 0 computes the scores of
`tools/evaluate.py`, except those that need a judge.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import torch
import torch.distributed as dist

from molmo2.config import Evaluation, data_path, root_paths
from molmo2.eval.benchmarks import STAGE, Benchmark, choose_of_recipe
from molmo2.eval.metrics.scores import Answered
from molmo2.eval.questions import Question, as_batch, first_draws, questions_of, read_samples
from molmo2.model.generate import PromptTensors, generate
from molmo2.model.molmo2 import Molmo2
from molmo2.parallel.agree import on_rank_zero, say
from molmo2.processing.batch_prompt import prompt_of
from molmo2.processing.contract import ProcessorSettings, read_contract
from molmo2.training.run import Run
from shards.stream.dataset import Dataset, DatasetError, check_processor, find_dataset
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

        Rank 0 prints which scores need a judge and are therefore left out.

        Raises:
            ValueError: a benchmark is unknown, is not built, or cannot be scored.
            ImportError: a library of the extra "eval" is missing.
        """
        self.run = run
        self.collective = run.recipe.train.zero_stage == 3
        assert run.recipe.eval is not None
        self.benchmarks = tuple(open_benchmarks(run, run.recipe.eval))
        for benchmark in (opened.benchmark for opened in self.benchmarks if opened.benchmark.judged):
            say(
                f"eval.benchmarks: {', '.join(benchmark.judged)} of {benchmark.name} needs a judge and is not computed "
                "during training; run tools/evaluate.py --judge URL on a checkpoint"
            )

    @torch.no_grad()
    def __call__(self, model: Molmo2) -> dict[str, float]:
        """The scores by name, see `scores_of`; questions of damaged samples are left out; collective."""
        scores: dict[str, float] = {}
        for opened in self.benchmarks:
            mesh, questions = self.run.mesh, opened.questions
            numbers = range(len(questions)) if self.collective else range(mesh.rank, len(questions), mesh.world)
            answers = {number: self._answer(model, opened, questions[number]) for number in numbers}
            gathered: list[dict[int, str | None]] = [{} for _ in range(mesh.world)]
            dist.all_gather_object(gathered, answers)
            texts = {number: text for part in gathered for number, text in part.items() if text is not None}
            answered = [
                Answered(texts[number], question.asked, question.asked.facts)
                for number, question in enumerate(questions)
                if number in texts
            ]
            scores |= on_rank_zero(scores_of, opened.benchmark, answered)
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
    suites = choose_of_recipe(settings.benchmarks, settings.catalog)
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
        scores_of(benchmark, [Answered("", chosen[0].asked, chosen[0].asked.facts)])
        yield OpenBenchmark(benchmark=benchmark, dataset=dataset, questions=chosen)


def scores_of(benchmark: Benchmark, answered: Sequence[Answered]) -> dict[str, float]:
    """The mean score as "score.<benchmark>", and each score of all answers as "score.<benchmark>.<metric>"."""
    if not answered:
        return {}
    values = [benchmark.metric(one.prediction, one.asked, one.row).value for one in answered]
    whole = {f"score.{benchmark.name}.{metric.__name__}": metric(answered) for metric in benchmark.corpus}
    return {f"score.{benchmark.name}": sum(values) / len(values), **whole}


def missing_benchmarks(settings: Evaluation) -> Iterator[str]:
    """A message with a remedy for each benchmark of a recipe whose dataset is not built.

    Raises:
        ValueError: a name is unknown.
    """
    for suite in choose_of_recipe(settings.benchmarks, settings.catalog):
        for name in dict.fromkeys(benchmark.dataset for benchmark in suite.benchmarks):
            try:
                _find(name, root_paths(settings.roots), suite.catalog)
            except (ValueError, OSError) as error:
                yield str(error)


def _find(name: str, roots: list[str], catalog: str) -> Dataset:
    """Open a dataset that is built in one of these folders.

    Raises:
        ValueError: it is in none; the message has the command that builds it.
    """
    try:
        return find_dataset(tuple(roots), name)
    except DatasetError:
        command = f"python tools/build_shards.py --catalog {catalog} --stage {STAGE} --datasets {name}"
        raise ValueError(
            f"eval.benchmarks: {name} is in none of eval.roots ({', '.join(roots)}); build it:\n  {command}"
        ) from None
