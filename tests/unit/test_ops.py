"""The registered operators: schemas, fakes, compilation and autograd."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import tilewise
from tests.cases import CASES, ROUTE_CASES, Case, RouteCase, make_inputs, make_logits
from tilewise import Activation, ExpertWeights

CASES_BY_NAME = {case.name: case for case in CASES}
ROUTES_BY_NAME = {case.name: case for case in ROUTE_CASES}


@pytest.fixture(autouse=True)
def _seeded_and_poisoned() -> Iterator[None]:
    """In place of the usual one: compilers would trace what fills fresh memory with NaN."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Threads that wait for each other take longer than products as small as these."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def experts_args(case: Case, dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
    x = make_inputs(case, dtype)
    w, a = x.weights, case.activation
    return (
        x.hidden_states, w.gate, w.up, w.down, w.gate_bias, w.up_bias, w.down_bias,
        *[None] * 6, "dense", x.topk_weights, x.topk_ids, x.expert_map,
        a.kind, a.alpha, a.beta, a.limit,
        case.apply_router_weight_on_input, case.reduce, False, "",
    )  # fmt: skip


def route_args(case: RouteCase) -> tuple[Any, ...]:
    logits, bias = make_logits(case)
    return (
        logits, case.top_k, case.scoring_func, case.renormalize, bias,
        case.num_expert_group or 0, case.topk_group or 0, case.routed_scaling_factor,
    )  # fmt: skip


# ---------------------------------------------------------------- schemas and fakes


@pytest.mark.parametrize("name", ["tokens_7", "tokens_0", "deepseek_v3", "top_all", "topk_softmax"])
def test_opcheck_route(name: str) -> None:
    torch.library.opcheck(torch.ops.tilewise.route, route_args(ROUTES_BY_NAME[name]))


def test_opcheck_route_of_strided_logits() -> None:
    args = (torch.randn(9, 5).t(), 9, "softmax", True, None, 0, 0, 1.0)
    torch.library.opcheck(torch.ops.tilewise.route, args)


@pytest.mark.parametrize("name", ["tokens_7", "tokens_0", "sentinel_ids", "map_half"])
def test_opcheck_plan(name: str) -> None:
    x = make_inputs(CASES_BY_NAME[name], torch.float32)
    args = (x.topk_ids, x.weights.num_local_experts, x.expert_map)
    torch.library.opcheck(torch.ops.tilewise.plan, args)


EXPERTS = [
    "tokens_7", "tokens_0", "gpt_oss", "activation_relu2", "strided_input", "map_half",
    "unreduced", "on_input", "weights_bf16",
]  # fmt: skip


@pytest.mark.parametrize("name", EXPERTS)
def test_opcheck_fused_experts(name: str) -> None:
    torch.library.opcheck(torch.ops.tilewise.fused_experts, experts_args(CASES_BY_NAME[name]))


@pytest.mark.parametrize("with_workspace", [False, True])
@pytest.mark.parametrize("name", ["tokens_7", "unreduced", "gpt_oss"])
def test_opcheck_fused_experts_out(name: str, with_workspace: bool) -> None:
    args = experts_args(CASES_BY_NAME[name], torch.bfloat16)
    out = torch.zeros_like(torch.ops.tilewise.fused_experts(*args))
    workspace = torch.zeros(2**16, dtype=torch.uint8) if with_workspace else None
    torch.library.opcheck(torch.ops.tilewise.fused_experts_out, (out, workspace, *args))


def test_schemas_tell_what_is_written() -> None:
    schema = torch.ops.tilewise.fused_experts_out.default._schema
    written = [a.name for a in schema.arguments if a.alias_info is not None]
    assert written == ["out", "workspace"]
    assert all(a.alias_info.is_write for a in schema.arguments if a.alias_info is not None)
    for op in ("route", "plan", "fused_experts"):
        assert not getattr(torch.ops.tilewise, op).default._schema.is_mutable


@pytest.mark.parametrize("name", EXPERTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_fake_has_the_results_form(name: str, dtype: torch.dtype) -> None:
    args = experts_args(CASES_BY_NAME[name], dtype)
    real = torch.ops.tilewise.fused_experts(*args)
    with torch._subclasses.FakeTensorMode() as mode:
        fake = torch.ops.tilewise.fused_experts(
            *(mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in args)
        )
    assert fake.shape == real.shape and fake.dtype is real.dtype is dtype
    assert fake.stride() == real.stride() and fake.device == real.device


def test_weight_formats_to_come_are_refused() -> None:
    args = list(experts_args(CASES_BY_NAME["tokens_7"]))
    args[args.index("dense")] = "mxfp4"
    message = r"weight_format='mxfp4' is not supported; allowed: 'dense'.*Dequantise"
    with pytest.raises(NotImplementedError, match=message):
        torch.ops.tilewise.fused_experts(*args)
    with pytest.raises(NotImplementedError, match=message):
        torch.ops.tilewise.fused_experts_out(args[0].clone(), None, *args)


# ---------------------------------------------------------------- torch.compile

HIDDEN, INTER, NUM_EXPERTS, TOP_K = 24, 16, 6, 2


def layer_tensors(dtype: torch.dtype = torch.float32) -> tuple[ExpertWeights, torch.Tensor]:
    weights = ExpertWeights.from_gate_up(
        torch.randn(NUM_EXPERTS, 2 * INTER, HIDDEN).to(dtype) / HIDDEN**0.5,
        torch.randn(NUM_EXPERTS, HIDDEN, INTER).to(dtype) / INTER**0.5,
    )
    return weights, torch.randn(NUM_EXPERTS, HIDDEN).to(dtype)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"scoring_func": "sigmoid", "num_expert_group": 3, "topk_group": 2,
         "routed_scaling_factor": 2.5,
         "e_score_correction_bias": torch.linspace(0, 1, NUM_EXPERTS)},
        {"activation": Activation("swiglu", 1.702, 1.0, 7.0), "batch_invariant": True},
        {"apply_router_weight_on_input": True, "renormalize": False},
    ],
    ids=["plain", "deepseek_v3", "gpt_oss", "llama4"],
)  # fmt: skip
def test_compiled_equals_eager(options: dict[str, Any]) -> None:
    weights, router = layer_tensors()

    def layer(x: torch.Tensor) -> torch.Tensor:
        return tilewise.fused_moe(x, router, weights, TOP_K, **options) + 1.0

    x = torch.randn(9, HIDDEN)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), layer(x))


