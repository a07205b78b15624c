"""Peer ``sonic``: sonic-moe's forward pass on QuACK's grouped GEMMs, with their default tile.

QuACK's autotuner is left out: it takes longer than the whole benchmark.
"""

from __future__ import annotations

from importlib import import_module

import torch
from torch import Tensor

from bench.peers.base import Layer, Peer


def load() -> Peer:
    """Returns the layer; it takes the weights as they are."""
    sonicmoe = import_module("sonicmoe")
    quack = import_module("quack")
    gemms = import_module("quack.gemm_interface")
    route = import_module("sonicmoe.functional.triton_kernels").TC_topk_router_metadata_triton
    combine = import_module("sonicmoe.functional.forward")._router_forward

    def prepare(w13: Tensor, w2: Tensor) -> Layer:
        num_experts, hidden, inter = w2.shape

        def layer(x: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
            num_tokens, top_k = topk_ids.shape
            n = num_tokens * top_k
            ends = topk_ids.new_empty(num_experts + 1)
            counts = topk_ids.new_empty(num_experts)
            gather, order, inverse = (topk_ids.new_empty(n) for _ in range(3))
            route(topk_ids, num_experts, counts, ends, gather, order, inverse)
            act = x.new_empty(n, inter)
            gemms.gemm_gated(
                *(x, w13.mT),
                activation="swiglu",
                cu_seqlens_m=ends,
                A_idx=gather,
                postact_out=act,
                store_preact=False,
                concat_layout=("B",),
                tuned=False,
            )
            y = gemms.gemm(act, w2.mT, cu_seqlens_m=ends, tuned=False)
            out = torch.empty_like(x)
            combine(y, out, topk_weights.view(-1), inverse, None, top_k, hidden, False)
            return out

        return layer

    notes = {"tiles": "QuACK's default; its autotuner is not used"}
    return Peer(prepare, f"sonic-moe {sonicmoe.__version__}, QuACK {quack.__version__}", notes)
