"""From a pack of read samples to tensors."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from toy import LAYOUT, make_sample, write_samples

from shards.layout import expand, visual_pooling
from shards.media.jpeg import decode_jpeg, encode_jpeg
from shards.split import split_visuals
from shards.stream.collate import (
    MEMBER,
    PAD_SEGMENT,
    TRUNK,
    Batch,
    OpenedSample,
    collate,
    decode_crops,
    make_pixels,
    open_sample,
    own_crops,
)
from shards.stream.dataset import Dataset, open_dataset
from shards.stream.plan import Cursor, Draw, PackSpec
from shards.stream.reader import Damage, ReadError, StoredSample, read_sample

LENGTH = 1200


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    root = tmp_path_factory.mktemp("collate")
    write_samples(root, "toy", [make_sample("toy", i) for i in range(9)], per_shard=9)
    return open_dataset(str(root), "toy")


def draw_of(dataset: Dataset, row: int, variant: int = 0) -> Draw:
    entry = dataset.sidecars[0][row]
    lengths = (entry[field][variant].item() for field in ("num_tokens", "num_crops", "loss_weight"))
    return Draw(0, 0, row, variant, *(entry[f].item() for f in ("offset", "span", "xxh64")), *lengths)


def stored(dataset: Dataset, draw: Draw) -> StoredSample:
    sample = read_sample(dataset.tars, draw)
    assert isinstance(sample, StoredSample)
    return sample


def batch_of(dataset: Dataset, rows: list[list[int]], lost: tuple[int, ...] = ()) -> Batch:
    packs = [PackSpec(3, slot, tuple(draw_of(dataset, row) for row in members)) for slot, members in enumerate(rows)]

    def read(draw: Draw) -> OpenedSample | Damage:
        if draw.row in lost:
            return Damage(dataset="toy", shard="000000", row=draw.row, key=None, offset=0, reason="test")
        return open_sample(LAYOUT, draw, stored(dataset, draw))

    samples = [read(draw) for pack in packs for draw in pack.draws]
    opened = [sample for sample in samples if isinstance(sample, OpenedSample)]
    pixels = np.concatenate([make_pixels(LAYOUT, 0), *map(decoded, opened)])
    return collate(LAYOUT, packs, samples, pixels, LENGTH, 7.5, Cursor(step=4, window=1, offset=2))


def decoded(sample: OpenedSample) -> np.ndarray:
    pixels = make_pixels(LAYOUT, sum(sample.num_crops))
    decode_crops(LAYOUT, sample.stored, range(len(sample.num_crops)), pixels)
    return pixels


def test_tokens_lie_one_sample_after_another(dataset: Dataset) -> None:
    batch = batch_of(dataset, [[0, 1], [5]])
    assert batch.input_ids.dtype == batch.labels.dtype == batch.position_ids.dtype == torch.int64
    assert (batch.segment_ids.dtype, batch.loss_weights.dtype, batch.is_visual.dtype) == (
        torch.int32,
        torch.float32,
        torch.bool,
    )
    for slot, members in enumerate([[0, 1], [5]]):
        start = 0
        for member, row in enumerate(members):
            sample = make_sample("toy", row)
            wanted = expand(LAYOUT, sample.variants[0], sample.record["visuals"])
            here = (slot, slice(start, start + len(wanted.input_ids)))
            assert batch.input_ids[here].tolist() == wanted.input_ids.tolist()
            assert batch.labels[here].tolist() == wanted.labels.tolist()
            assert batch.position_ids[here].tolist() == wanted.position_ids.tolist()
            assert batch.loss_weights[here].tolist() == wanted.weights.tolist()
            assert batch.is_visual[here].tolist() == wanted.is_visual.tolist()
            branch = np.where(wanted.branch == 0, TRUNK, wanted.branch.astype(int))
            assert batch.segment_ids[here].tolist() == (member * MEMBER + branch).tolist()
            start += len(wanted.input_ids)
        assert (batch.segment_ids[slot, start:] == PAD_SEGMENT).all()
        assert not batch.loss_weights[slot, start:].any() and not batch.is_visual[slot, start:].any()
    assert (batch.step, batch.slots, batch.divisor) == (3, (0, 1), 7.5)
    assert batch.cursor == Cursor(4, 1, 2)


def test_pixels_and_pooling_follow_the_visual_tokens(dataset: Dataset) -> None:
    """What each <im_patch> pools, found through the batch and found through its own image."""
    rows = [[1, 2], [0], [5, 4]]
    batch = batch_of(dataset, rows)
    side, patch = LAYOUT.crop_patches, LAYOUT.patch_size
    patches = batch.pixels.reshape(-1, side, patch, side, patch, 3).transpose(2, 3).reshape(-1, patch, patch, 3)
    token = crop = visual = 0
    for row in [row for members in rows for row in members]:
        sample = make_sample("toy", row)
        for shown in sample.record["visuals"]:
            local = visual_pooling(LAYOUT, shown)
            count = int(batch.visual_crops[visual])
            view = torch.from_numpy(decode_jpeg(sample.images[shown["view"]]))
            assert torch.equal(batch.pixels[crop], view)
            found = batch.pooling[token : token + len(local)]
            assert int(batch.visual_tokens[visual]) == len(local)
            assert (found[:, local.shape[1] :] == -1).all()
            own = patches[crop * side**2 : (crop + count) * side**2]
            inside = local >= 0
            assert ((found[:, : local.shape[1]].numpy() >= 0) == inside).all()
            assert torch.equal(patches[found[:, : local.shape[1]].numpy()[inside]], own[local[inside]])
            token, crop, visual = token + len(local), crop + count, visual + 1
    assert (token, crop, visual) == (len(batch.pooling), len(batch.pixels), len(batch.visual_crops))
    assert token == int((batch.input_ids == LAYOUT.tokens.im_patch).sum())
    assert batch.pooling.max() < len(patches)


def test_text_alone(dataset: Dataset) -> None:
    batch = batch_of(dataset, [[0, 3]])
    assert batch.pixels.shape == (0, 48, 48, 3)
    assert batch.pooling.shape == (0, LAYOUT.image_pool**2)
    assert len(batch.visual_crops) == len(batch.visual_tokens) == 0


@pytest.mark.parametrize("lost", [0, 1, 2])
def test_a_lost_sample_is_padding_and_moves_nothing(dataset: Dataset, lost: int) -> None:
    whole, masked = batch_of(dataset, [[0, 1, 2], [3]]), batch_of(dataset, [[0, 1, 2], [3]], (lost,))
    start = sum(draw_of(dataset, row).num_tokens for row in range(lost))
    place = torch.zeros_like(whole.is_visual)
    place[0, start : start + draw_of(dataset, lost).num_tokens] = True
    for field in ("input_ids", "labels", "loss_weights", "position_ids", "segment_ids", "is_visual"):
        assert torch.equal(getattr(whole, field)[~place], getattr(masked, field)[~place])
    assert (masked.segment_ids[place] == PAD_SEGMENT).all()
    assert not masked.loss_weights[place].any() and not masked.input_ids[place].any()
    assert [damage.row for damage in masked.masked] == [lost]
    assert masked.divisor == whole.divisor
    patches = int((masked.input_ids == LAYOUT.tokens.im_patch).sum())
    assert patches == len(masked.pooling) == int(masked.visual_tokens.sum())
    assert len(masked.pixels) == int(masked.visual_crops.sum())


def test_the_divisor_of_the_index_is_the_sum_of_the_weights(dataset: Dataset) -> None:
    for row in range(9):
        draw = draw_of(dataset, row)
        sample = open_sample(LAYOUT, draw, stored(dataset, draw))
        assert sample.tokens.weights.sum() == pytest.approx(draw.loss_weight, rel=1e-6)
        assert draw.loss_weight > 0


def test_samples_that_were_built_wrong(dataset: Dataset) -> None:
    draw = draw_of(dataset, 1)
    sample = stored(dataset, draw)
    with pytest.raises(ReadError, match=r"\d+ tokens and \d+ crops, the index says 3 and"):
        open_sample(LAYOUT, draw._replace(num_tokens=3), sample)
    with pytest.raises(ReadError, match="1 visual placeholders for 0 visuals"):
        open_sample(LAYOUT, draw, replace(sample, visuals=[]))
    with pytest.raises(ReadError, match="KeyError: 'tiling'"):
        open_sample(LAYOUT, draw, replace(sample, visuals=[{"kind": "image", "view": 0, "canvas": 1}]))
    small = encode_jpeg(np.zeros((40, 48, 3), np.uint8))
    wrong_images = {
        r"image 0 is \(40, 48\), its tiling says \(48, 48\)": sample.images | {0: small},
        "KeyError: 1": {0: sample.images[0]},
        "ValueError": sample.images | {0: b"no jpeg"},
    }
    for words, images in wrong_images.items():
        with pytest.raises(ReadError, match=words):
            decoded(open_sample(LAYOUT, draw, replace(sample, images=images)))


@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
def test_shares_of_the_pixels_make_the_whole(dataset: Dataset, ranks: int) -> None:
    whole = batch_of(dataset, [[1, 2], [0], [5, 4]])
    parts = [own_crops(whole, rank, ranks) for rank in range(ranks)]
    splits = split_visuals(whole.visual_crops.tolist(), whole.visual_tokens.tolist(), ranks)
    order = torch.from_numpy(np.concatenate([split.crops for split in splits]))
    assert torch.equal(torch.cat([part.pixels for part in parts]), whole.pixels[order])
    assert all(torch.equal(part.pooling, whole.pooling) for part in parts)


def test_to_moves_every_tensor(dataset: Dataset) -> None:
    batch = batch_of(dataset, [[1]]).to("meta")
    tensors = [value for name in Batch.__slots__ if isinstance(value := getattr(batch, name), torch.Tensor)]
    assert len(tensors) == 11
    assert all(tensor.device.type == "meta" for tensor in tensors)


def test_segment_numbers_are_the_models() -> None:
    """The model imports nothing of the data plane, so both state them."""
    import molmo2.model.mask as mask
    import shards.stream.collate as collate_module

    for name in ("MEMBER", "TRUNK", "PAD_SEGMENT"):
        assert getattr(mask, name) == getattr(collate_module, name)
