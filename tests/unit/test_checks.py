"""What a caller reads when arguments don't fit: what was given, what is allowed, what to do."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import tilewise
from tilewise import Activation, ExpertWeights

T, E, K, H, I = 4, 6, 2, 8, 3  # noqa: E741

ROUTE_ERRORS = [
    ({"top_k": 0}, r"top_k=0 must be between 1 and num_experts=6"),
    ({"top_k": 7}, r"top_k=7 must be between 1 and num_experts=6"),
    ({"scoring_func": "relu"}, r"scoring_func='relu' must be one of .*softmax.*sigmoid"),
    ({"e_score_correction_bias": torch.zeros(5)},
     r"e_score_correction_bias must be \[6\], got \(5,\)"),
    ({"e_score_correction_bias": torch.zeros(1, 6)}, r"must be \[6\], got \(1, 6\)"),
    ({"num_expert_group": 2}, r"num_expert_group=2 and topk_group=None come together"),
    ({"topk_group": 2}, r"num_expert_group=None and topk_group=2 come together"),
    ({"num_expert_group": 4, "topk_group": 1},
     r"num_expert_group=4 must divide num_experts=6"),
    ({"num_expert_group": 0, "topk_group": 1}, r"num_expert_group=0 must divide"),
    ({"num_expert_group": 3, "topk_group": 0},
     r"topk_group=0 must be between 1 and num_expert_group=3"),
    ({"num_expert_group": 3, "topk_group": 4}, r"topk_group=4 must be between 1 and"),
    ({"num_expert_group": 6, "topk_group": 1},
     r"1 groups of 1 experts cannot give top_k=2: raise topk_group"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), ROUTE_ERRORS)
def test_route_refuses(changes: dict[str, Any], message: str) -> None:
    options = {"top_k": K, **changes}
    for route in (tilewise.route, tilewise.moe.reference.route):
        with pytest.raises(ValueError, match=message):
            route(torch.zeros(T, E), **options)


@pytest.mark.parametrize("shape", [(E,), (1, T, E)])
def test_route_refuses_other_ranks(shape: tuple[int, ...]) -> None:
    for route in (tilewise.route, tilewise.moe.reference.route):
        with pytest.raises(ValueError, match=r"router_logits must be \[num_tokens, num_experts\]"):
            route(torch.zeros(shape), K)


def weights(dtype: torch.dtype = torch.float32, gated: bool = True) -> ExpertWeights:
    up, down = torch.zeros(E, I, H, dtype=dtype), torch.zeros(E, H, I, dtype=dtype)
    return ExpertWeights(up.clone() if gated else None, up, down)


def arguments(**changes: Any) -> dict[str, Any]:
    return {
        "hidden_states": torch.zeros(T, H),
        "weights": weights(),
        "topk_weights": torch.zeros(T, K),
        "topk_ids": torch.zeros(T, K, dtype=torch.int32),
        **changes,
    }


IDS = torch.zeros(T, K, dtype=torch.int32)
EXPERTS_ERRORS = [
    ({"hidden_states": torch.zeros(T, H + 1)},
     r"hidden_states must be \[num_tokens, hidden_size=8\], got \(4, 9\)"),
    ({"hidden_states": torch.zeros(1, T, H)}, r"got \(1, 4, 8\)"),
    ({"hidden_states": torch.zeros(T, H, dtype=torch.float64)},
     r"hidden_states is torch\.float64; allowed: bfloat16, float16, float32"),
    ({"hidden_states": torch.zeros(T, H, dtype=torch.bfloat16)},
     r"hidden_states is torch\.bfloat16, the weights are torch\.float32: cast one"),
    ({"topk_ids": IDS[:3]}, r"topk_ids must be \[num_tokens=4, top_k\], got \(3, 2\)"),
    ({"topk_ids": IDS[0]}, r"topk_ids must be \[num_tokens=4, top_k\], got \(2,\)"),
    ({"topk_ids": IDS[:, :0]}, r"topk_ids has no columns: top_k must be at least 1"),
    ({"topk_ids": IDS.to(torch.int16)}, r"topk_ids is torch\.int16; allowed: int32, int64"),
    ({"topk_ids": IDS.float()}, r"topk_ids is torch\.float32; allowed: int32, int64"),
    ({"topk_weights": torch.zeros(T, K + 1)},
     r"topk_weights is \(4, 3\), topk_ids \(4, 2\): they must be alike"),
    ({"topk_weights": torch.zeros(T, K, dtype=torch.float64)},
     r"topk_weights is torch\.float64; allowed: .*float32"),
    ({"topk_weights": torch.zeros(T, K, dtype=torch.int32)}, r"topk_weights is torch\.int32"),
    ({"activation": Activation("silu")},
     r"'silu' does not go with weights that have a gate: build them with .*from_ungated"),
    ({"weights": weights(gated=False)},
     r"'swiglu' does not go with weights that have no gate: build them with .*from_gate_up"),
    ({"topk_ids": IDS.to("meta")},
     r"hidden_states on cpu, weights on cpu, topk_ids on meta, .*: use one device"),
    ({"topk_weights": torch.zeros(T, K, device="meta")}, r"topk_weights on meta: use one device"),
    ({"hidden_states": torch.zeros(T, H, device="meta")}, r"hidden_states on meta, weights on cpu"),
    ({"expert_map": torch.zeros(E)},
     r"expert_map must be int32 or int64 \[num_experts\].*-1, got torch\.float32 \(6,\)"),
    ({"expert_map": torch.zeros(1, E, dtype=torch.int32)}, r"expert_map must be .*\(1, 6\)"),
    ({"expert_map": torch.zeros(E, dtype=torch.int32, device="meta")},
     r"expert_map is on meta, hidden_states on cpu"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), EXPERTS_ERRORS)
def test_fused_experts_refuses(changes: dict[str, Any], message: str) -> None:
    for fused_experts in (tilewise.fused_experts, tilewise.moe.reference.fused_experts):
        with pytest.raises(ValueError, match=message):
            fused_experts(**arguments(**changes))


def test_the_unchanged_arguments_are_fine() -> None:
    assert tilewise.fused_experts(**arguments()).shape == (T, H)
    assert tilewise.route(torch.zeros(T, E), K)[0].shape == (T, K)


@pytest.mark.parametrize(
    "out",
    [
        torch.zeros(T, H + 1),
        torch.zeros(T, K, H),
        torch.zeros(T, H, dtype=torch.bfloat16),
        torch.zeros(H, T).t(),
    ],
)
def test_out_must_fit(out: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"out must be \(4, 8\) torch\.float32 with unit last"):
        tilewise.fused_experts(**arguments(out=out))


def test_out_without_reduce_has_slots() -> None:
    with pytest.raises(ValueError, match=r"out must be \(4, 2, 8\)"):
        tilewise.fused_experts(**arguments(out=torch.zeros(T, H), reduce=False))


def test_workspace_needs_out() -> None:
    with pytest.raises(ValueError, match="workspace is given without out: pass out too"):
        tilewise.fused_experts(**arguments(workspace=torch.zeros(8, dtype=torch.uint8)))


def test_expert_map_must_name_local_experts() -> None:
    mapping = torch.arange(E, dtype=torch.int32) + 1
    with pytest.raises(ValueError, match="names local expert 6, but there are 6"):
        tilewise.fused_experts(**arguments(expert_map=mapping))
    with pytest.raises(ValueError, match=r"expert_map must map .*num_local_experts=6"):
        tilewise.moe.reference.fused_experts(**arguments(expert_map=mapping))


def test_plan_refuses() -> None:
    with pytest.raises(ValueError, match=r"expert_map must be \[num_experts=6\], got \(5,\)"):
        tilewise.plan(IDS, E, expert_map=torch.zeros(5, dtype=torch.int32), num_local_experts=5)
    with pytest.raises(ValueError, match="differs from num_experts: pass an expert_map"):
        tilewise.plan(IDS, E, num_local_experts=3)


GATE_UP, DOWN = torch.zeros(E, 2 * I, H), torch.zeros(E, H, I)
LIST = [[0.0] * E] * T
NO_TENSORS = [
    ("gate_up", lambda: ExpertWeights.from_gate_up(GATE_UP.numpy(), DOWN)),
    ("down", lambda: ExpertWeights.from_gate_up(GATE_UP, LIST)),
    ("gate_up_bias", lambda: ExpertWeights.from_gate_up(GATE_UP, DOWN, gate_up_bias=LIST)),
    ("up", lambda: ExpertWeights.from_ungated(None, DOWN)),
    ("down_bias", lambda: ExpertWeights.from_ungated(DOWN.mT, DOWN, down_bias=LIST)),
    ("gate", lambda: ExpertWeights(LIST, DOWN.mT, DOWN)),
    ("router_logits", lambda: tilewise.route(LIST, K)),
    ("e_score_correction_bias",
     lambda: tilewise.route(torch.zeros(T, E), K, e_score_correction_bias=[0.0] * E)),
    ("topk_ids", lambda: tilewise.plan(IDS.numpy(), E)),
    ("expert_map", lambda: tilewise.plan(IDS, E, expert_map=[0] * E)),
    *(
        (name, lambda name=name: tilewise.fused_experts(**arguments(**{name: LIST})))
        for name in ("hidden_states", "topk_weights", "topk_ids", "expert_map", "out")
    ),
    ("workspace",
     lambda: tilewise.fused_experts(**arguments(out=torch.zeros(T, H), workspace=bytearray(9)))),
    ("hidden_states", lambda: tilewise.fused_moe(LIST, torch.zeros(E, H), weights(), K)),
    ("router_weight", lambda: tilewise.fused_moe(torch.zeros(T, H), LIST, weights(), K)),
    ("expert_map", lambda: tilewise.fused_moe(
        torch.zeros(T, H), torch.zeros(E, H), weights(), K, expert_map=[0] * E)),
    ("hidden_states", lambda: tilewise.FusedMoE(tilewise.MoEShape(E, K, H, I))(LIST)),
]  # fmt: skip


@pytest.mark.parametrize(("name", "call"), NO_TENSORS, ids=lambda value: str(value)[:20])
def test_what_is_no_tensor_is_named(name: str, call: Any) -> None:
    message = rf"^{name} must be a torch\.Tensor.*, got \w+: torch\.as_tensor makes one"
    with pytest.raises(TypeError, match=message):
        call()


def test_fused_moe_wants_built_weights() -> None:
    with pytest.raises(TypeError, match="weights is a tuple; build it with"):
        tilewise.fused_moe(torch.zeros(T, H), torch.zeros(E, H), (GATE_UP, DOWN), K)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights": DOWN}, "weights is a Tensor; build it with ExpertWeights.from_gate_up"),
        ({"activation": "swiglu"}, "activation='swiglu' must be a tilewise.Activation: .*relu2"),
        ({"config": "grouped"}, "config='grouped' must be a tilewise.LayerConfig, or None"),
        ({"reduce": "sum"}, "reduce='sum' must be True or False"),
        ({"batch_invariant": 3}, "batch_invariant=3 must be True or False"),
        ({"apply_router_weight_on_input": None}, "_on_input=None must be True or False"),
    ],
)
def test_other_types_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        tilewise.fused_experts(**arguments(**changes))


@pytest.mark.parametrize("value", ["4", 4.0, True], ids=repr)
@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("top_k", lambda value: tilewise.route(torch.zeros(T, E), value)),
        ("num_expert_group",
         lambda value: tilewise.route(torch.zeros(T, E), K, num_expert_group=value, topk_group=1)),
        ("topk_group",
         lambda value: tilewise.route(torch.zeros(T, E), K, num_expert_group=2, topk_group=value)),
        ("num_experts", lambda value: tilewise.plan(IDS, value)),
        ("num_local_experts", lambda value: tilewise.plan(IDS, E, num_local_experts=value)),
    ],
    ids=lambda value: str(value)[:20],
)  # fmt: skip
def test_sizes_are_integers(name: str, call: Any, value: object) -> None:
    with pytest.raises(TypeError, match=f"^{name}={value!r} must be an integer"):
        call(value)


def test_renormalize_is_no_number() -> None:
    with pytest.raises(TypeError, match="renormalize=1 must be True or False"):
        tilewise.route(torch.zeros(T, E), K, renormalize=1)  # type: ignore[arg-type]


def test_modules_want_a_shape() -> None:
    with pytest.raises(TypeError, match=r"shape='mixtral-8x7b' must be a tilewise.MoEShape"):
        tilewise.FusedMoE("mixtral-8x7b")
    with pytest.raises(TypeError, match=r"activation='silu' must be a tilewise.Activation"):
        tilewise.FusedExperts(tilewise.MoEShape(E, K, H, I), activation="silu")