def test_one_recompilation_serves_every_number_of_tokens() -> None:
    weights, router = layer_tensors(torch.bfloat16)

    def layer(x: torch.Tensor) -> torch.Tensor:
        return tilewise.fused_moe(x, router, weights, TOP_K)

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for num_tokens in (5, 9, 33, 128, 7, 250):
        x = torch.randn(num_tokens, HIDDEN, dtype=torch.bfloat16)
        assert torch.equal(compiled(x), layer(x)), num_tokens
    assert counter.frame_count == 2  # The first, and one for all others.


def test_dynamic_from_the_start_never_recompiles() -> None:
    weights, router = layer_tensors()

    def layer(x: torch.Tensor) -> torch.Tensor:
        return tilewise.fused_moe(x, router, weights, TOP_K)

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter, dynamic=True)
    frames = []
    for num_tokens in (5, 33, 128):
        x = torch.randn(num_tokens, HIDDEN)
        assert torch.equal(compiled(x), layer(x))
        frames.append(counter.frame_count)
    assert frames[0] == frames[1] == frames[2] > 0


def test_compiled_out_variant_writes_out() -> None:
    weights, router = layer_tensors()

    def layer(x: torch.Tensor, out: torch.Tensor, workspace: torch.Tensor) -> torch.Tensor:
        topk_weights, ids = tilewise.route(x @ router.T, TOP_K)
        return tilewise.fused_experts(x, weights, topk_weights, ids, out=out, workspace=workspace)

    x, workspace = torch.randn(9, HIDDEN), torch.zeros(2**16, dtype=torch.uint8)
    out, expected = torch.zeros_like(x), torch.zeros_like(x)
    layer(x, expected, workspace)
    result = torch.compile(layer, fullgraph=True, backend="aot_eager")(x, out, workspace)
    assert expected.any() and torch.equal(out, expected) and torch.equal(result, expected)


