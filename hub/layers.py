"""Layers that `kernels.kernelize` puts in place of a model's own: no state, only `forward`."""

from __future__ import annotations

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


def _require_plain_silu(module: nn.Module) -> None:
    """Raises unless the replaced module computes what `TilewiseExperts` does."""
    function = getattr(module, "act_fn", None)
    if not (isinstance(function, nn.SiLU) or type(function).__name__ == "SiLUActivation"):
        raise NotImplementedError(f"TilewiseExperts gates with SiLU, not {function!r}")
    for name in ("gate_up_proj_bias", "down_proj_bias"):
        if getattr(module, name, None) is not None:
            raise NotImplementedError(f"TilewiseExperts has no biases; the module has {name}")
    if getattr(module, "is_transposed", False) or not getattr(module, "is_concatenated", True):
        raise NotImplementedError("TilewiseExperts takes [E, 2I, H] with gate rows first")
