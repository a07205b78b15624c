"""The specification against transformers, plain Python, and examples done by hand."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.cases import (
    CASES,
    ROUTE_CASES,
    Case,
    RouteCase,
    assert_close_to_reference,
    local_experts,
    make_inputs,
    make_logits,
    options,
    plain_torch_experts,
    poisoned_empty,
    route_options,
)
from tilewise import ExpertWeights
from tilewise.moe import reference
from tilewise.moe.activation import SILU, SWIGLU, SWIGLU_OAI, Activation

FLOAT_MAX = torch.finfo(torch.float32).max


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Threads that wait for each other take longer than products as small as these."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# ---------------------------------------------------------------- route, against plain Python


def python_route(
    logits: list[float], case: RouteCase, bias: list[float] | None
) -> tuple[list[float], list[int]]:
    """One token in double precision, by sorting a list."""
    nan = [math.isnan(x) for x in logits]
    logits = [-math.inf if math.isnan(x) else min(x, FLOAT_MAX) for x in logits]

    def softmax(values: list[float]) -> list[float]:
        top = max(values)
        exps = [0.0 if v == -math.inf else math.exp(v - top) for v in values]
        return [x / (sum(exps) or 1.0) for x in exps]

    def sigmoid(x: float) -> float:
        return 1 / (1 + math.exp(-x)) if x > -700 else 0.0

    scores = [sigmoid(x) for x in logits] if case.scoring_func == "sigmoid" else softmax(logits)
    choice = logits
    if bias is not None:
        pairs = zip(scores, bias, nan, strict=True)
        choice = [-math.inf if n else s + b for s, b, n in pairs]
    experts = range(len(logits))
    allowed = set(experts)
    if case.num_expert_group is not None and case.topk_group is not None:
        size = len(logits) // case.num_expert_group
        groups = [range(g * size, (g + 1) * size) for g in range(case.num_expert_group)]
        best = 1 if bias is None else 2

        def strength(g: int) -> tuple[float, int]:
            return -sum(sorted((choice[e] for e in groups[g]), reverse=True)[:best]), g

        chosen = sorted(range(len(groups)), key=strength)[: case.topk_group]
        allowed = {e for g in chosen for e in groups[g]}
    ids = sorted(experts, key=lambda e: (e not in allowed, nan[e], -choice[e], e))[: case.top_k]
    if case.scoring_func == "topk_softmax":
        weights = softmax([logits[e] for e in ids])
    else:
        weights = [scores[e] for e in ids]
        if case.renormalize:
            weights = [w / (sum(weights) + 1e-20) for w in weights]
    return [w * case.routed_scaling_factor for w in weights], ids


@pytest.mark.parametrize("case", ROUTE_CASES, ids=lambda c: c.name)
def test_route_against_plain_python(case: RouteCase) -> None:
    logits, bias = make_logits(case)
    weights, ids = reference.route(
        logits, case.top_k, e_score_correction_bias=bias, **route_options(case)
    )
    assert weights.dtype is torch.float32 and ids.dtype is torch.int32
    assert weights.shape == ids.shape == (case.num_tokens, case.top_k)
    for token, row in enumerate(logits.tolist()):
        expected, expected_ids = python_route(row, case, None if bias is None else bias.tolist())
        assert ids[token].tolist() == expected_ids
        assert weights[token].tolist() == pytest.approx(expected, rel=1e-4, abs=1e-7)


# ---------------------------------------------------------------- route, by hand

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("logits", "ids", "weights"),
    [
        # Ties go to the lower index.
        ([1.0, 2.0, 2.0, 2.0], [1, 2], [0.5, 0.5]),
        ([-0.0, 0.0, -0.0, 0.0], [0, 1], [0.5, 0.5]),
        # exp(1) : exp(0).
        ([0.0, 1.0, -INF, -INF], [1, 0], [math.e / (math.e + 1), 1 / (math.e + 1)]),
        # NaN ranks below -inf; both weigh nothing.
        ([NAN, -INF, NAN, 3.0], [3, 1], [1.0, 0.0]),
        ([NAN, -INF, NAN, -INF], [1, 3], [0.0, 0.0]),
        ([NAN, NAN, NAN, -INF], [3, 0], [0.0, 0.0]),
        ([NAN, NAN, NAN, NAN], [0, 1], [0.0, 0.0]),
        # +inf is the largest number: it takes all, shared where there are two.
        ([0.0, INF, 1.0, -INF], [1, 2], [1.0, 0.0]),
        ([INF, 0.0, NAN, INF], [0, 3], [0.5, 0.5]),
        ([FLOAT_MAX, INF, 0.0, 0.0], [0, 1], [0.5, 0.5]),
    ],
)
@pytest.mark.parametrize("scoring_func", ["softmax", "topk_softmax"])
def test_route_rules(
    logits: list[float], ids: list[int], weights: list[float], scoring_func: str
) -> None:
    actual, actual_ids = reference.route(torch.tensor([logits]), 2, scoring_func=scoring_func)
    assert actual_ids.tolist() == [ids]
    assert actual[0].tolist() == pytest.approx(weights, abs=1e-6)


def test_route_sigmoid_by_hand() -> None:
    logits = torch.tensor([[0.0, math.log(3), -INF, NAN, INF]])
    weights, ids = reference.route(logits, 5, scoring_func="sigmoid", renormalize=False)
    assert ids.tolist() == [[4, 1, 0, 2, 3]]
    assert weights[0].tolist() == pytest.approx([1.0, 0.75, 0.5, 0.0, 0.0], abs=1e-6)
    weights, _ = reference.route(logits, 3, scoring_func="sigmoid", routed_scaling_factor=2.25)
    assert weights[0].tolist() == pytest.approx([1.0, 0.75, 0.5], abs=1e-6)


def test_logits_keep_apart_what_scores_round_together() -> None:
    # Both sigmoids are 1 in fp32: the choice must still see the larger logit.
    logits = torch.tensor([[30.0, 40.0, 0.0]])
    _, ids = reference.route(logits, 1, scoring_func="sigmoid")
    assert ids.tolist() == [[1]]


def test_bias_chooses_but_does_not_weigh() -> None:
    logits = torch.tensor([[0.0, 0.0, math.log(3), 0.0]])
    bias = torch.tensor([0.0, 0.5, 0.0, 1.0])
    weights, ids = reference.route(
        logits, 2, scoring_func="sigmoid", e_score_correction_bias=bias, renormalize=False
    )
    assert ids.tolist() == [[3, 1]]  # 1.5 and 1.0 against 0.75 and 0.5.
    assert weights.tolist() == [[0.5, 0.5]]


def test_an_infinite_bias_forces_or_forbids() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, NAN]])
    bias = torch.tensor([INF, 0.0, -INF, 0.0])
    options = {"scoring_func": "sigmoid", "e_score_correction_bias": bias}
    weights, ids = reference.route(logits, 2, **options)
    assert ids.tolist() == [[0, 1]] and weights.isfinite().all()
    # In a group beside NaN it makes no group of NaN, which would rank first.
    bias = torch.tensor([0.0, 0.0, INF, 0.0])
    options = {"scoring_func": "sigmoid", "num_expert_group": 2, "topk_group": 1}
    weights, ids = reference.route(logits, 2, e_score_correction_bias=bias, **options)
    assert ids.tolist() == [[1, 0]] and weights.isfinite().all()


def test_groups_by_best_expert_or_two_best_with_a_bias() -> None:
    # Group 0 has the best expert, group 1 the best pair.
    logits = torch.tensor([[3.0, -3.0, 2.0, 2.0]])
    options = {"scoring_func": "sigmoid", "num_expert_group": 2, "topk_group": 1}
    assert reference.route(logits, 2, **options)[1].tolist() == [[0, 1]]
    ids = reference.route(logits, 2, e_score_correction_bias=torch.zeros(4), **options)[1]
    assert ids.tolist() == [[2, 3]]


def test_the_worst_expert_of_an_open_group_beats_any_of_a_closed_one() -> None:
    logits = torch.tensor([[5.0, -60.0, 4.0, 3.0]])
    options = {"num_expert_group": 2, "topk_group": 1}
    assert reference.route(logits, 2, **options)[1].tolist() == [[0, 1]]
    # 9.99 - 8 against 0.98 + 0.95: the first group wins, worst expert and all.
    bias = torch.tensor([9.0, -8.0, 0.0, 0.0])
    ids = reference.route(
        logits, 2, scoring_func="sigmoid", e_score_correction_bias=bias, **options
    )[1]
    assert ids.tolist() == [[0, 1]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_route_computes_in_fp32(dtype: torch.dtype) -> None:
    logits = torch.randn(9, 30).to(dtype)
    weights, ids = reference.route(logits, 4)
    expected, expected_ids = reference.route(logits.float(), 4)
    assert torch.equal(weights, expected) and torch.equal(ids, expected_ids)


# ---------------------------------------------------------------- against transformers

TOKENS, EXPERTS, TOP_K, HIDDEN, INTER = 11, 8, 3, 24, 16


def build(family: str, class_name: str, **changes: Any) -> Any:
    """A module of transformers with tiny random weights."""
    transformers = pytest.importorskip("transformers", minversion="5.10")
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    config_name = {
        "qwen3_moe": "Qwen3MoeConfig", "mixtral": "MixtralConfig", "olmoe": "OlmoeConfig",
        "deepseek_v2": "DeepseekV2Config", "deepseek_v3": "DeepseekV3Config",
        "gpt_oss": "GptOssConfig", "llama4": "Llama4TextConfig",
    }[family]  # fmt: skip
    names = {
        "qwen3_moe": ("num_experts", "moe_intermediate_size"),
        "mixtral": ("num_local_experts", "intermediate_size"),
        "olmoe": ("num_experts", "intermediate_size"),
        "deepseek_v2": ("n_routed_experts", "moe_intermediate_size"),
        "deepseek_v3": ("n_routed_experts", "moe_intermediate_size"),
        "gpt_oss": ("num_local_experts", "intermediate_size"),
        "llama4": ("num_local_experts", "intermediate_size"),
    }[family]
    config = getattr(transformers, config_name)(**{
        names[0]: EXPERTS, names[1]: INTER, "hidden_size": HIDDEN, "num_hidden_layers": 1,
        "num_experts_per_tok": TOP_K, "num_attention_heads": 2, "num_key_value_heads": 2,
        **changes,
    })  # fmt: skip
    config._experts_implementation = "eager"
    built = getattr(module, class_name)(config).eval()
    generator = torch.Generator().manual_seed(5)
    for tensor in (*built.parameters(), *built.buffers()):
        scale = HIDDEN**-0.5 if tensor.dim() > 1 else 0.3
        tensor.data.copy_(torch.randn(tensor.shape, generator=generator) * scale)
    return built


def hidden(scale: float = 2.0) -> torch.Tensor:
    return torch.randn(TOKENS, HIDDEN, generator=torch.Generator().manual_seed(6)) * scale


def dense(weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """[T, E] weights, whatever the order of the slots."""
    out = torch.zeros(len(ids), EXPERTS)
    return out.scatter_(1, ids.long(), weights.float())


ROUTERS: list[tuple[str, str, dict[str, Any], dict[str, Any]]] = [
    ("qwen3_moe", "Qwen3MoeTopKRouter", {"norm_topk_prob": True}, {}),
    ("qwen3_moe", "Qwen3MoeTopKRouter", {"norm_topk_prob": False}, {"renormalize": False}),
    ("mixtral", "MixtralTopKRouter", {}, {}),
    ("olmoe", "OlmoeTopKRouter", {"norm_topk_prob": False}, {"renormalize": False}),
    ("olmoe", "OlmoeTopKRouter", {"norm_topk_prob": True}, {}),
    ("deepseek_v2", "DeepseekV2TopkRouter",
     {"topk_method": "greedy", "routed_scaling_factor": 1.5},
     {"renormalize": False, "routed_scaling_factor": 1.5}),
    ("deepseek_v2", "DeepseekV2TopkRouter",
     {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2,
      "routed_scaling_factor": 16.0},
     {"renormalize": False, "routed_scaling_factor": 16.0, "num_expert_group": 4,
      "topk_group": 2}),
    ("deepseek_v3", "DeepseekV3TopkRouter",
     {"n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5, "norm_topk_prob": True},
     {"scoring_func": "sigmoid", "routed_scaling_factor": 2.5, "num_expert_group": 4,
      "topk_group": 2}),
    ("deepseek_v3", "DeepseekV3TopkRouter",
     {"n_group": 2, "topk_group": 1, "routed_scaling_factor": 1.0, "norm_topk_prob": False},
     {"scoring_func": "sigmoid", "renormalize": False, "num_expert_group": 2, "topk_group": 1}),
    ("gpt_oss", "GptOssTopKRouter", {}, {"scoring_func": "topk_softmax"}),
]  # fmt: skip


@pytest.mark.parametrize(("family", "router", "config", "ours"), ROUTERS)
@torch.no_grad()
def test_routers(family: str, router: str, config: dict[str, Any], ours: dict[str, Any]) -> None:
    module = build(family, router, **config)
    x = hidden()
    logits, weights, ids = module(x)
    bias = getattr(module, "e_score_correction_bias", None)
    actual, actual_ids = reference.route(logits, TOP_K, e_score_correction_bias=bias, **ours)
    assert torch.equal(actual_ids.long().sort(-1).values, ids.sort(-1).values)
    torch.testing.assert_close(dense(actual, actual_ids), dense(weights, ids), rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_llama4_router() -> None:
    scores, logits = build("llama4", "Llama4Router", num_experts_per_tok=2)(hidden())
    weights, ids = reference.route(logits, 2, scoring_func="sigmoid", renormalize=False)
    torch.testing.assert_close(dense(weights, ids), scores, rtol=1e-5, atol=1e-6)


def random_routing() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    ids = torch.rand(TOKENS, EXPERTS, generator=generator).topk(TOP_K).indices
    return torch.rand(TOKENS, TOP_K, generator=generator), ids


@pytest.mark.parametrize(
    ("family", "experts"),
    [
        ("qwen3_moe", "Qwen3MoeExperts"),
        ("mixtral", "MixtralExperts"),
        ("olmoe", "OlmoeExperts"),
        ("deepseek_v2", "DeepseekV2Experts"),
        ("deepseek_v3", "DeepseekV3Experts"),
    ],
)
@torch.no_grad()
def test_experts(family: str, experts: str) -> None:
    module = build(family, experts)
    weights = ExpertWeights.from_gate_up(module.gate_up_proj, module.down_proj)
    topk_weights, ids = random_routing()
    actual = reference.fused_experts(hidden(), weights, topk_weights, ids, activation=SWIGLU)
    torch.testing.assert_close(actual, module(hidden(), ids, topk_weights), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_gpt_oss_experts() -> None:
    module = build("gpt_oss", "GptOssExperts")
    module.gate_up_proj.mul_(6.0)  # So that many gates and ups reach the limit of 7.
    weights = ExpertWeights.from_gate_up(
        module.gate_up_proj, module.down_proj, layout="interleaved", transposed=True,
        gate_up_bias=module.gate_up_proj_bias, down_bias=module.down_proj_bias,
    )  # fmt: skip
    topk_weights, ids = random_routing()
    actual = reference.fused_experts(hidden(), weights, topk_weights, ids, activation=SWIGLU_OAI)
    expected = module(hidden(), ids, topk_weights)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-4)
    free = reference.fused_experts(
        hidden(), weights, topk_weights, ids, activation=Activation("swiglu", 1.702, 1.0)
    )
    assert not torch.allclose(free, expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("top_k", [1, 2])
@torch.no_grad()
def test_llama4_layer(top_k: int) -> None:
    module = build("llama4", "Llama4TextMoe", num_experts_per_tok=top_k, intermediate_size_mlp=20)
    x = hidden()
    expected, logits = module(x)
    weights, ids = reference.route(logits, top_k, scoring_func="sigmoid", renormalize=False)
    experts = ExpertWeights.from_gate_up(
        module.experts.gate_up_proj, module.experts.down_proj, transposed=True
    )
    routed = reference.fused_experts(x, experts, weights, ids, apply_router_weight_on_input=True)
    torch.testing.assert_close(routed + module.shared_expert(x), expected, rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------- fused_experts and plan, by hand


def test_fused_experts_by_hand() -> None:
    # Expert e doubles (e = 0) or negates (e = 1) silu of the first element, onto the second one.
    up = torch.tensor([[[1.0, 0.0]], [[1.0, 0.0]]])
    down = torch.tensor([[[0.0], [2.0]], [[0.0], [-1.0]]])
    weights = ExpertWeights.from_ungated(up, down, down_bias=torch.tensor([[1.0, 0.0], [0.0, 4.0]]))
    x = torch.tensor([[1.0, 7.0], [2.0, 7.0]])
    ids = torch.tensor([[0, 1], [1, -1]])
    topk_weights = torch.tensor([[0.5, 0.25], [2.0, 3.0]])
    one, two = 1 / (1 + math.exp(-1)), 2 / (1 + math.exp(-2))
    slots = [[[0.5, one], [0.0, 0.25 * (4 - one)]], [[0.0, 2 * (4 - two)], [0.0, 0.0]]]
    actual = reference.fused_experts(x, weights, topk_weights, ids, activation=SILU, reduce=False)
    torch.testing.assert_close(actual, torch.tensor(slots))
    reduced = reference.fused_experts(x, weights, topk_weights, ids, activation=SILU)
    torch.testing.assert_close(reduced, torch.tensor(slots).sum(1))
    # The weight scales the input only: silu(0.5), and a bias that nothing scales.
    half = 0.5 / (1 + math.exp(-0.5))
    on_input = reference.fused_experts(
        x[:1], weights, topk_weights[:1, :1], ids[:1, :1], activation=SILU,
        apply_router_weight_on_input=True,
    )  # fmt: skip
    torch.testing.assert_close(on_input, torch.tensor([[1.0, 2 * half]]))


def test_expert_map_by_hand() -> None:
    # Global experts 0 and 3 live here, as local 1 and 0; local e multiplies by e + 1.
    up = torch.tensor([[[1.0]], [[1.0]]])
    down = torch.tensor([[[1.0]], [[2.0]]])
    weights = ExpertWeights.from_ungated(up, down)
    mapping = torch.tensor([1, -1, -1, 0], dtype=torch.int32)
    ids = torch.tensor([[0], [1], [3], [4], [-1]])
    actual = reference.fused_experts(
        torch.ones(5, 1), weights, torch.ones(5, 1), ids, activation=SILU, expert_map=mapping
    )
    silu = 1 / (1 + math.exp(-1))
    torch.testing.assert_close(actual[:, 0], torch.tensor([2 * silu, 0.0, silu, 0.0, 0.0]))


def test_plan_by_hand() -> None:
    ids = torch.tensor([[2], [0], [2], [-1], [0]])
    sizes, offsets, gather, scatter = reference.plan(ids, 3)
    assert sizes.tolist() == [2, 0, 2]
    assert offsets.tolist() == [0, 2, 2, 4]
    assert gather.tolist() == [1, 4, 0, 2, -1]
    assert scatter.tolist() == [2, 0, 3, -1, 1]


# The rest differ in size alone.
SMALL = [c for c in CASES if 0 < c.num_tokens * c.top_k <= 64]


@pytest.mark.parametrize("case", SMALL, ids=lambda c: c.name)
def test_fused_experts_against_batched_torch(case: Case) -> None:
    inputs = make_inputs(case, torch.float32)
    actual = reference.fused_experts(
        inputs.hidden_states, inputs.weights, inputs.topk_weights.float(), inputs.topk_ids,
        expert_map=inputs.expert_map, **options(case),
    )  # fmt: skip
    torch.testing.assert_close(actual, plain_torch_experts(case, inputs), rtol=1e-4, atol=1e-5)


# --------------------------------------------------------------- what the comparison itself catches


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_comparison_fails_where_it_should(dtype: torch.dtype) -> None:
    case = Case("comparison", num_tokens=129, routing="sentinels")
    inputs = make_inputs(case, dtype)
    good = plain_torch_experts(case, inputs)
    assert_close_to_reference(good, case, inputs)
    skipped = int((local_experts(inputs) < 0).all(1).nonzero()[0])
    largest = int(good.abs().argmax())
    spoiled = {
        "nan": (0, torch.nan), "inf": (0, torch.inf), "one element": (largest, 0.0),
        "a leak": (skipped * case.hidden_size, 1e-30),
    }  # fmt: skip
    for what, (index, value) in spoiled.items():
        bad = good.clone()
        bad.view(-1)[index] = value
        with pytest.raises(AssertionError):
            assert_close_to_reference(bad, case, inputs)
            pytest.fail(f"{what} went unnoticed")
    with pytest.raises(AssertionError):
        assert_close_to_reference(good.double(), case, inputs)


@pytest.mark.parametrize("field", ["gate", "up", "down", "gate_bias", "up_bias", "down_bias"])
def test_comparison_sees_every_tensor(field: str) -> None:
    case = Case("tensors", bias=True)
    inputs = make_inputs(case, torch.bfloat16)
    output = plain_torch_experts(case, inputs)
    tensor = getattr(inputs.weights, field)
    tensor.copy_(tensor.roll(1, -1))
    with pytest.raises(AssertionError):
        assert_close_to_reference(output, case, inputs)


def test_skipped_inputs_hold_nan() -> None:
    for case in CASES:
        inputs = make_inputs(case, torch.float32)
        skipped = local_experts(inputs) < 0
        assert torch.equal(inputs.topk_weights.isnan(), skipped & case.nan_where_skipped)
        if case.nan_where_skipped:
            assert skipped.any() and not skipped.all()
        else:
            assert inputs.hidden_states.isfinite().all()


def test_fresh_memory_is_poisoned() -> None:
    before = torch.empty
    with poisoned_empty():
        floats = [
            torch.empty(3, 5, dtype=torch.float16), torch.empty_like(torch.ones(2)),
            torch.ones(2).new_empty((2,)), torch.empty_strided((2, 3), (7, 2)),
            torch.empty(4).new_empty_strided((2,), (2,)),
        ]  # fmt: skip
        assert all(t.isnan().all() for t in floats)
        assert torch.empty(3, dtype=torch.int32).gt(2**30).all()
        assert torch.empty(3, dtype=torch.int64).gt(2**62).all()
        # Scratch memory: whatever is carved from it must be seen, and never read as "skip".
        scratch = torch.empty(64, dtype=torch.uint8)
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            assert scratch.view(dtype).isnan().all()
        assert scratch.view(torch.int32).gt(2**30).all()
        assert torch.empty(0, 4).shape == (0, 4)
    assert torch.empty is before
