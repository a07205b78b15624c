"""Peer ``triton_kernels``: Triton's own ``matmul_ogs``, as vendored in the vLLM wheel.

Both GEMMs gather and scatter by its routing data, the first with a fused SwiGLU, the second with
the routing weights and the sum over experts. Its routing starts from a bit matrix, which one small
kernel here makes from the ids.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from bench.peers.base import Layer, Peer


@triton.jit(repr=lambda _: "_silu_mul")
def _silu_mul(acc):
    gate, up = tl.split(tl.reshape(acc, (acc.shape[0], acc.shape[1] // 2, 2)))
    gate = gate.to(tl.float32)
    return gate / (1 + tl.exp(-gate)) * up


@triton.jit
def _pack_ids(
    ids_ptr,
    words_ptr,
    sums_ptr,
    num_tokens,
    stride_words,
    TOP_K: tl.constexpr,
    NUM_WORDS: tl.constexpr,
    WORDS_PAD: tl.constexpr,
    SUMS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    word = tl.arange(0, WORDS_PAD)
    packed = tl.zeros([BLOCK, WORDS_PAD], dtype=tl.uint32)
    for k in tl.static_range(TOP_K):
        expert = tl.load(ids_ptr + token * TOP_K + k, mask=token < num_tokens, other=0)
        expert = expert.to(tl.uint32)
        bit = (tl.full([BLOCK], 1, tl.uint32) << (expert % 32))[:, None]
        packed |= tl.where((expert // 32)[:, None] == word[None, :], bit, 0)
    mask = (token < num_tokens)[:, None] & (word < NUM_WORDS)[None, :]
    tl.store(words_ptr + word[None, :] * stride_words + token[:, None], packed, mask=mask)
    if tl.program_id(0) == 0:
        tl.store(sums_ptr + tl.arange(0, SUMS), 0)


def pack_ids(topk_ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Packs ids [T, k] into bits.

    Returns:
        uint32 words [T, ceil(num_experts / 32)], tokens contiguous, and zeroed sums for them.
    """
    num_tokens, top_k = topk_ids.shape
    num_words = triton.cdiv(num_experts, 32)
    stride = triton.cdiv(num_tokens, 32) * 32
    words = torch.empty(num_words, stride, dtype=torch.uint32, device=topk_ids.device)
    sums = torch.empty(
        triton.next_power_of_2(num_words * 32), dtype=torch.int32, device=topk_ids.device
    )
    _pack_ids[(triton.cdiv(num_tokens, 32),)](
        topk_ids,
        words,
        sums,
        num_tokens,
        stride,
        TOP_K=top_k,
        NUM_WORDS=num_words,
        WORDS_PAD=triton.next_power_of_2(num_words),
        SUMS=sums.numel(),
        BLOCK=32,
    )
    return words.T[:num_tokens], sums


def route(topk_ids: Tensor, topk_weights: Tensor, num_experts: int) -> tuple[Any, Any, Any]:
    """Returns triton_kernels' routing data, gather index and scatter index."""
    words, sums = pack_ids(topk_ids, num_experts)
    bits = [words.shape[0], words.shape[1] * 32]
    bitmatrix = import_module("triton_kernels.tensor").Bitmatrix(
        words, shape=bits, shape_max=[bits[0], None], scratchpad=sums
    )
    return import_module("triton_kernels.routing").routing_from_bitmatrix(
        bitmatrix, topk_weights, topk_ids, num_experts, topk_ids.shape[1]
    )


def load() -> Peer:
    """Returns the layer; its first weights are a copy with gate and up rows interleaved."""
    ogs = import_module("triton_kernels.matmul_ogs")
    activation = ogs.FusedActivation(ogs.FnSpecs("silu_mul", _silu_mul, ()), (), 2)

    def prepare(w13: Tensor, w2: Tensor) -> Layer:
        num_experts, rows, hidden = w13.shape
        interleaved = w13.view(num_experts, 2, rows // 2, hidden).transpose(1, 2).contiguous()
        gate_up = interleaved.view(w13.shape).mT
        down = w2.mT

        def layer(x: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
            routing, gather, scatter = route(topk_ids, topk_weights, num_experts)
            hidden = ogs.matmul_ogs(
                *(x, gate_up, None, routing),
                gather_indx=gather,
                precision_config=ogs.PrecisionConfig(),
                fused_activation=activation,
            )
            return ogs.matmul_ogs(
                *(hidden, down, None, routing),
                scatter_indx=scatter,
                precision_config=ogs.PrecisionConfig(),
                gammas=routing.gate_scal,
            )

        return layer

    return Peer(prepare, "3.5.1, as vendored in vLLM 0.24.0")
