"""The CPU implementation, through the registered operators, against the specification."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

import tilewise
from tests.cases import (
    CASES,
    ROUTE_CASES,
    Case,
    Inputs,
    RouteCase,
    assert_close_to_reference,
    make_inputs,
    make_logits,
    options,
    route_options,
)
from tilewise.moe import cpu, reference
from tilewise.moe.activation import SWIGLU_OAI

BY_NAME = {case.name: case for case in CASES}
BOTH = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Threads that wait for each other take longer than products as small as these."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def call(case: Case, inputs: Inputs, **changes: Any) -> torch.Tensor:
    return tilewise.fused_experts(
        inputs.hidden_states, inputs.weights, inputs.topk_weights, inputs.topk_ids,
        expert_map=inputs.expert_map, **{**options(case), **changes},
    )  # fmt: skip


@BOTH
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_fused_experts(case: Case, dtype: torch.dtype) -> None:
    inputs = make_inputs(case, dtype)
    output = call(case, inputs)
    assert output.dtype is dtype and output.is_contiguous()
    assert_close_to_reference(output, case, inputs)
    assert torch.equal(call(case, inputs), output)


@pytest.mark.parametrize(
    "case", [c for c in CASES if c.num_tokens * c.top_k <= 24], ids=lambda c: c.name
)
def test_batch_invariant_is_as_good(case: Case) -> None:
    inputs = make_inputs(case, torch.bfloat16)
    assert_close_to_reference(call(case, inputs, batch_invariant=True), case, inputs)


@pytest.mark.parametrize("batch_invariant", [False, True])
@pytest.mark.parametrize(
    "name", ["tokens_63", "gpt_oss", "strided_input", "layout_strided", "relu2"]
)
def test_fp16(name: str, batch_invariant: bool) -> None:
    case = BY_NAME.get(name) or BY_NAME[f"activation_{name}"]
    inputs = make_inputs(case, torch.float16)
    output = call(case, inputs, batch_invariant=batch_invariant)
    assert_close_to_reference(output, case, inputs)


def test_called_directly_checks_its_arguments() -> None:
    case = BY_NAME["tokens_7"]
    x, weights, topk_weights, ids, _ = vars(make_inputs(case, torch.float32)).values()
    with pytest.raises(ValueError, match=r"out must be \(7, 48\), got \(1, 48\)"):
        cpu.fused_experts(x, weights, topk_weights, ids, out=torch.empty(1, 48))
    with pytest.raises(ValueError, match="they must be alike"):
        cpu.fused_experts(x, weights, topk_weights[:1], ids)


@pytest.mark.parametrize("name", ["all_sentinels", "map_none_here"])
def test_skipped_experts_contribute_exactly_zero(name: str) -> None:
    inputs = make_inputs(BY_NAME[name], torch.float32)
    assert torch.equal(call(BY_NAME[name], inputs), torch.zeros_like(inputs.hidden_states))


def test_a_skipped_slots_weight_is_not_looked_at() -> None:
    case = BY_NAME["unreduced_sentinels"]
    inputs = make_inputs(case, torch.float32)
    skipped = (inputs.topk_ids < 0) | (inputs.topk_ids >= case.num_experts)
    assert skipped.any() and not skipped.all()
    poisoned = replace(inputs, topk_weights=inputs.topk_weights.masked_fill(skipped, torch.nan))
    output = call(case, poisoned)
    assert torch.equal(output, call(case, inputs))
    assert torch.equal(output[skipped], torch.zeros_like(output[skipped]))


def take(inputs: Inputs, tokens: slice | list[int]) -> Inputs:
    return replace(
        inputs,
        hidden_states=inputs.hidden_states[tokens],
        topk_weights=inputs.topk_weights[tokens],
        topk_ids=inputs.topk_ids[tokens],
    )


INVARIANT = Case("invariant", num_tokens=500, num_experts=6, top_k=3, hidden_size=67,
                 intermediate_size=41)  # fmt: skip


@BOTH
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"activation": SWIGLU_OAI, "bias": True, "layout": "transposed_interleaved"},
        {"apply_router_weight_on_input": True},
        {"reduce": False},
        {"routing": "one_expert"},
        {"num_experts": 60, "expert_map": "half"},
    ],
    ids=["plain", "gpt_oss", "on_input", "unreduced", "one_expert", "map"],
)
def test_batch_invariant_bits(changes: dict[str, Any], dtype: torch.dtype) -> None:
    case = replace(INVARIANT, **changes)
    inputs = make_inputs(case, dtype)
    all_500 = call(case, inputs, batch_invariant=True)
    assert all_500.isfinite().all() and all_500.any()
    first_33 = call(case, take(inputs, slice(0, 33)), batch_invariant=True)
    assert torch.equal(first_33, all_500[:33])
    for token in (0, 17, 32):
        alone = call(case, take(inputs, [token]), batch_invariant=True)
        assert torch.equal(alone[0], all_500[token])
    # Elsewhere in a batch, among others.
    shuffled = call(case, take(inputs, [499, 4, 250, 17]), batch_invariant=True)
    assert torch.equal(shuffled[3], all_500[17])


@BOTH
@pytest.mark.parametrize("name", ["tokens_7", "unreduced", "gpt_oss", "map_half", "tokens_0"])
def test_out_and_workspace(name: str, dtype: torch.dtype) -> None:
    case = BY_NAME[name]
    inputs = make_inputs(case, dtype)
    expected = call(case, inputs)
    out = torch.full_like(expected, torch.nan)
    assert call(case, inputs, out=out) is out
    assert torch.equal(out, expected)
    shape = tilewise.MoEShape(
        inputs.weights.num_local_experts, case.top_k, case.hidden_size, case.intermediate_size
    )
    size = tilewise.workspace_size(shape, case.num_tokens, dtype=dtype, reduce=case.reduce)
    workspace = torch.full((size,), 255, dtype=torch.uint8)
    out.fill_(torch.nan)
    assert call(case, inputs, out=out, workspace=workspace) is out
    assert torch.equal(out, expected)


def test_out_may_be_rows_of_a_wider_tensor() -> None:
    case = BY_NAME["tokens_7"]
    inputs = make_inputs(case, torch.float32)
    wide = torch.full((case.num_tokens, case.hidden_size + 5), -3.0)
    call(case, inputs, out=wide[:, 2 : 2 + case.hidden_size])
    assert torch.equal(wide[:, 2 : 2 + case.hidden_size], call(case, inputs))
    assert wide[:, :2].eq(-3.0).all() and wide[:, 2 + case.hidden_size :].eq(-3.0).all()


@BOTH
@pytest.mark.parametrize("on_input", [False, True])
def test_unreduced_slots_add_up(on_input: bool, dtype: torch.dtype) -> None:
    case = replace(BY_NAME["unreduced"], top_k=4, apply_router_weight_on_input=on_input)
    inputs = make_inputs(case, dtype)
    slots = call(case, inputs)
    assert slots.shape == (9, 4, case.hidden_size)
    assert_close_to_reference(slots, case, inputs)
    reduced = call(case, inputs, reduce=True)
    tolerance = 1e-5 if dtype is torch.float32 else 3e-2
    torch.testing.assert_close(slots.float().sum(1), reduced.float(), rtol=0, atol=tolerance)


def test_batch_invariant_bits_with_threads() -> None:
    case = replace(INVARIANT, num_tokens=60)
    inputs = make_inputs(case, torch.bfloat16)
    torch.set_num_threads(2)
    try:
        together = call(case, inputs, batch_invariant=True)
        alone = call(case, take(inputs, [40]), batch_invariant=True)
    finally:
        torch.set_num_threads(1)
    assert torch.equal(alone[0], together[40])


# ---------------------------------------------------------------- route


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", ROUTE_CASES, ids=lambda c: c.name)
def test_route(case: RouteCase, dtype: torch.dtype) -> None:
    logits, bias = make_logits(case, dtype)
    arguments = {"e_score_correction_bias": bias, **route_options(case)}
    weights, ids = tilewise.route(logits, case.top_k, **arguments)  # type: ignore[arg-type]
    expected, expected_ids = reference.route(logits, case.top_k, **arguments)  # type: ignore
    assert torch.equal(ids, expected_ids) and torch.equal(weights, expected)
    assert ids.dtype is torch.int32 and weights.dtype is torch.float32
    assert weights.isfinite().all()
    if ids.numel():
        assert ids.min() >= 0 and ids.max() < case.num_experts
        assert all(len(set(row)) == case.top_k for row in ids.tolist())


def test_route_takes_any_strides() -> None:
    logits = torch.randn(12, 9).t()
    weights, ids = tilewise.route(logits, 3)
    expected, expected_ids = tilewise.route(logits.contiguous(), 3)
    assert torch.equal(ids, expected_ids) and torch.equal(weights, expected)
    assert weights.is_contiguous() and ids.is_contiguous()


# ---------------------------------------------------------------- plan


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_plan(case: Case) -> None:
    inputs = make_inputs(case, torch.float32)
    local = inputs.weights.num_local_experts
    ragged = tilewise.plan(
        inputs.topk_ids, case.num_experts, expert_map=inputs.expert_map, num_local_experts=local
    )
    sizes, offsets, gather, scatter = reference.plan(
        inputs.topk_ids, case.num_experts, expert_map=inputs.expert_map, num_local_experts=local
    )
    rows = int(offsets[-1])
    assert torch.equal(ragged.sizes, sizes) and torch.equal(ragged.offsets, offsets)
    assert torch.equal(ragged.gather[:rows], gather[:rows])
    assert torch.equal(ragged.scatter, scatter)
    assert all(t.dtype is torch.int32 for t in (ragged.sizes, ragged.offsets, ragged.gather))
    assert ragged.max_rows == inputs.topk_ids.numel() and ragged.num_segments == local


def test_plan_by_hand() -> None:
    ids = torch.tensor([[2, 0], [2, -1], [0, 9]])
    ragged = tilewise.plan(ids, 3)
    assert ragged.sizes.tolist() == [2, 0, 2]
    assert ragged.offsets.tolist() == [0, 2, 2, 4]
    assert ragged.gather[:4].tolist() == [1, 4, 0, 2]
    assert ragged.scatter.tolist() == [2, 0, 3, -1, 1, -1]


def test_plan_with_a_map_by_hand() -> None:
    ids = torch.tensor([[3, 0], [1, 3]])
    mapping = torch.tensor([1, -1, -1, 0], dtype=torch.int32)
    ragged = tilewise.plan(ids.t(), 4, expert_map=mapping, num_local_experts=2)
    # Read by rows of the transpose: 3, 1, 0, 3.
    assert ragged.sizes.tolist() == [2, 1]
    assert ragged.gather[:3].tolist() == [0, 3, 2]
    assert ragged.scatter.tolist() == [0, -1, 2, 1]


# ---------------------------------------------------------------- the whole layer


def test_fused_moe_is_the_sum_of_its_parts() -> None:
    case = replace(BY_NAME["tokens_7"], num_experts=8, top_k=3)
    inputs = make_inputs(case, torch.float32)
    router = torch.randn(8, case.hidden_size)
    shared = torch.nn.Linear(case.hidden_size, case.hidden_size)
    torch.nn.init.normal_(shared.weight), torch.nn.init.normal_(shared.bias)
    x = inputs.hidden_states
    with torch.no_grad():
        actual = tilewise.fused_moe(
            x, router, inputs.weights, 3, scoring_func="sigmoid", num_expert_group=4, topk_group=2,
            routed_scaling_factor=2.5, shared_experts=shared,
        )  # fmt: skip
        weights, ids = reference.route(
            x @ router.T, 3, scoring_func="sigmoid", num_expert_group=4, topk_group=2,
            routed_scaling_factor=2.5,
        )  # fmt: skip
        expected = reference.fused_experts(x, inputs.weights, weights, ids) + shared(x)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["swiglu", "relu2"])
def test_modules(kind: str) -> None:
    activation = tilewise.Activation(kind)
    shape = tilewise.MoEShape(5, 2, 24, 12)
    moe = tilewise.FusedMoE(shape, activation=activation, dtype=torch.float32)
    x = torch.randn(2, 3, 24)
    actual = moe(x)
    flat = x.view(6, 24)
    weights, ids = reference.route(flat @ moe.router_weight.T, 2)
    expected = reference.fused_experts(flat, moe.weights, weights, ids, activation=activation)
    torch.testing.assert_close(actual, expected.view(2, 3, 24), rtol=1e-4, atol=1e-5)
    experts = tilewise.FusedExperts(shape, activation=activation, dtype=torch.float32)
    experts.load_state_dict({k: v for k, v in moe.state_dict().items() if k != "router_weight"})
    torch.testing.assert_close(experts(flat, weights, ids), expected, rtol=1e-4, atol=1e-5)
