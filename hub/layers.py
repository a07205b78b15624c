"""Layers that `kernels.kernelize` puts in place of a model's own: no state, only `forward`."""

from __future__ import annotations

from types import FunctionType
from typing import Any

import torch
from torch import nn

from .moe.layer import fused_experts
from .moe.weights import ExpertWeights


class TilewiseExperts(nn.Module):
    """The experts of a transformers model, SiLU-gated, without biases: Qwen, Mixtral, DeepSeek.

    The module it replaces holds `gate_up_proj` [E, 2I, H], gate rows first, and `down_proj`
    [E, H, I], and takes the router's ids and weights.
    """

    can_torch_compile = True
    has_backward = False

    gate_up_proj: torch.Tensor
    down_proj: torch.Tensor

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """[num_tokens, hidden_size] -> [num_tokens, hidden_size]."""
        _require_plain_silu(self)
        weights = ExpertWeights.from_gate_up(self.gate_up_proj, self.down_proj)
        return fused_experts(hidden_states, weights, top_k_weights, top_k_index)


# Classes and functions that are SiLU; a subclass may compute anything.
_SILU = (
    "torch.nn.modules.activation.SiLU",
    "torch.nn.functional.silu",
    "transformers.activations.SiLUActivation",
)
_DEFAULT_GATE = "transformers.integrations.moe._default_apply_gate"


def _require_plain_silu(module: nn.Module) -> None:
    """Raises unless the replaced module computes what `TilewiseExperts` does."""
    function = getattr(module, "act_fn", None)
    kind = function if isinstance(function, FunctionType) else type(function)
    if _name(kind) not in _SILU:
        raise NotImplementedError(f"TilewiseExperts gates with SiLU, not {function!r}")
    if isinstance(function, nn.Module) and (
        "forward" in vars(function) or function._forward_hooks or function._forward_pre_hooks
    ):
        raise NotImplementedError("TilewiseExperts takes a plain SiLU, without hooks or a forward")
    gate = getattr(module, "_apply_gate", None)
    # A module without one is none of transformers' experts: whoever names it vouches for it.
    if gate is not None and _name(getattr(gate, "__func__", gate)) != _DEFAULT_GATE:
        raise NotImplementedError("TilewiseExperts computes SiLU(gate) * up, not another gate")
    for name in ("gate_up_proj_bias", "down_proj_bias"):
        if getattr(module, name, None) is not None:
            raise NotImplementedError(f"TilewiseExperts has no biases; the module has {name}")
    if getattr(module, "is_transposed", False) or not getattr(module, "is_concatenated", True):
        raise NotImplementedError("TilewiseExperts takes [E, 2I, H] with gate rows first")
    if not getattr(module, "has_gate", True):
        raise NotImplementedError("TilewiseExperts gates; the module has no gate")
    if getattr(module, "has_post_expert_norm", False):
        raise NotImplementedError("TilewiseExperts does not normalise each expert's output")


def _name(item: Any) -> str:
    return f"{getattr(item, '__module__', '')}.{getattr(item, '__qualname__', '')}"
