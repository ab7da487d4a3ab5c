"""Our model against transformers' Molmo2: logits, and gradients of a loss, in float32."""

from __future__ import annotations

import pytest
import torch
from packed_rows import CASES, TOLERANCE, build, image, reference_logits
from tiny_models import CONFIGS, pair

from molmo2.model.mask import PAD_SEGMENT
from molmo2.weights.names import from_foreign


@pytest.mark.parametrize("variant", CONFIGS)
@pytest.mark.parametrize("case", CASES)
def test_logits_and_gradients(case: str, variant: str) -> None:
    config = CONFIGS[variant]
    reference, ours = pair(config)
    row = build(config, CASES[case])
    visuals = [visual for member, _ in CASES[case] for visual in member]
    expected = reference_logits(reference, config, row, visuals)
    logits = ours(**row)
    assert logits.shape == expected.shape
    torch.testing.assert_close(logits, expected, atol=TOLERANCE, rtol=0)
    labels = torch.arange(logits.shape[1]) % config.text.vocab_size
    for output in (logits, expected):
        torch.nn.functional.cross_entropy(output[0], labels).backward()
    own = dict(ours.named_parameters())
    theirs = {name: p.grad for name, p in reference.named_parameters() if p.grad is not None}
    reached = {name: p.shape for name, p in own.items() if visuals or not name.startswith(("vit.", "connector."))}
    for name, read in from_foreign(reached, theirs).items():
        gradient = read()
        assert gradient.any() or (name == "text.embedding.added" and not visuals), name
        torch.testing.assert_close(
            own[name].grad, gradient, atol=TOLERANCE, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_a_branch_is_as_if_it_were_alone() -> None:
    config = CONFIGS["qwen3"]
    _, ours = pair(config)
    row = build(config, [([image(1, 2)], [5, 7])])
    both = ours(**row)
    segment = row["segment_ids"][0]
    alone = {name: value[:, (segment != 1).nonzero()[:, 0]] for name, value in row.items() if value.shape[:1] == (1,)}
    single = ours(**{**row, **alone})
    torch.testing.assert_close(single[0, -7:], both[0, -7:], atol=TOLERANCE, rtol=0)


def test_padding_changes_nothing() -> None:
    config = CONFIGS["qwen3"]
    _, ours = pair(config)
    row = build(config, [([image(1, 1)], [5])])
    pad = torch.nn.functional.pad
    padded = {
        "input_ids": pad(row["input_ids"], (0, 3)),
        "position_ids": pad(row["position_ids"], (0, 3)),
        "segment_ids": pad(row["segment_ids"], (0, 3), value=PAD_SEGMENT),
        "is_visual": pad(row["is_visual"], (0, 3)),
    }
    length = row["input_ids"].shape[1]
    torch.testing.assert_close(ours(**{**row, **padded})[:, :length], ours(**row), atol=TOLERANCE, rtol=0)
