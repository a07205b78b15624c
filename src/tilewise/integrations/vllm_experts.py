"""The two classes that vLLM instantiates for each MoE layer; imported by `vllm.register` alone."""

from __future__ import annotations

import functools
from importlib import import_module
from typing import Any

import torch

from ..models import MoEShape
from ..moe.activation import Activation
from ..moe.explain import workspace_size
from ..moe.layer import fused_experts
from ..moe.weights import ExpertWeights
from . import host
from .vllm import ACTIVATIONS, SWITCH, translate

_LAYERS = "vllm.model_executor.layers.fused_moe"
_kernel: Any = import_module(f"{_LAYERS}.modular_kernel")
_method: Any = import_module(f"{_LAYERS}.unquantized_fused_moe_method")
_reduce: Any = import_module(f"{_LAYERS}.topk_weight_and_reduce")
_backends: Any = import_module(f"{_LAYERS}.oracle.unquantized").UnquantizedMoeBackend
_platforms: Any = import_module("vllm.platforms")
_envs: Any = import_module("vllm.envs")

log = host.logger("vllm")

DTYPES = (torch.bfloat16, torch.float16)
# Ways to move tokens whose outputs are laid out for kernels of their own.
_FOREIGN_TRANSPORT = (
    "use_fi_nvl_two_sided_kernels",
    "use_fi_nvl_one_sided_kernels",
    "use_moonep_kernels",
)

# Backends for quantised layers alone: with them vLLM chooses freely for the others.
_QUANTISED_ONLY = ("humming", "marlin")

_say_once = host.Once(log.info)
_prepare = host.Preparation()
_serving: set[str] = set()


