"""Peer ``hf``: transformers' own experts, its ``grouped_mm`` implementation without a sync."""

from __future__ import annotations

import torch
from torch import Tensor

from bench.peers.base import Layer, Peer


def load() -> Peer:
    """Returns the layer of a Qwen3-MoE model, whose weights are laid out as the benchmark's."""
    import transformers
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    def prepare(w13: Tensor, w2: Tensor) -> Layer:
        experts, hidden, inter = w2.shape
        config = Qwen3MoeConfig(
            num_experts=experts, hidden_size=hidden, moe_intermediate_size=inter
        )
        config._experts_implementation = "grouped_mm"
        with torch.device("meta"):
            module = Qwen3MoeExperts(config)
        module.gate_up_proj = torch.nn.Parameter(w13, requires_grad=False)
        module.down_proj = torch.nn.Parameter(w2, requires_grad=False)

        def layer(x: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
            # Its router gives int64 ids and weights in the model's dtype.
            with torch.no_grad():
                return module(x, topk_ids.long(), topk_weights.to(x.dtype))

        return layer

    notes = {"ids": "cast to int64, weights to bf16, inside the time"}
    return Peer(prepare, transformers.__version__, notes)
