"""The planning kernel against the specification."""

from __future__ import annotations

import pytest
import torch

from tests import cases
from tests.kernels.harness import DEVICE, INTERPRETED
from tilewise.moe import reference
from tilewise.moe.plan import carve_counts, carve_plan, plan_into, plan_ints
from tilewise.ragged import max_tiles


def check(
    ids: torch.Tensor, num_experts: int, num_local: int, expert_map: torch.Tensor | None
) -> None:
    n = ids.numel()
    buffer = torch.full((plan_ints(n, num_local),), 2**30, dtype=torch.int32, device=DEVICE)
    ragged = carve_plan(buffer, n, num_local)
    plan_into(ragged, carve_counts(buffer, n, num_local), ids, num_experts, expert_map)
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


# Cases of a thousand experts are planned by test_layer too; one of them is enough here.
PLANNED = [
    c for c in cases.CASES if c.num_tokens and (c.num_experts < 1000 or c.name == "experts_1536")
]


@pytest.mark.parametrize("case", PLANNED, ids=lambda c: c.name)
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


def test_plan_many_tokens_and_experts() -> None:
    """Two launches with a map, strides and skipped ids; more chunks than are added up per step."""
    tokens = 600 if INTERPRETED else 9000
    ids = torch.randint(-1, 203, (tokens, 16), dtype=torch.int64, device=DEVICE)[:, ::2]
    expert_map = torch.full((200,), -1, dtype=torch.int32, device=DEVICE)
    expert_map[::3] = torch.arange(67, dtype=torch.int32, device=DEVICE)
    check(ids, 200, 200, None)
    check(ids, 200, 67, expert_map)
    if not INTERPRETED:
        check(torch.randint(0, 1536, (3000, 8), device=DEVICE), 1536, 1536, None)
        check(torch.zeros((8192, 8), dtype=torch.int32, device=DEVICE), 8, 8, None)


def test_max_tiles_is_reached() -> None:
    assert max_tiles(10, 4, 4) == 5  # sizes 1, 1, 1, 7
    assert max_tiles(3, 8, 16) == 3
    assert max_tiles(0, 8, 16) == 0
