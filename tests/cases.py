"""The one list of shapes, dtypes, routings and edge cases, run by every implementation's tests."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from tilewise.moe import reference
from tilewise.moe.activation import (
    GEGLU,
    GEGLU_TANH,
    GELU,
    GELU_TANH,
    REGLU2,
    RELU2,
    SILU,
    SWIGLU,
    SWIGLU_OAI,
    Activation,
)
from tilewise.moe.schedule import LayerProblem
from tilewise.moe.weights import ExpertWeights

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Case:
    """One call of the layer. `routing` and `layout` are named in `make_ids` and `make_weights`."""

    name: str
    num_tokens: int = 7
    num_experts: int = 7
    top_k: int = 2
    hidden_size: int = 48
    intermediate_size: int = 32
    routing: str = "uniform"
    activation: Activation = SWIGLU
    layout: str = "gate_up"
    bias: bool = False
    expert_map: str | None = None
    fp32_bias: bool = False
    strided_input: bool = False
    strided_routing: bool = False
    nan_where_skipped: bool = False
    ids_dtype: torch.dtype = torch.int32
    weights_dtype: torch.dtype = torch.float32
    apply_router_weight_on_input: bool = False
    reduce: bool = True


def layer_problem(num_tokens: int, sizes: Sequence[int], **changes: Any) -> LayerProblem:
    """A call in 16 bits of (experts, top_k, hidden, intermediate), gated, that suits descriptors.

    Experts may be fewer than `top_k`, as on a device that holds a few of them.
    """
    experts, top_k, hidden, inter = sizes
    made = LayerProblem(num_tokens, top_k, experts, hidden, inter, 2, True, True)
    return replace(made, **changes)


@dataclass(frozen=True)
class Inputs:
    """The tensors of a case; `expert_map` is None where a call passes none."""

    hidden_states: torch.Tensor
    weights: ExpertWeights
    topk_weights: torch.Tensor
    topk_ids: torch.Tensor
    expert_map: torch.Tensor | None


_ACTIVATIONS = {
    "geglu": GEGLU,
    "geglu_tanh": GEGLU_TANH,
    "reglu2": REGLU2,
    "silu": SILU,
    "gelu": GELU,
    "gelu_tanh": GELU_TANH,
    "relu2": RELU2,
    "gpt_oss": SWIGLU_OAI,
    # Inputs are of unit size: this limit clamps about a third of them.
    "swiglu_limit": Activation("swiglu", limit=0.5),
    "gpt_oss_limit": Activation("swiglu", alpha=1.702, beta=1.0, limit=0.5),
    "geglu_beta_limit": Activation("geglu", beta=0.5, limit=0.5),
    "silu_alpha_limit": Activation("silu", alpha=1.702, limit=0.5),
    "relu2_limit": Activation("relu2", limit=0.5),
}

CASES: tuple[Case, ...] = (
    *(Case(f"tokens_{n}", num_tokens=n) for n in (0, 1, 2, 7, 63, 129)),
    Case("tokens_0_unreduced", num_tokens=0, reduce=False),
    Case("zipf", num_tokens=33, num_experts=16, routing="zipf"),
    Case("one_expert", num_tokens=33, routing="one_expert"),
    Case("one_expert_is_last", num_tokens=17, routing="last_expert"),
    Case("empty_experts", num_tokens=20, num_experts=60, routing="hot"),
    Case("duplicate_ids", num_tokens=9, routing="duplicates"),
    Case("sentinel_ids", num_tokens=21, routing="sentinels", ids_dtype=torch.int64),
    Case("all_sentinels", num_tokens=5, routing="all_sentinels"),
    Case("sentinels_few_tokens", num_tokens=2, routing="sentinels"),
    Case("sentinels_nan", num_tokens=13, routing="sentinels", nan_where_skipped=True),
    Case("sentinels_nan_decode", num_tokens=2, routing="sentinels", nan_where_skipped=True),
    *(Case(f"experts_{e}", num_experts=e, top_k=min(2, e)) for e in (1, 60, 256)),
    Case("experts_1024", num_tokens=3, num_experts=1024, hidden_size=16, intermediate_size=16),
    Case("experts_1536", num_tokens=2, num_experts=1536, hidden_size=16, intermediate_size=16),
    Case("experts_1536_grouped", num_tokens=3, num_experts=1536, hidden_size=16,
         intermediate_size=16, layout="split"),
    Case("top_1", top_k=1, num_tokens=19),
    Case("top_all", num_experts=9, top_k=9),
    Case("top_all_60", num_tokens=3, num_experts=60, top_k=60, hidden_size=16,
         intermediate_size=16),
    Case("sizes_40_24", hidden_size=40, intermediate_size=24, num_tokens=9),
    Case("sizes_37_19", hidden_size=37, intermediate_size=19, num_tokens=9),
    Case("sizes_37_19_decode", hidden_size=37, intermediate_size=19, num_tokens=1),
    Case("sizes_1_1", hidden_size=1, intermediate_size=1, num_tokens=65),
    Case("sizes_129_65", hidden_size=129, intermediate_size=65, num_tokens=5, bias=True),
    *(
        Case(f"layout_{name}", layout=name, num_tokens=9, bias=name != "strided")
        for name in ("up_gate", "interleaved", "transposed", "transposed_interleaved", "split",
                     "strided")
    ),
    Case("interleaved_decode", layout="transposed_interleaved", num_tokens=2, bias=True),
    *(Case(f"activation_{n}", activation=a, num_tokens=9) for n, a in _ACTIVATIONS.items()),
    *(
        Case(f"activation_{n}_decode", activation=_ACTIVATIONS[n], num_tokens=2, bias=True)
        for n in ("gpt_oss", "gelu", "relu2_limit", "geglu")
    ),
    Case("gpt_oss", activation=SWIGLU_OAI, layout="transposed_interleaved", bias=True,
         num_tokens=11),
    Case("ungated_bias", activation=RELU2, bias=True, num_tokens=11),
    Case("strided_input", strided_input=True, num_tokens=9),
    Case("strided_input_decode", strided_input=True, num_tokens=1),
    Case("strided_routing", strided_routing=True, num_tokens=9),
    Case("strided_routing_decode", strided_routing=True, num_tokens=2, ids_dtype=torch.int64),
    Case("fp32_bias", bias=True, fp32_bias=True, num_tokens=9),
    Case("fp32_bias_decode", bias=True, fp32_bias=True, num_tokens=2),
    Case("weights_bf16", weights_dtype=torch.bfloat16, ids_dtype=torch.int64, num_tokens=9),
    Case("weights_bf16_decode", weights_dtype=torch.bfloat16, ids_dtype=torch.int64, num_tokens=1),
    Case("map_half", expert_map="half", num_tokens=13),
    Case("map_half_decode", expert_map="half", num_tokens=2),
    Case("map_permuted", expert_map="permuted", num_tokens=13, bias=True),
    Case("map_none_here", expert_map="none_here", num_tokens=5),
    Case("map_with_sentinels", expert_map="half", routing="sentinels", num_tokens=13),
    Case("map_nan", expert_map="half", num_tokens=13, nan_where_skipped=True),
    Case("on_input_nan", apply_router_weight_on_input=True, num_tokens=9, routing="sentinels",
         nan_where_skipped=True),
    Case("on_input", apply_router_weight_on_input=True, num_tokens=9, bias=True),
    Case("on_input_decode", apply_router_weight_on_input=True, num_tokens=1, top_k=1, bias=True),
    Case("unreduced", reduce=False, num_tokens=9),
    Case("unreduced_one_token", reduce=False, num_tokens=1),
    Case("unreduced_sentinels", reduce=False, routing="sentinels", num_tokens=9),
    Case("unreduced_nan", reduce=False, expert_map="half", num_tokens=9, nan_where_skipped=True),
    Case("unreduced_on_input", reduce=False, apply_router_weight_on_input=True, num_tokens=9),
)  # fmt: skip

# Shapes for real machines, too large for the interpreter.
LARGE_CASES: tuple[Case, ...] = (
    Case("qwen3_1", 1, 128, 8, 2048, 768),
    Case("qwen3_2", 2, 128, 8, 2048, 768),
    Case("qwen3_33", 33, 128, 8, 2048, 768),
    Case("qwen3_300", 300, 128, 8, 2048, 768, routing="zipf"),
    Case("qwen3_hot_128", 128, 128, 8, 2048, 768, routing="hot"),
    Case("qwen3_tp8_77", 77, 128, 8, 4096, 192),
    Case("deepseek_64", 64, 256, 8, 7168, 2048),
    Case("gpt_oss_40", 40, 128, 4, 2880, 2880, activation=SWIGLU_OAI, bias=True,
         layout="transposed_interleaved"),
    Case("mixtral_500", 500, 8, 2, 4096, 14336),
    Case("mixtral_2048", 2048, 8, 2, 4096, 14336),  # Its rows are copied in expert order first.
    Case("mixtral_2100", 2100, 8, 2, 4096, 1792, routing="zipf"),
    Case("one_expert_3000", 3000, 64, 4, 1024, 512, routing="one_expert"),
    Case("odd_sizes", 700, 60, 4, 1411, 709, bias=True),
    Case("experts_1536", 200, 1536, 8, 256, 128),
)  # fmt: skip


def make_ids(case: Case, device: torch.device | str, generator: torch.Generator) -> torch.Tensor:
    """topk_ids [num_tokens, top_k], distinct within a token unless the routing says otherwise."""
    t, e, k = case.num_tokens, case.num_experts, case.top_k
    score = torch.rand(t, e, generator=generator, device=device)
    if case.routing == "zipf":
        score = score.log() * torch.arange(1, e + 1, device=device).pow(1.2)
    elif case.routing == "hot":
        score = torch.rand(1, e, generator=generator, device=device).expand(t, e)
    ids = score.topk(k, dim=-1).indices
    if case.routing in ("one_expert", "last_expert"):
        ids = torch.full_like(ids, 0 if case.routing == "one_expert" else e - 1)
    elif case.routing == "duplicates":
        ids[:, 1:] = ids[:, :1]
    elif case.routing == "sentinels":
        drop = torch.rand(t, k, generator=generator, device=device) < 0.4
        # As int32 the last of these would be a valid id.
        huge = 2**31 - 1 if case.ids_dtype is torch.int32 else 2**40 + 1
        bad = torch.tensor([-1, e, e + 5, -7, huge], device=device)
        pick = torch.randint(len(bad), (t, k), generator=generator, device=device)
        ids = torch.where(drop, bad[pick], ids)
        ids[:1] = -1
    elif case.routing == "all_sentinels":
        ids = torch.full_like(ids, -1)
    elif case.routing not in ("uniform", "zipf", "hot"):
        raise ValueError(case.routing)
    return ids.to(case.ids_dtype)


def make_weights(
    case: Case, num_experts: int, dtype: torch.dtype, device: torch.device | str,
    generator: torch.Generator,
) -> ExpertWeights:  # fmt: skip
    """Random experts in a case's layout; products of unit inputs come out of unit size."""
    e, h, i = num_experts, case.hidden_size, case.intermediate_size

    def random(*shape: int, scale: float = 1.0) -> torch.Tensor:
        # A huge fp32 draw in one piece would not fit beside the weights it becomes.
        out = torch.empty(shape, dtype=dtype, device=device)
        for part in out.split(max(1, 2**28 // max(1, out[0].numel()))) if e else ():
            part.copy_(torch.randn(part.shape, generator=generator, device=device) * scale)
        return out

    def random_bias(width: int) -> torch.Tensor | None:
        if not case.bias:
            return None
        bias = torch.randn(e, width, generator=generator, device=device) * 0.3
        return bias if case.fp32_bias else bias.to(dtype)

    bias_down = random_bias(h)
    if not case.activation.is_gated:
        up, down = random(e, i, h, scale=h**-0.5), random(e, h, i, scale=i**-0.5)
        return ExpertWeights.from_ungated(up, down, up_bias=random_bias(i), down_bias=bias_down)
    bias = random_bias(2 * i)
    if case.layout.startswith("transposed"):
        return ExpertWeights.from_gate_up(
            random(e, h, 2 * i, scale=h**-0.5), random(e, i, h, scale=i**-0.5), transposed=True,
            layout="interleaved" if case.layout.endswith("interleaved") else "gate_up",
            gate_up_bias=bias, down_bias=bias_down,
        )  # fmt: skip
    if case.layout == "split":
        gate, up = (random(e, i, h, scale=h**-0.5) for _ in range(2))
        b = (None, None) if bias is None else (bias[:, :i].clone(), bias[:, i:].clone())
        return ExpertWeights(gate, up, random(e, h, i, scale=i**-0.5), b[0], b[1], bias_down)
    if case.layout == "strided":
        # Three different strides, as pages of larger tensors, with NaN all around.
        gate = random(e, 2 * i, h, scale=h**-0.5)
        up = random(e, i, h + 3, scale=h**-0.5)
        down = random(h, e, i + 1, scale=i**-0.5)
        gate[:, 1::2] = up[:, :, :3] = down[:, :, -1:] = torch.nan
        return ExpertWeights(gate[:, ::2], up[:, :, 3:], down[:, :, :-1].transpose(0, 1))
    return ExpertWeights.from_gate_up(
        random(e, 2 * i, h, scale=h**-0.5), random(e, h, i, scale=i**-0.5), layout=case.layout,
        gate_up_bias=bias, down_bias=bias_down,
    )  # fmt: skip


def make_inputs(
    case: Case, dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0
) -> Inputs:
    """Fresh random tensors for a case."""
    generator = torch.Generator(device=device).manual_seed(seed)
    ids = make_ids(case, device, generator)
    topk_weights = torch.rand(ids.shape, generator=generator, device=device).to(case.weights_dtype)
    num_local, expert_map = case.num_experts, None
    if case.expert_map is not None:
        expert_map = torch.full((case.num_experts,), -1, dtype=torch.int32, device=device)
        if case.expert_map == "half":
            num_local = (case.num_experts + 1) // 2
            expert_map[::2] = torch.arange(num_local, dtype=torch.int32, device=device)
        elif case.expert_map == "permuted":
            order = torch.randperm(case.num_experts, generator=generator, device=device)
            expert_map[:] = order.to(torch.int32)
        elif case.expert_map != "none_here":
            raise ValueError(case.expert_map)
    hidden = torch.randn(case.num_tokens, case.hidden_size, generator=generator, device=device).to(
        dtype
    )
    if case.strided_input:
        # Rows of a wider tensor, and elements that are not neighbours.
        hidden = _spread(hidden, torch.nan)
    if case.strided_routing:
        topk_weights, ids = _spread(topk_weights, torch.nan), _spread(ids, 0)
    weights = make_weights(case, num_local, dtype, device, generator)
    inputs = Inputs(hidden, weights, topk_weights, ids, expert_map)
    if case.nan_where_skipped:
        skipped = local_experts(inputs) < 0
        topk_weights[skipped] = torch.nan
        hidden[skipped.all(1)] = torch.nan
    return inputs


def _spread(rows: torch.Tensor, filler: float) -> torch.Tensor:
    """The same values as every second element of wider rows."""
    wide = rows.new_full((rows.shape[0], 2 * rows.shape[1] + 4), filler)
    view = wide[:, 1 : 2 * rows.shape[1] : 2]
    view.copy_(rows)
    return view


def local_experts(inputs: Inputs) -> torch.Tensor:
    """int64 [num_tokens, top_k]: local expert of each assignment, -1 where it is to be skipped."""
    ids, expert_map = inputs.topk_ids.long(), inputs.expert_map
    num_experts = inputs.weights.num_local_experts if expert_map is None else len(expert_map)
    ids = torch.where((ids >= 0) & (ids < num_experts), ids, -1)
    return ids if expert_map is None else torch.where(ids < 0, -1, expert_map.long()[ids.clamp(0)])


def options(case: Case) -> dict[str, object]:
    """Keyword arguments that a case passes to `fused_experts` besides its tensors."""
    return {
        "activation": case.activation,
        "apply_router_weight_on_input": case.apply_router_weight_on_input,
        "reduce": case.reduce,
    }


def plain_torch_experts(case: Case, inputs: Inputs) -> torch.Tensor:
    """What a user would write in the inputs' own dtype, rounding after every operation."""
    x, w = inputs.hidden_states, inputs.weights
    dtype = x.dtype
    slots = torch.zeros(
        (case.num_tokens, case.top_k, case.hidden_size), dtype=dtype, device=x.device
    )
    local = local_experts(inputs)
    for expert in local.unique().tolist():
        if expert < 0:
            continue
        token, slot = (local == expert).nonzero(as_tuple=True)
        weight = inputs.topk_weights[token, slot, None].to(dtype)
        h = x[token]
        if case.apply_router_weight_on_input:
            h = h * weight
        up = h @ w.up[expert].T
        if w.up_bias is not None:
            up = up + w.up_bias[expert].to(dtype)
        gate = None
        if w.gate is not None:
            gate = h @ w.gate[expert].T
            if w.gate_bias is not None:
                gate = gate + w.gate_bias[expert].to(dtype)
        act = case.activation.apply(gate, up).to(dtype)
        row = act @ w.down[expert].T
        if w.down_bias is not None:
            row = row + w.down_bias[expert].to(dtype)
        slots[token, slot] = row if case.apply_router_weight_on_input else row * weight
    return slots.sum(1) if case.reduce else slots


def fp32_experts(case: Case, inputs: Inputs) -> torch.Tensor:
    """`reference.fused_experts` for large inputs on any device: batched by expert."""
    w = inputs.weights
    experts = range(w.num_local_experts)
    out = torch.zeros(
        (case.num_tokens, case.top_k, case.hidden_size), device=inputs.hidden_states.device
    )
    for expert in experts:  # One expert in fp32 at a time: all of them would not fit.
        token, slot = (inputs.topk_ids == expert).nonzero(as_tuple=True)
        if len(token) == 0:
            continue
        one = ExpertWeights(*(
            None if t is None else t[expert : expert + 1].float()
            for t in (w.gate, w.up, w.down, w.gate_bias, w.up_bias, w.down_bias)
        ))  # type: ignore[arg-type]  # fmt: skip
        sub = replace(case, num_tokens=len(token), top_k=1, reduce=False)
        part = Inputs(
            inputs.hidden_states[token].float(),
            one,
            inputs.topk_weights[token, slot, None].float(),
            torch.zeros((len(token), 1), dtype=torch.int32, device=token.device),
            None,
        )
        out[token, slot] = plain_torch_experts(sub, part)[:, 0]
    return out.sum(1) if case.reduce else out


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative L2 error; infinite if `actual` holds anything but numbers."""
    if not torch.isfinite(actual).all():
        return float("inf")
    difference = (actual.float() - expected).norm()
    return float(difference / expected.norm().clamp_min(1e-12))


def assert_close_to_reference(
    actual: torch.Tensor, case: Case, inputs: Inputs, factor: float = 1.5
) -> None:
    """Error against fp32 at most 1.5 times that of plain torch in the same dtype (house rule 9)."""
    expected = reference.fused_experts(
        inputs.hidden_states, inputs.weights, inputs.topk_weights, inputs.topk_ids,
        expert_map=inputs.expert_map, **options(case),  # type: ignore[arg-type]
    )  # fmt: skip
    assert_within(actual, expected, plain_torch_experts(case, inputs), factor)


def assert_within(
    actual: torch.Tensor, expected: torch.Tensor, plain: torch.Tensor, factor: float = 1.5
) -> None:
    """See `assert_close_to_reference`. One wrong element fails too, in however large a tensor."""
    assert actual.shape == expected.shape
    assert actual.dtype == plain.dtype
    if expected.numel() == 0:
        return
    error = relative_error(actual, expected)
    allowed = factor * relative_error(plain, expected) + 2e-6
    assert math.isfinite(allowed), "the yardstick overflows: scale the inputs of this case"
    assert error <= allowed, f"relative error {error:.2e}, allowed {allowed:.2e}"
    difference = (actual.float() - expected).abs()
    largest = 3 * factor * (plain.float() - expected).abs().max() + 1e-5 * expected.abs().max()
    assert difference.max() <= largest, f"worst element {difference.max():.2e} > {largest:.2e}"
    skipped = (expected == 0).all(-1)
    assert not actual[skipped].any(), "a row without experts is not exactly 0"


# These bytes are NaN as any float, and huge as int32 or int64: not the -1 that means "skip" here.
_POISON = 0x7FC17FC17FC17FC1


def _poison(tensor: torch.Tensor) -> torch.Tensor:
    """Fills a tensor that owns all of its storage."""
    if tensor.device.type == "meta" or tensor.numel() == 0:
        return tensor
    size = tensor.element_size()
    with torch.no_grad():
        if tensor.is_floating_point() or tensor.is_complex():
            return tensor.fill_(torch.nan)
        if tensor.dtype is torch.bool:
            return tensor.fill_(True)
        if size == 1:
            pairs = torch.tensor([], dtype=torch.int16, device=tensor.device)
            pairs.set_(tensor.fill_(0x7F).untyped_storage())
            pairs.fill_(_POISON & 0xFFFF)
            return tensor
        return tensor.fill_(_POISON & ((1 << 8 * size) - 1))


@contextlib.contextmanager
def poisoned_empty() -> Iterator[None]:
    """Fresh memory holds NaN or a huge number in this context: what nobody writes shows."""
    names = [(torch, "empty"), (torch, "empty_like"), (torch, "empty_strided"),
             (torch, "empty_permuted"), (torch.Tensor, "new_empty"),
             (torch.Tensor, "new_empty_strided")]  # fmt: skip
    originals = [(owner, name, getattr(owner, name)) for owner, name in names]

    def poison(make):  # type: ignore[no-untyped-def]
        def wrapper(*args, **kwargs):  # type: ignore[no-untyped-def]
            return _poison(make(*args, **kwargs))

        return wrapper

    try:
        for owner, name, original in originals:
            setattr(owner, name, poison(original))
        yield
    finally:
        for owner, name, original in originals:
            setattr(owner, name, original)


@dataclass(frozen=True)
class RouteCase:
    """One call of `route`; `logits` names how they are made in `make_logits`."""

    name: str
    num_tokens: int = 7
    num_experts: int = 60
    top_k: int = 4
    scoring_func: str = "softmax"
    renormalize: bool = True
    bias: bool = False
    num_expert_group: int | None = None
    topk_group: int | None = None
    routed_scaling_factor: float = 1.0
    logits: str = "normal"


ROUTE_CASES: tuple[RouteCase, ...] = (
    *(RouteCase(f"tokens_{n}", num_tokens=n) for n in (0, 1, 7, 129)),
    RouteCase("tokens_0_grouped", num_tokens=0, num_expert_group=4, topk_group=2),
    *(RouteCase(f"experts_{e}", num_experts=e, top_k=min(8, e), num_tokens=3)
      for e in (1, 7, 160, 256, 1024, 1536)),
    RouteCase("top_1", top_k=1),
    RouteCase("top_all", num_experts=9, top_k=9),
    RouteCase("top_all_60", num_experts=60, top_k=60),
    RouteCase("plain", renormalize=False),
    RouteCase("topk_softmax", scoring_func="topk_softmax"),
    RouteCase("sigmoid", scoring_func="sigmoid"),
    RouteCase("llama4", scoring_func="sigmoid", renormalize=False, top_k=1, num_experts=16),
    RouteCase("scaled", routed_scaling_factor=2.5),
    RouteCase("deepseek_v2", num_experts=160, top_k=6, renormalize=False, num_expert_group=8,
              topk_group=3, routed_scaling_factor=16.0),
    RouteCase("deepseek_v3", num_experts=256, top_k=8, scoring_func="sigmoid", bias=True,
              num_expert_group=8, topk_group=4, routed_scaling_factor=2.5),
    RouteCase("bias_without_groups", scoring_func="sigmoid", bias=True, num_experts=128, top_k=8),
    RouteCase("softmax_bias", bias=True),
    RouteCase("topk_softmax_bias", bias=True, scoring_func="topk_softmax"),
    RouteCase("one_group", num_expert_group=1, topk_group=1),
    RouteCase("groups_of_one", num_experts=8, top_k=3, scoring_func="sigmoid", bias=True,
              num_expert_group=8, topk_group=4),
    *(
        RouteCase(f"{logits}_{scoring}", logits=logits, scoring_func=scoring, top_k=5)
        for logits in ("ties", "equal", "nan_some", "nan_all", "minus_inf", "all_minus_inf",
                       "plus_inf", "huge", "zeros_signed")
        for scoring in ("softmax", "sigmoid", "topk_softmax")
    ),
    RouteCase("nan_grouped", logits="nan_some", num_experts=64, top_k=8, scoring_func="sigmoid",
              bias=True, num_expert_group=8, topk_group=2),
    RouteCase("nan_all_grouped", logits="nan_all", num_experts=64, top_k=8, num_expert_group=8,
              topk_group=2),
    RouteCase("plus_inf_grouped", logits="plus_inf", num_experts=64, top_k=8, num_expert_group=8,
              topk_group=2),
    RouteCase("equal_grouped", logits="equal", num_experts=64, top_k=9, scoring_func="sigmoid",
              num_expert_group=8, topk_group=2),
    RouteCase("ties_biased", logits="ties", num_experts=64, top_k=8, scoring_func="sigmoid",
              bias=True, num_expert_group=8, topk_group=4),
    RouteCase("ties_grouped", logits="ties", num_experts=64, top_k=8, num_expert_group=8,
              topk_group=4),
)  # fmt: skip


def make_logits(
    case: RouteCase, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(router_logits, e_score_correction_bias or None)."""
    g = torch.Generator(device=device).manual_seed(1)
    shape = (case.num_tokens, case.num_experts)
    logits = torch.randn(shape, generator=g, device=device)
    coin = torch.rand(shape, generator=g, device=device) < 0.3
    if case.logits == "ties":
        logits = logits.round()
    elif case.logits == "equal":
        logits = torch.full_like(logits, 0.25)
    elif case.logits == "nan_some":
        logits[coin] = torch.nan
    elif case.logits == "nan_all":
        logits = torch.full_like(logits, torch.nan)
    elif case.logits == "minus_inf":
        logits[coin] = -torch.inf
    elif case.logits == "all_minus_inf":
        logits = torch.full_like(logits, -torch.inf)
    elif case.logits == "plus_inf":
        logits[coin] = torch.inf
    elif case.logits == "huge":
        logits = logits * 1e4
    elif case.logits == "zeros_signed":
        logits = torch.where(coin, -0.0, 0.0)
    bias = torch.randn(case.num_experts, generator=g, device=device) * 0.1 if case.bias else None
    return logits.to(dtype), bias


def route_options(case: RouteCase) -> dict[str, object]:
    """Keyword arguments that a case passes to `route` besides its tensors."""
    return {
        "scoring_func": case.scoring_func,
        "renormalize": case.renormalize,
        "num_expert_group": case.num_expert_group,
        "topk_group": case.topk_group,
        "routed_scaling_factor": case.routed_scaling_factor,
    }
