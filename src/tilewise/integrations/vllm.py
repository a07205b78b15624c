"""Tilewise as a plug-in of vLLM, 0.24 and newer: the experts of unquantised MoE layers.

Installing Tilewise beside vLLM is enough: vLLM finds `register` by its entry point and calls it in
every process. `TILEWISE_VLLM=0` switches it off; `TILEWISE_VLLM=1` uses it where vLLM would choose
another backend than Triton, too. What Tilewise does not serve runs on vLLM's own path, and the log
says why.
"""

from __future__ import annotations

import dataclasses
import inspect
import os
from importlib import import_module
from typing import Any

from ..moe.activation import (
    GEGLU,
    GEGLU_TANH,
    GELU,
    GELU_TANH,
    RELU2,
    SILU,
    SWIGLU,
    SWIGLU_OAI,
    Activation,
)
from .host import logger, switched_off

SWITCH = "TILEWISE_VLLM"

_LAYERS = "vllm.model_executor.layers.fused_moe"
_KERNEL = f"{_LAYERS}.modular_kernel"
_METHOD = f"{_LAYERS}.unquantized_fused_moe_method:UnquantizedFusedMoEMethod"

# What we rely on, as "module:name": of a function its parameters, of a class its members. Checked
# when the plug-in loads, and in the tests against every release that we name as supported.
FUNCTIONS = {
    # vLLM calls these of ours by keyword: a parameter more or less is another meaning.
    f"{_KERNEL}:FusedMoEExpertsModular.apply": (
        "self", "output", "hidden_states", "w1", "w2", "topk_weights", "topk_ids", "activation",
        "global_num_experts", "expert_map", "a1q_scale", "a2_scale", "workspace13", "workspace2",
        "expert_tokens_meta", "apply_router_weight_on_input",
    ),
    f"{_KERNEL}:FusedMoEExpertsModular.workspace_shapes": (
        "self", "M", "N", "K", "topk", "global_num_experts", "local_num_experts",
        "expert_tokens_meta", "activation",
    ),
    f"{_KERNEL}:FusedMoEExperts.__init__": (
        "self", "moe_config", "quant_config", "max_num_tokens", "num_dispatchers",
    ),
    f"{_KERNEL}:FusedMoEExperts.is_supported_config": (
        "cls", "moe_config", "weight_key", "activation_key", "activation_format",
    ),
    f"{_METHOD}.__init__": ("self", "moe"),
    f"{_METHOD}.process_weights_after_loading": ("self", "layer"),
    "vllm.model_executor.custom_op:CustomOp.register_oot": ("cls", "_decorated_op_cls", "name"),
}  # fmt: skip
MEMBERS = {
    # Everything abstract in vLLM's experts, all of which ours define.
    f"{_KERNEL}:FusedMoEExpertsModular": ("workspace_shapes", "finalize_weight_and_reduce_impl"),
    f"{_KERNEL}:FusedMoEActivationFormat": ("Standard", "BatchedExperts"),
    f"{_KERNEL}:FusedMoEKernel": ("fused_experts",),
    f"{_LAYERS}.topk_weight_and_reduce:TopKWeightAndReduceNoOP": ("apply",),
    f"{_LAYERS}.oracle.unquantized:UnquantizedMoeBackend": ("TRITON",),
    f"{_LAYERS}.activation:MoEActivation": ("SILU",),
    f"{_LAYERS}.config:FusedMoEConfig": (
        "activation", "experts_per_token", "in_dtype", "is_act_and_mul", "is_lora_enabled",
        "max_num_tokens", "moe_backend", "moe_parallel_config", "swiglu_alpha", "swiglu_beta",
        "swiglu_limit",
    ),
    f"{_LAYERS}.config:FusedMoEParallelConfig": ("dp_size", "use_batched_activation_format"),
    f"{_LAYERS}.config:FusedMoEQuantConfig": (
        "gemm1_alpha", "gemm1_beta", "gemm1_clamp_limit", "w1_bias", "w2_bias",
    ),
}  # fmt: skip
# All that these classes offer in the releases we know. A release that adds a name fails the tests,
# so that someone decides what it means; on a user's machine it is logged.
KNOWN = {
    f"{_KERNEL}:FusedMoEExpertsModular": frozenset({
        "a1_gscale", "a1_scale", "a2_gscale", "a2_scale", "activation", "activation_format",
        "adjust_N_for_activation", "apply", "block_shape", "consumes_expert_mask",
        "expects_unquantized_inputs", "finalize_weight_and_reduce_impl", "g1_alphas", "g2_alphas",
        "is_monolithic", "is_supported_config", "moe_problem_size", "output_hidden_dim",
        "per_act_token_quant", "per_out_ch_quant", "post_gemm2_hook",
        "process_weights_after_loading", "quant_dtype", "supports_lora",
        "supports_packed_ue8m0_act_scales", "w1_bias", "w1_scale", "w1_zp", "w2_bias", "w2_scale",
        "w2_zp", "weight_quant_dtype", "workspace_dtype", "workspace_shapes",
    }),
    f"{_LAYERS}.config:FusedMoEConfig": frozenset({
        "activation", "activation_situ_beta", "activation_situ_linear_beta",
        "aiter_fmoe_shared_expert_enabled", "defer_moe_finalize_max_num_tokens", "device",
        "elastic_ep_max_dp_size", "experts_per_token", "has_bias", "has_hash_routing", "hidden_dim",
        "hidden_dim_unpadded", "in_dtype", "intermediate_pad", "intermediate_size",
        "intermediate_size_per_partition", "intermediate_size_per_partition_unpadded",
        "is_lora_enabled", "max_capture_size", "max_num_tokens", "moe_backend",
        "moe_parallel_config", "num_experts", "num_local_experts", "num_logical_experts",
        "require_decomposed_backend", "rocm_aiter_fmoe_enabled", "router_logits_dtype",
        "routing_method", "shared_expert_prefix", "skip_final_all_reduce", "swiglu_alpha",
        "swiglu_beta", "swiglu_limit", "tp_shard_with_padding", "use_mxfp4_w4a4_dsv4",
    }),
    f"{_LAYERS}.config:FusedMoEParallelConfig": frozenset({
        "all2all_backend", "dp_rank", "dp_size", "enable_eplb", "ep_rank", "ep_size",
        "is_sequence_parallel", "pcp_rank", "pcp_size", "sp_size", "tp_rank", "tp_size", "use_ep",
    }),
}  # fmt: skip
# The static methods that say what experts support, abstract in vLLM's base class.
SUPPORTS = (
    "activation_format",
    "_supports_current_device",
    "_supports_no_act_and_mul",
    "_supports_quant_scheme",
    "_supports_activation",
    "_supports_parallel_config",
)

