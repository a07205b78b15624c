"""The error of a layer on a few of its tokens, against fp32 and beside plain bf16 torch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_TOKENS = 16
TOLERANCE = 1.5  # allowed error, in errors of the plain bf16 implementation


@dataclass(frozen=True)
class Reference:
    """The expected output of a token subsample, and how far plain bf16 torch lands from it."""

    tokens: Tensor
    expected: Tensor
    err_bf16: float

    def error(self, output: Tensor) -> float:
        """Returns the relative L2 error of a full output [num_tokens, hidden_size] on the sample.

        NaN wherever any element of the output is not finite, in the sample or not.
        """
        if not bool(torch.isfinite(output).all()):
            return float("nan")
        return relative_error(output[self.tokens], self.expected)


def relative_error(output: Tensor, expected: Tensor) -> float:
    """Returns ‖output - expected‖ / ‖expected‖."""
    return float((output.float() - expected).norm() / expected.norm())


def make_reference(
    x: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    w13: Tensor,
    w2: Tensor,
    *,
    max_tokens: int = MAX_TOKENS,
) -> Reference:
    """Computes the layer expert by expert on at most ``max_tokens`` evenly spaced tokens."""
    num_tokens = x.shape[0]
    sample = torch.linspace(0, num_tokens - 1, min(num_tokens, max_tokens), device=x.device).long()
    x, ids, weights = x[sample], topk_ids[sample], topk_weights[sample]
    expected = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    plain = torch.zeros_like(x)
    for expert in ids.unique().tolist():
        token, slot = torch.where(ids == expert)
        scale = weights[token, slot, None]
        exact = _expert(x[token].float(), w13[expert].float(), w2[expert].float())
        expected.index_add_(0, token, exact * scale)
        rounded = _expert(x[token], w13[expert], w2[expert]) * scale
        plain.index_add_(0, token, rounded.to(plain.dtype))
    return Reference(sample, expected, relative_error(plain, expected))


def _expert(x: Tensor, w13: Tensor, w2: Tensor) -> Tensor:
    gate, up = (x @ w13.T).chunk(2, dim=-1)
    return (F.silu(gate) * up) @ w2.T
