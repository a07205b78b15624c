"""Peers ``vllm`` and ``vllm_dflt``: vLLM's Triton ``fused_experts``, tuned and by heuristic."""

from __future__ import annotations

import importlib
import os
from types import ModuleType

import torch
from torch import Tensor

from bench.peers import stubs
from bench.peers.base import Layer, Peer

# Imported by vllm.config and vllm.distributed, never called by a fused MoE layer.
UNUSED = ("cbor2", "openai", "openai_harmony", "zmq")


def load() -> Peer:
    """Returns vLLM's layer with its tuned JSON where it has one for the GPU and the shape."""
    fused_moe, notes = _import()

    def prepare(w13: Tensor, w2: Tensor) -> Layer:
        def layer(x: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
            return fused_moe.fused_experts(x, w13, w2, topk_weights, topk_ids)

        return layer

    return Peer(prepare, _version(), notes)


def load_default() -> Peer:
    """Returns vLLM's layer with the configuration that its heuristic gives."""
    fused_moe, notes = _import()
    package = importlib.import_module("vllm.model_executor.layers.fused_moe")

    def prepare(w13: Tensor, w2: Tensor) -> Layer:
        num_experts, hidden, inter = w2.shape

        def layer(x: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
            config = fused_moe.get_default_config(
                x.shape[0], num_experts, inter, hidden, topk_ids.shape[1], None
            )
            package._config = config  # override_config() leaks it when the call raises
            try:
                return fused_moe.fused_experts(x, w13, w2, topk_weights, topk_ids)
            finally:
                package._config = None

        return layer

    return Peer(prepare, _version(), notes)


def _import() -> tuple[ModuleType, dict[str, str]]:
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    replaced = stubs.install(UNUSED)
    platforms = importlib.import_module("vllm.platforms")
    cuda = importlib.import_module("vllm.platforms.cuda")
    # Plug-in discovery can settle on "unspecified" where the driver's NVML is not on the path.
    platforms._current_platform = cuda.NonNvmlCudaPlatform()
    fused_moe = importlib.import_module("vllm.model_executor.layers.fused_moe.fused_moe")
    for namespace, op in (("_C", "silu_and_mul"), ("_moe_C", "moe_sum")):
        if not hasattr(getattr(torch.ops, namespace), op):
            raise ImportError(f"vLLM's compiled op {namespace}.{op} is not registered")
    notes = {"moe_align_block_size, moe_sum": "vLLM .so", "silu_and_mul": "vLLM .so"}
    if replaced:
        notes["stubbed, unused here"] = ", ".join(replaced)
    return fused_moe, notes


def _version() -> str:
    return str(importlib.import_module("vllm").__version__)
