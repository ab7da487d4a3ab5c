"""Answers on disk: `ANSWERS/<benchmark>-<digest>/rank-00000.jsonl`.

Files are append-only: an answer is never rewritten, so a killed run resumes after the last one. The digest covers the
weights, the model's precision, the maximum length of an answer and the index of the shards, which has hashes of every
stored sample (text and JPEGs) and the processor's settings; other weights, data or settings use another folder. It does
not cover the code, the batch size or the device: remove the folder after a change of the code that changes answers.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import xxhash
from torch import Tensor

from shards.atomic import append_to
from shards.format import digest


class Line(NamedTuple):
    """The answer to a question, by the question's name."""

    question: str
    text: str


def weights_digest(weights: Mapping[str, Tensor]) -> str:
    """Hash of the names, shapes, dtypes and bytes of all tensors, in hexadecimal digits."""
    state = xxhash.xxh3_128()
    for name, tensor in sorted(weights.items()):
        state.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        state.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return state.hexdigest()


@dataclass(frozen=True, slots=True)
class Store:
    """The answers of one benchmark under one digest."""

    folder: Path

    @classmethod
    def of(cls, root: Path, name: str, settings: Mapping[str, Any]) -> Store:
        """The store below `root` for answers that depend on `settings` (JSON)."""
        return cls(root / f"{re.sub(r'[^A-Za-z0-9]+', '-', name)}-{digest(dict(settings))[:16]}")

    def read(self) -> dict[str, str]:
        """The answers of all ranks, question -> text; a last line that a killed process left incomplete is skipped.

        Raises:
            ValueError: another line is not an answer.
        """
        answers = {}
        for path in sorted(self.folder.glob("rank-*.jsonl")):
            lines = path.read_bytes().split(b"\n")
            for number, line in enumerate(lines, 1):
                if not line:
                    continue
                try:
                    loaded = json.loads(line)
                    answers[loaded["question"]] = str(loaded["text"])
                except (ValueError, KeyError, TypeError) as error:
                    if number == len(lines):
                        continue
                    raise ValueError(f"{path}, line {number}: not an answer ({error}); remove the line") from None
        return answers

    def take(self, questions: Sequence[str]) -> list[str]:
        """The texts of the answers to these questions, in order.

        Raises:
            ValueError: some questions have no answer.
        """
        texts = self.read()
        if missing := [question for question in questions if question not in texts]:
            raise ValueError(f"{self.folder}: {len(missing)} answers are missing ({missing[0]}, ...); start it again")
        return [texts[question] for question in questions]

    @contextlib.contextmanager
    def writer(self, rank: int) -> Iterator[Callable[[Line], None]]:
        """A function that appends an answer to the rank's file and flushes it, so that other processes can read it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"rank-{rank:05d}.jsonl"
        with append_to(path) as file:
            _drop_half_line(path)

            def write(line: Line) -> None:
                file.write(json.dumps(line._asdict()) + "\n")
                file.flush()

            yield write


def _drop_half_line(path: Path) -> None:
    """Truncate an incomplete last line, which a killed process left."""
    if path.exists():
        data = path.read_bytes()
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            with path.open("r+b") as file:
                file.truncate(whole)
