"""The routing kernel against the specification."""

from __future__ import annotations

import pytest
import torch

from tests import cases
from tests.kernels.harness import DEVICE
from tilewise.moe import reference
from tilewise.moe.route import route_into


def run(case: cases.RouteCase, logits: torch.Tensor, bias: torch.Tensor | None) -> tuple:
    shape = (case.num_tokens, case.top_k)
    weights = torch.full(shape, torch.nan, device=DEVICE)
    ids = torch.full(shape, -9, dtype=torch.int32, device=DEVICE)
    route_into(
        weights, ids, logits, case.top_k, case.scoring_func, case.renormalize, bias,
        case.num_expert_group or 0, case.topk_group or 0, case.routed_scaling_factor,
    )  # fmt: skip
    return weights, ids


@pytest.mark.parametrize("case", cases.ROUTE_CASES, ids=lambda c: c.name)
def test_route(case: cases.RouteCase) -> None:
    logits, bias = cases.make_logits(case, device=DEVICE)
    weights, ids = run(case, logits, bias)
    expected_weights, expected_ids = reference.route(
        logits.cpu(), case.top_k,
        e_score_correction_bias=None if bias is None else bias.cpu(),
        **cases.route_options(case),  # type: ignore[arg-type]
    )  # fmt: skip
    for row in ids.tolist():
        assert len(set(row)) == case.top_k, "ids repeat within a token"
        assert all(0 <= e < case.num_experts for e in row)
    assert torch.equal(ids.cpu(), expected_ids)
    torch.testing.assert_close(weights.cpu(), expected_weights, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_strided_half_logits(dtype: torch.dtype) -> None:
    case = cases.RouteCase("strided", num_experts=24, top_k=3)
    logits, _ = cases.make_logits(case, dtype, DEVICE)
    wide = torch.full((7, 60), torch.nan, dtype=dtype, device=DEVICE)
    wide[:, 2:50:2] = logits
    weights, ids = run(case, wide[:, 2:50:2], None)
    expected_weights, expected_ids = reference.route(logits.cpu(), case.top_k)
    assert torch.equal(ids.cpu(), expected_ids)
    torch.testing.assert_close(weights.cpu(), expected_weights, rtol=2e-5, atol=1e-6)
