"""The planning kernel against the specification."""

from __future__ import annotations

import pytest
import torch

from tests import cases
from tests.kernels.harness import DEVICE, INTERPRETED
from tilewise.moe import reference
from tilewise.moe.plan import carve_plan, plan_into, plan_ints
from tilewise.ragged import max_tiles


def check(
    ids: torch.Tensor, num_experts: int, num_local: int, expert_map: torch.Tensor | None
) -> None:
    n = ids.numel()
    buffer = torch.full((plan_ints(n, num_local),), 2**30, dtype=torch.int32, device=DEVICE)
    ragged = carve_plan(buffer, n, num_local)
    plan_into(ragged, ids, num_experts, expert_map)
    sizes, offsets, gather, scatter = reference.plan(
        ids.cpu(), num_experts, num_local_experts=num_local,
        expert_map=None if expert_map is None else expert_map.cpu(),
    )  # fmt: skip
    rows = int(offsets[-1])
    assert torch.equal(ragged.sizes.cpu(), sizes)
    assert torch.equal(ragged.offsets.cpu(), offsets)
    assert torch.equal(ragged.gather[:rows].cpu(), gather[:rows])
    assert torch.equal(ragged.scatter.cpu(), scatter)
    for block in (16, 64, 128):
        assert sum(-(-s // block) for s in sizes.tolist()) <= ragged.max_tiles(block)


@pytest.mark.parametrize("case", [c for c in cases.CASES if c.num_tokens], ids=lambda c: c.name)
def test_plan(case: cases.Case) -> None:
    inputs = cases.make_inputs(case, torch.float32, DEVICE)
    check(inputs.topk_ids, case.num_experts, inputs.weights.num_local_experts, inputs.expert_map)


def test_plan_strided_ids() -> None:
    ids = torch.randint(0, 6, (9, 8), dtype=torch.int64, device=DEVICE)
    check(ids[:, 1:7:2], 6, 6, None)
    check(ids.T[:, :5], 6, 6, None)


@pytest.mark.parametrize("num_tokens", [1300] if INTERPRETED else [1300, 8192, 70000])
def test_plan_many_tokens(num_tokens: int) -> None:
    """More ids than one step of the scan holds."""
    ids = torch.randint(-1, 9, (num_tokens, 4), dtype=torch.int32, device=DEVICE)
    check(ids, 8, 8, None)


def test_max_tiles_is_reached() -> None:
    assert max_tiles(10, 4, 4) == 5  # sizes 1, 1, 1, 7
    assert max_tiles(3, 8, 16) == 3
    assert max_tiles(0, 8, 16) == 0