_PLAIN = {
    "silu": SWIGLU,
    "gelu": GEGLU,
    "gelu_tanh": GEGLU_TANH,
    "silu_no_mul": SILU,
    "gelu_no_mul": GELU,
    "gelu_tanh_no_mul": GELU_TANH,
    "relu2_no_mul": RELU2,
}
ACTIVATIONS = frozenset({*_PLAIN, "swigluoai", "swigluoai_uninterleave"})


def register() -> None:
    """Puts Tilewise's experts in the place of vLLM's unquantised ones.

    Calling it again changes nothing. It never raises: a vLLM that it does not know keeps its own
    experts.
    """
    log = logger("vllm")
    if switched_off(SWITCH, log):
        log.info("tilewise: off, %s=%s", SWITCH, os.environ[SWITCH])
        return
    try:
        registry = import_module("vllm.model_executor.custom_op").op_registry_oot
        replaced = _find(_METHOD)
        present = registry.get(replaced.__name__)
        if getattr(present, "is_tilewise", False):
            return
        if present is not None:
            log.warning("tilewise: not used, %s replaces vLLM's experts already", present)
            return
        reason = mismatch()
        if reason is not None:
            log.warning("tilewise: not used, this vLLM differs from what it was written for: %s",
                        reason)  # fmt: skip
            return
        method = import_module("tilewise.integrations.vllm_experts").TilewiseMoEMethod
        name = replaced.name
        replaced.register_oot(method)
        # Registering renames the op; `custom_ops` of vLLM's configuration names the original.
        method.name = name
        log.info(
            "tilewise: on for unquantised experts, %s=0 switches it off; quantised layers, and "
            "models that call vLLM's fused_experts themselves, never ask it",
            SWITCH,
        )
        if new := additions():
            log.info("tilewise: unknown to it in this vLLM: %s", ", ".join(new))
    except Exception as error:
        log.warning("tilewise: not used, %s: %s", type(error).__name__, error)