class TilewiseExperts(_kernel.FusedMoEExpertsModular):  # type: ignore[misc]
    """vLLM's modular experts, computed by `fused_experts` in the memory that vLLM gives."""

    def __init__(
        self,
        moe_config: Any,
        quant_config: Any,
        max_num_tokens: int | None = None,
        num_dispatchers: int | None = None,
    ) -> None:
        super().__init__(moe_config, quant_config, max_num_tokens, num_dispatchers)
        known = translate(moe_config.activation.value, *_clamp(moe_config, quant_config))
        if isinstance(known, str):
            raise NotImplementedError(f"tilewise: {known}; TILEWISE_VLLM=0 uses vLLM's experts")
        self._act, self._layout = known
        self._batch_invariant = bool(getattr(_envs, "VLLM_BATCH_INVARIANT", False))

    @staticmethod
    def activation_format() -> Any:
        return _kernel.FusedMoEActivationFormat.Standard

    @staticmethod
    def _supports_current_device() -> bool:
        platform = _platforms.current_platform
        if not platform.is_cuda_alike():
            return False
        return bool(platform.is_rocm() or platform.has_device_capability(80))

    @staticmethod
    def _supports_no_act_and_mul() -> bool:
        return True

    @staticmethod
    def _supports_quant_scheme(weight_key: Any, activation_key: Any) -> bool:
        return weight_key is None and activation_key is None

    @staticmethod
    def _supports_activation(activation: Any) -> bool:
        return activation.value in ACTIVATIONS

    @staticmethod
    def _supports_parallel_config(moe_parallel_config: Any) -> bool:
        return not any(getattr(moe_parallel_config, name, False) for name in _FOREIGN_TRANSPORT)

    @staticmethod
    def _supports_batch_invariance() -> bool:
        return True

    def finalize_weight_and_reduce_impl(self) -> Any:
        return _reduce.TopKWeightAndReduceNoOP()

    def workspace_shapes(
        self,
        M: int,
        N: int,
        K: int,
        topk: int,
        global_num_experts: int,
        local_num_experts: int,
        expert_tokens_meta: Any,
        activation: Any,
    ) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """All scratch is the second workspace: the first shares its bytes with the output."""
        dtype = self.moe_config.in_dtype
        size = _workspace_bytes(
            M, N, K, topk, local_num_experts, dtype, self._act, self._batch_invariant
        )
        return (0,), (-(-size // dtype.itemsize),), (M, K)

    def apply(
        self,
        output: torch.Tensor,
        hidden_states: torch.Tensor,
        w1: torch.Tensor,
        w2: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        activation: Any,
        global_num_experts: int,
        expert_map: torch.Tensor | None,
        a1q_scale: torch.Tensor | None,
        a2_scale: torch.Tensor | None,
        workspace13: torch.Tensor,
        workspace2: torch.Tensor,
        expert_tokens_meta: Any,
        apply_router_weight_on_input: bool,
    ) -> None:
        wanted = self.moe_config.activation.value
        if activation.value != wanted:
            raise ValueError(f"tilewise: activation {activation.value}, the layer has {wanted}")
        if getattr(self, "post_gemm2_hook", None) is not None:
            raise NotImplementedError(
                f"tilewise: post_gemm2_hook is not supported; {SWITCH}=0 uses vLLM's experts"
            )
        weights = self.views(w1, w2)
        num_tokens, top_k = topk_ids.shape
        with_map = expert_map is not None
        try:
            self.warm(weights, top_k, num_tokens, topk_ids.dtype, topk_weights.dtype, with_map)
        except host.Unprepared as error:
            # This call may need none of the kernels that failed.
            _say_once(f"tilewise: {error}")
        if apply_router_weight_on_input:
            # vLLM has scaled the input before it comes here.
            topk_weights = torch.ones_like(topk_weights)
        fused_experts(
            hidden_states,
            weights,
            topk_weights,
            topk_ids,
            activation=self._act,
            expert_map=expert_map,
            batch_invariant=self._batch_invariant,
            out=output,
            workspace=workspace2.view(torch.uint8),
        )

    def views(self, w1: torch.Tensor, w2: torch.Tensor) -> ExpertWeights:
        """The layer's weights as ours; nothing that would keep their memory is kept."""
        quant = self.quant_config
        gated, layout = self._act.is_gated, self._layout
        return host.views(w1, w2, quant.w1_bias, quant.w2_bias, gated=gated, layout=layout)

    def warm(
        self,
        weights: ExpertWeights,
        top_k: int,
        num_tokens: int,
        ids_dtype: torch.dtype = torch.int32,
        weights_dtype: torch.dtype = torch.float32,
        expert_map: bool = False,
    ) -> None:
        """Compiles what such calls can need, once a process and before it serves.

        vLLM's profiling run makes its largest call with the dtypes of its router, so that a
        combination that was not foreseen is met there.
        """
        config = self.moe_config
        # Ranks that share a batch send each other their tokens.
        largest = config.max_num_tokens * max(config.moe_parallel_config.dp_size, 1)
        done = _prepare(
            weights, self._act, top_k, num_tokens, max(largest, num_tokens),
            topk_ids_dtype=ids_dtype, topk_weights_dtype=weights_dtype, expert_map=expert_map,
            batch_invariant=self._batch_invariant,
        )  # fmt: skip
        if done is not None:
            log.info("tilewise: %s", done)


class TilewiseMoEMethod(_method.UnquantizedFusedMoEMethod):  # type: ignore[misc]
    """vLLM's method for unquantised experts, with ours where they serve the layer."""

    is_tilewise = True
    unquantized_backend: Any
    experts_cls: Any
    moe_kernel: Any

    def __init__(self, moe: Any) -> None:
        super().__init__(moe)
        self._theirs = self.unquantized_backend, self.experts_cls
        reason = why_not(moe, self.unquantized_backend)
        if reason is not None:
            _say_once(f"tilewise: leaving experts to vLLM: {reason}")
            return
        # Its weights stay as they were loaded: [E, 2I, H] and [E, H, I].
        self.unquantized_backend = _backends.TRITON
        self.experts_cls = TilewiseExperts

    def process_weights_after_loading(self, layer: Any) -> None:
        # Weights that are updated later find the kernel that was chosen at first.
        if self.experts_cls is not TilewiseExperts or self.moe_kernel is not None:
            super().process_weights_after_loading(layer)
            return
        try:
            super().process_weights_after_loading(layer)
            self._warm(layer)
        except Exception as error:
            if self._theirs[0] is not _backends.TRITON:
                log.error("tilewise: failed; %s=0 uses vLLM's experts", SWITCH)
                raise  # Their weights would have been made in other sizes.
            log.warning("tilewise: leaving experts to vLLM: %s: %s", type(error).__name__, error)
            self.unquantized_backend, self.experts_cls = self._theirs
            self.moe_kernel = None
            super().process_weights_after_loading(layer)

    def _warm(self, layer: Any) -> None:
        experts = self.moe_kernel.fused_experts
        weights = experts.views(layer.w13_weight, layer.w2_weight)
        top_k = self.moe.experts_per_token
        ids_dtype = self.topk_indices_dtype or torch.int32
        with_map = getattr(layer, "expert_map", None) is not None
        experts.warm(weights, top_k, 1, ids_dtype, expert_map=with_map)
        kind = host.kind_of(weights, self.moe.activation.value, top_k)
        if kind not in _serving:
            _serving.add(kind)
            log.info("tilewise: serving %s", kind)


def why_not(moe: Any, chosen: Any) -> str | None:
    """Why these layers stay with vLLM, which chose a backend; None if Tilewise serves them."""
    if moe.moe_backend not in ("auto", *_QUANTISED_ONLY):
        return f"moe_backend={moe.moe_backend} was asked for"
    if getattr(moe, "rocm_aiter_fmoe_enabled", False):
        return "AITER was asked for"
    if moe.in_dtype not in DTYPES:
        return f"dtype {moe.in_dtype}"
    formats = _kernel.FusedMoEActivationFormat
    batched = moe.moe_parallel_config.use_batched_activation_format
    wanted = formats.BatchedExperts if batched else formats.Standard
    served, reason = TilewiseExperts.is_supported_config(TilewiseExperts, moe, None, None, wanted)
    if not served:
        return str(reason).removeprefix("kernel does not support ")
    known = translate(moe.activation.value, *_clamp(moe))
    if isinstance(known, str):
        return known
    if chosen is not _backends.TRITON and not host.switched_on(SWITCH):
        return f"vLLM chose {chosen.name}, {SWITCH}=1 puts Tilewise in its place"
    return None


def _clamp(moe: Any, quant: Any = None) -> tuple[float | None, float | None, float | None]:
    """Limit, alpha and beta, from where vLLM's own experts take them."""
    pairs = (
        (getattr(quant, "gemm1_clamp_limit", None), getattr(moe, "swiglu_limit", None)),
        (getattr(quant, "gemm1_alpha", None), getattr(moe, "swiglu_alpha", None)),
        (getattr(quant, "gemm1_beta", None), getattr(moe, "swiglu_beta", None)),
    )
    limit, alpha, beta = (layer if first is None else first for first, layer in pairs)
    return limit, alpha, beta


@functools.lru_cache(maxsize=65536)
def _workspace_bytes(
    num_tokens: int,
    rows: int,
    hidden_size: int,
    top_k: int,
    num_experts: int,
    dtype: torch.dtype,
    activation: Activation,
    batch_invariant: bool,
) -> int:
    inter = rows // 2 if activation.is_gated else rows
    # A device may hold fewer experts than a token chooses.
    shape = MoEShape(max(num_experts, top_k), top_k, hidden_size, inter)
    return workspace_size(
        shape, num_tokens, dtype=dtype, activation=activation, batch_invariant=batch_invariant
    )