def test_compiled_module() -> None:
    moe = tilewise.FusedMoE(tilewise.MoEShape(NUM_EXPERTS, TOP_K, HIDDEN, INTER))
    x = torch.randn(2, 7, HIDDEN, dtype=torch.bfloat16)
    compiled = torch.compile(moe, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), moe(x))


def test_compiled_plan() -> None:
    ids = torch.randint(-1, 7, (11, 2))
    compiled = torch.compile(
        lambda t: tilewise.plan(t, 6).scatter, fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(compiled(ids), tilewise.plan(ids, 6).scatter)


# ---------------------------------------------------------------- autograd

NO_BACKWARD = r"no backward pass: it runs inference\. Wrap the call in torch\.no_grad\(\)"


def test_backward_of_experts_says_no() -> None:
    weights, router = layer_tensors()
    x = torch.randn(5, HIDDEN, requires_grad=True)
    topk_weights, ids = tilewise.route(x.detach() @ router.T, TOP_K)
    output = tilewise.fused_experts(x, weights, topk_weights, ids)
    with torch.no_grad():
        assert torch.equal(output, tilewise.fused_experts(x, weights, topk_weights, ids))
    assert output.requires_grad
    with pytest.raises(NotImplementedError, match=NO_BACKWARD):
        output.sum().backward()


def test_backward_of_trainable_weights_says_no() -> None:
    weights, router = layer_tensors()
    weights.down.requires_grad_()
    output = tilewise.fused_moe(torch.randn(5, HIDDEN), router, weights, TOP_K)
    with pytest.raises(NotImplementedError, match=NO_BACKWARD):
        output.sum().backward()


def test_backward_of_route_says_no() -> None:
    logits = torch.randn(5, NUM_EXPERTS, requires_grad=True)
    weights, ids = tilewise.route(logits, TOP_K)
    assert weights.requires_grad and not ids.requires_grad
    with pytest.raises(NotImplementedError, match=NO_BACKWARD):
        weights.sum().backward()


REQUIRES_GRAD = ["hidden_states", "topk_weights", "gate", "up", "down"]


@pytest.mark.parametrize("name", REQUIRES_GRAD)
def test_out_refuses_what_requires_grad(name: str) -> None:
    weights, router = layer_tensors()
    x, out = torch.randn(5, HIDDEN), torch.zeros(5, HIDDEN)
    topk_weights, ids = tilewise.route(x @ router.T, TOP_K)
    tensors = {"hidden_states": x, "topk_weights": topk_weights}
    if name in tensors:
        tensors[name].requires_grad_()
    else:
        tensor = getattr(weights, name).detach().clone().requires_grad_()
        weights = replace(weights, **{name: tensor})
    with pytest.raises(NotImplementedError, match=rf"{name} requires grad.*torch\.no_grad\(\)"):
        tilewise.fused_experts(x, weights, topk_weights, ids, out=out)
    assert not out.any()
    with torch.no_grad():
        tilewise.fused_experts(x, weights, topk_weights, ids, out=out)
        assert torch.equal(out, tilewise.fused_experts(x, weights, topk_weights, ids))
    assert out.any() and not out.requires_grad


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_modes_without_autograd(mode: Any) -> None:
    moe = tilewise.FusedMoE(
        tilewise.MoEShape(NUM_EXPERTS, TOP_K, HIDDEN, INTER), dtype=torch.float32
    )
    for parameter in moe.parameters():
        parameter.requires_grad_()
    x = torch.randn(5, HIDDEN)
    expected = moe(x)
    assert expected.requires_grad
    with mode():
        output = moe(x)
        out = torch.zeros_like(x)
        weights, ids = tilewise.route(x @ moe.router_weight.T, TOP_K)
        tilewise.fused_experts(x, moe.weights, weights, ids, out=out)
    assert not output.requires_grad
    assert torch.equal(output, expected.detach()) and torch.equal(out, expected.detach())