def mismatch() -> str | None:
    """What this vLLM lacks or has changed of what the plug-in relies on; None if nothing."""
    for name, parameters in FUNCTIONS.items():
        try:
            found = tuple(inspect.signature(_function(name)).parameters)
        except (ImportError, AttributeError):
            return f"it has no {name}"
        if found != parameters:
            return f"{name} takes {', '.join(found)}"
    for name, members in MEMBERS.items():
        try:
            owner = _find(name)
        except (ImportError, AttributeError):
            return f"it has no {name}"
        # A dataclass's field without a default is no attribute of the class.
        fields = {
            field for base in owner.__mro__ for field in vars(base).get("__annotations__", ())
        }
        for member in members:
            if member not in fields and not hasattr(owner, member):
                return f"{name} has no {member}"
    abstract = set(_find(f"{_KERNEL}:FusedMoEExpertsModular").__abstractmethods__)
    ours = {*SUPPORTS, "apply", "workspace_shapes", "finalize_weight_and_reduce_impl"}
    unknown = abstract - ours
    return f"its experts must define {', '.join(sorted(unknown))}" if unknown else None


def additions() -> list[str]:
    """Names of this vLLM that none of the releases we know has."""
    found = []
    for name, known in KNOWN.items():
        owner = _find(name)
        names = (
            {field.name for field in dataclasses.fields(owner)}
            if dataclasses.is_dataclass(owner)
            else set(dir(owner))
        )
        found += [n for n in sorted(names - known) if not n.startswith("_")]
    return found


def translate(
    name: str, limit: float | None, alpha: float | None, beta: float | None
) -> tuple[Activation, str] | str:
    """An activation of vLLM as ours, computed as vLLM computes it.

    Args:
        name: value of vLLM's `MoEActivation`.
        limit, alpha, beta: clamp, slope and offset from the layer's configuration.

    Returns:
        The activation and the layout of gate and up rows, or the reason why Tilewise has none.
    """
    given = (limit, alpha, beta)
    if name == "swigluoai":
        # vLLM's kernel has the numbers of gpt-oss built in.
        theirs = (SWIGLU_OAI.limit, SWIGLU_OAI.alpha, SWIGLU_OAI.beta)
        if any(a not in (None, b) for a, b in zip(given, theirs, strict=True)):
            return f"activation swigluoai with limit, alpha, beta {given} instead of {theirs}"
        return SWIGLU_OAI, "interleaved"
    if limit is not None and limit <= 0:
        return f"activation {name} with limit {limit}"
    if name == "swigluoai_uninterleave":
        if limit is None:
            return "activation swigluoai_uninterleave without a limit"
        slope, offset = (1.0 if alpha is None else alpha), (0.0 if beta is None else beta)
        return Activation("swiglu", alpha=slope, beta=offset, limit=limit), "gate_up"
    if name not in _PLAIN:
        return f"activation {name}"
    if limit is None:
        return _PLAIN[name], "gate_up"
    if name == "silu":
        return Activation("swiglu", limit=limit), "gate_up"
    return f"activation {name} with limit {limit}"


def _find(name: str) -> Any:
    module, _, path = name.partition(":")
    found: Any = import_module(module)
    for part in path.split("."):
        found = getattr(found, part)
    return found


def _function(name: str) -> Any:
    """The plain function, whether it is a method, a class method or a static one."""
    owner, _, attribute = name.rpartition(".")
    found = inspect.getattr_static(_find(owner), attribute)
    return getattr(found, "__func__", found)
