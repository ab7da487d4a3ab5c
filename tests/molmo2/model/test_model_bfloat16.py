"""bfloat16, and losses with weights, beside transformers' Molmo2 of the same weights.

"Within its rounding" means: measured against the float32 truth, our bfloat16 output is not further away than
transformers' bfloat16 output is, but for a small factor.
"""

from __future__ import annotations

import pytest
import torch
from packed_rows import CASES, TOLERANCE, build, reference_logits
from tiny_models import CONFIGS, pair

from molmo2.model.loss import weighted_loss
from molmo2.model.mask import AttentionMask
from molmo2.weights.names import from_foreign

FACTOR = 1.25


def relative(output: torch.Tensor, truth: torch.Tensor) -> float:
    """Root-mean-square error over the size of the truth."""
    return float((output.float() - truth).pow(2).mean().sqrt() / truth.pow(2).mean().sqrt())


@pytest.mark.slow
@pytest.mark.parametrize("variant", CONFIGS)
@pytest.mark.parametrize("case", CASES)
def test_as_near_to_float32_as_transformers(case: str, variant: str) -> None:
    config, errors = CONFIGS[variant], []
    row, visuals = build(config, CASES[case]), [visual for member, _ in CASES[case] for visual in member]
    for seed in range(3):
        reference, ours = pair(config, seed)
        with torch.no_grad():
            truth = ours(**row)
            own = relative(ours.bfloat16()(**row), truth)
            theirs = relative(reference_logits(reference.bfloat16(), config, row, visuals), truth)
        errors.append((own, theirs))
    own, theirs = (sum(column) / len(column) for column in zip(*errors, strict=True))
    assert 0 < own < FACTOR * theirs < 0.1, errors


def test_vision_attention_loses_no_more_than_float32_attention_does() -> None:
    """What the fused bfloat16 kernel rounds, beside attention of the same bfloat16 inputs in float32."""
    config = CONFIGS["qwen3"]
    attention = pair(config)[1].vit.blocks[0].attention
    torch.manual_seed(0)
    x = torch.randn(4, 729, config.vit.hidden_size)
    with torch.no_grad():
        truth = attention(x)
        fused = attention.bfloat16()(x.bfloat16())
        q, k, v = (
            proj(x.bfloat16()).float().unflatten(-1, (config.vit.num_heads, -1)).transpose(1, 2)
            for proj in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        wide = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        wide = attention.o_proj(wide.bfloat16())
    assert 0 < relative(fused, truth) < FACTOR * relative(wide, truth) < 0.1


@pytest.mark.parametrize("variant", CONFIGS)
def test_weighted_loss_and_its_gradients(variant: str) -> None:
    """The trainer's loss (chunks, weights, z term) beside the same sum over transformers' logits."""
    config, case = CONFIGS[variant], CASES["packed tree"]
    reference, ours = pair(config)
    row, visuals = build(config, case), [visual for member, _ in case for visual in member]
    length = row["input_ids"].shape[1]
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(config.text.vocab_size, (1, length), generator=generator)
    weights = torch.rand(1, length, generator=generator) * (torch.rand(1, length, generator=generator) < 0.6)
    assert (weights == 0).any()
    features = ours.encode_visuals(row["pixels"], row["pooling"])
    mask = AttentionMask(row["segment_ids"], row["is_visual"])
    hidden = ours.decode(ours.embed(row["input_ids"], features), row["position_ids"], mask)
    kept = weights > 0
    options = {"labels": labels[kept], "weights": weights[kept], "z_loss": 1e-2, "chunk_rows": 7}
    sums = weighted_loss(hidden[kept], ours.lm_head, **options)
    loss = (sums.cross_entropy + sums.z) / weights.sum()
    logits = reference_logits(reference, config, row, visuals)[0]
    terms = torch.nn.functional.cross_entropy(logits, labels[0], reduction="none") + 1e-2 * logits.logsumexp(-1) ** 2
    expected = (terms * weights[0]).sum() / weights.sum()
    torch.testing.assert_close(loss, expected, atol=TOLERANCE, rtol=0)
    loss.backward()
    expected.backward()
    own = dict(ours.named_parameters())
    theirs = {name: p.grad for name, p in reference.named_parameters()}
    for name, read in from_foreign({name: p.shape for name, p in own.items()}, theirs).items():
        gradient = read()
        assert gradient.any(), name
        torch.testing.assert_close(
            own[name].grad, gradient, atol=TOLERANCE, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )
