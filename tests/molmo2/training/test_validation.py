"""What is asked of a model while it trains, and what is drawn of its answers. Whole runs: test_train."""

import io

import engine_cases
import torch
from PIL import Image

from molmo2.processing.batch_prompt import prompt_of
from molmo2.processing.pictures import LARGE, Mark, raster, to_picture
from molmo2.training.validation import choose_draws
from shards.stream.plan import Cursor, Draw, PackSpec, StepSpec


def test_a_question_ends_where_its_first_answer_begins() -> None:
    batch = engine_cases.make(engine_cases.BATCHES[0])
    own = torch.nonzero(batch.segment_ids[0] == 1).flatten()
    batch.loss_weights.zero_()
    for place in (2, 3, 5):  # an answer of two tokens, and one of a later turn
        batch.loss_weights[0, own[place]] = 1
    found = prompt_of(batch)
    assert found is not None
    prompt, expected = found
    trunk = batch.input_ids[0][batch.segment_ids[0] == 10_000]
    assert prompt.input_ids.tolist() == [*trunk.tolist(), *batch.input_ids[0, own[:3]].tolist()]
    assert expected.tolist() == batch.labels[0, own[2:4]].tolist()
    assert len(prompt.is_visual) == len(prompt.input_ids) and len(prompt.pixels)
    batch.loss_weights.zero_()
    assert prompt_of(batch) is None


def test_datasets_take_turns() -> None:
    draws = [Draw(dataset, 0, row, 0, 0, 0, 0, 1, 0, 1.0) for row, dataset in enumerate((0, 0, 0, 1, 2, 2))]
    packs = (PackSpec(0, 0, tuple(draws[:4])), PackSpec(0, 1, tuple(draws[4:])))
    picked = choose_draws(StepSpec(0, packs, 1.0, Cursor()), 5)
    assert [(draw.dataset, draw.row) for draw in picked] == [(0, 0), (1, 3), (2, 4), (0, 1), (2, 5)]


def test_points_are_drawn_into_the_picture_that_has_them() -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (200, 100), "black").save(buffer, "JPEG")
    mark = Mark(x=0.75, y=0.5, label="1", colour="#ff0000")
    pictures = [to_picture(buffer.getvalue(), str(i), LARGE, marks=[mark] if i == 8 else []) for i in range(9)]
    whole = raster(pictures)
    assert whole is not None and whole.size == (6 * 420, 210)
    assert whole.getpixel((5 * 420 + 315, 105)) == (255, 0, 0)  # the marked one is kept of nine
    assert raster([]) is None
