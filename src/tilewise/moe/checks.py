"""Argument checks that every implementation shares: host facts only, no device reads."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..models import MoEShape
from ..target import Target
from .activation import KINDS, Activation
from .schedule import LayerConfig
from .tensors import check_tensors
from .weights import ExpertWeights

SCORING_FUNCS = ("softmax", "topk_softmax", "sigmoid")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
ID_DTYPES = (torch.int32, torch.int64)


def check_route_args(
    num_experts: int,
    top_k: int,
    scoring_func: str,
    num_expert_group: int | None,
    topk_group: int | None,
    bias_shape: Sequence[int] | None,
) -> None:
    """Raises ValueError unless the routing options fit together, TypeError for other types."""
    check_ints(top_k=top_k)
    for name, groups in (("num_expert_group", num_expert_group), ("topk_group", topk_group)):
        if groups is not None:
            check_ints(**{name: groups})
    if not 1 <= top_k <= num_experts:
        raise ValueError(f"top_k={top_k} must be between 1 and num_experts={num_experts}")
    if scoring_func not in SCORING_FUNCS:
        raise ValueError(f"scoring_func={scoring_func!r} must be one of {SCORING_FUNCS}")
    if bias_shape is not None and tuple(bias_shape) != (num_experts,):
        raise ValueError(
            f"e_score_correction_bias must be [{num_experts}], got {tuple(bias_shape)}"
        )
    if (num_expert_group is None) != (topk_group is None):
        raise ValueError(
            f"num_expert_group={num_expert_group} and topk_group={topk_group} come together"
        )
    if num_expert_group is None or topk_group is None:
        return
    if num_expert_group < 1 or num_experts % num_expert_group:
        raise ValueError(
            f"num_expert_group={num_expert_group} must divide num_experts={num_experts}"
        )
    if not 1 <= topk_group <= num_expert_group:
        raise ValueError(
            f"topk_group={topk_group} must be between 1 and num_expert_group={num_expert_group}"
        )
    if topk_group * (num_experts // num_expert_group) < top_k:
        raise ValueError(
            f"{topk_group} groups of {num_experts // num_expert_group} experts cannot give "
            f"top_k={top_k}: raise topk_group"
        )


def check_weights(weights: ExpertWeights) -> None:
    """Raises TypeError unless the experts are built."""
    if not isinstance(weights, ExpertWeights):
        raise TypeError(
            f"weights is a {type(weights).__name__}; build it with "
            "ExpertWeights.from_gate_up(gate_up, down) or ExpertWeights.from_ungated(up, down)"
        )


def check_shape(shape: MoEShape) -> None:
    """Raises TypeError for a name or a tuple."""
    if not isinstance(shape, MoEShape):
        raise TypeError(
            f"shape={shape!r} must be a tilewise.MoEShape: tilewise.moe_shape('qwen3-30b-a3b') "
            "makes one"
        )


def check_activation(activation: Activation) -> None:
    """Raises TypeError for a name or a function."""
    if not isinstance(activation, Activation):
        raise TypeError(
            f"activation={activation!r} must be a tilewise.Activation: "
            "tilewise.Activation('swiglu') is SiLU of the gate times up; kinds: "
            f"{', '.join(KINDS)}"
        )


def check_config(config: LayerConfig | None) -> None:
    """Raises TypeError for a path alone, or a dict."""
    if config is not None and not isinstance(config, LayerConfig):
        raise TypeError(f"config={config!r} must be a tilewise.LayerConfig, or None to choose")


def check_dtype(
    dtype: torch.dtype, name: str = "dtype", allowed: Sequence[torch.dtype] = DTYPES
) -> None:
    """Raises ValueError unless kernels take it, TypeError for its name."""
    *first, last = map(str, allowed)
    words = f"{name}={dtype!r} must be {', '.join(first)} or {last}"
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"{words}, got a {type(dtype).__name__}")
    if dtype not in allowed:
        raise ValueError(words)


def check_bools(**options: object) -> None:
    """Raises TypeError for 1, "no" and other things that only count as true or false."""
    for name, value in options.items():
        if not isinstance(value, bool):
            raise TypeError(f"{name}={value!r} must be True or False")


def check_ints(**sizes: object) -> None:
    """Raises TypeError for "4", 4.0 and True."""
    for name, value in sizes.items():
        # Sizes of a traced call are symbols.
        if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
            raise TypeError(f"{name}={value!r} must be an integer")


def check_tokens(num_tokens: int, least: int, name: str = "num_tokens") -> None:
    """Raises TypeError or ValueError unless so many tokens can be in a call."""
    check_ints(**{name: num_tokens})
    if num_tokens < least:
        raise ValueError(f"{name}={num_tokens} must be at least {least}")


def check_target(target: Target | None) -> None:
    """Raises TypeError for the name of an architecture."""
    if target is not None and not isinstance(target, Target):
        raise TypeError(
            f"target={target!r} must be a tilewise.Target, tilewise.Target.from_arch('sm_90'), or "
            "None for this machine"
        )


def check_experts_args(
    hidden_states: torch.Tensor,
    weights: ExpertWeights,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    *,
    activation: Activation,
    expert_map: torch.Tensor | None,
    apply_router_weight_on_input: bool = False,
) -> None:
    """Raises ValueError unless the tensors of a call fit together, TypeError for other types."""
    check_weights(weights)
    check_activation(activation)
    check_tensors(
        ("expert_map",), hidden_states=hidden_states, topk_weights=topk_weights, topk_ids=topk_ids,
        expert_map=expert_map,
    )  # fmt: skip
    x = hidden_states
    if x.dim() != 2 or x.shape[1] != weights.up.shape[2]:
        raise ValueError(
            f"hidden_states must be [num_tokens, hidden_size={weights.hidden_size}], got "
            f"{tuple(x.shape)}"
        )
    if x.dtype not in DTYPES:
        raise ValueError(f"hidden_states is {x.dtype}; allowed: bfloat16, float16, float32")
    if x.dtype is not weights.up.dtype:
        raise ValueError(
            f"hidden_states is {x.dtype}, the weights are {weights.dtype}: cast one of them"
        )
    if topk_ids.dim() != 2 or topk_ids.shape[0] != x.shape[0]:
        raise ValueError(
            f"topk_ids must be [num_tokens={x.shape[0]}, top_k], got {tuple(topk_ids.shape)}"
        )
    if topk_ids.shape[1] < 1:
        raise ValueError("topk_ids has no columns: top_k must be at least 1")
    if topk_ids.dtype not in ID_DTYPES:
        swapped = (
            " (are topk_weights and topk_ids swapped?)" if topk_ids.is_floating_point() else ""
        )
        raise ValueError(f"topk_ids is {topk_ids.dtype}; allowed: int32, int64{swapped}")
    if topk_weights.shape != topk_ids.shape:
        raise ValueError(
            f"topk_weights is {tuple(topk_weights.shape)}, topk_ids {tuple(topk_ids.shape)}: "
            "they must be alike"
        )
    if topk_weights.dtype not in DTYPES:
        raise ValueError(
            f"topk_weights is {topk_weights.dtype}; allowed: float32, bfloat16, float16"
        )
    if activation.is_gated is (weights.gate is None):
        holds = "no gate" if weights.gate is None else "a gate"
        raise ValueError(
            f"activation {activation.kind!r} does not go with weights that have {holds}: build "
            "them with ExpertWeights.from_gate_up or from_ungated, or choose another activation"
        )
    device = x.device
    if weights.up.device != device or topk_ids.device != device or topk_weights.device != device:
        raise ValueError(
            f"hidden_states on {device}, weights on {weights.device}, topk_ids on "
            f"{topk_ids.device}, topk_weights on {topk_weights.device}: use one device"
        )
    if expert_map is not None:
        if expert_map.dim() != 1 or expert_map.dtype not in ID_DTYPES:
            raise ValueError(
                "expert_map must be int32 or int64 [num_experts], global -> local or -1, got "
                f"{expert_map.dtype} {tuple(expert_map.shape)}"
            )
        if expert_map.device != device:
            raise ValueError(f"expert_map is on {expert_map.device}, hidden_states on {device}")
