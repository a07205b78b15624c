"""Tilewise as a plug-in of SGLang, 0.5.11 and newer: the experts of unquantised MoE layers.

Installing Tilewise beside SGLang is enough: SGLang finds `register` by its entry point and calls it
in every process. `TILEWISE_SGLANG=0` switches it off. What Tilewise does not serve runs SGLang's
own function, and the log says why.
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable
from dataclasses import fields
from pkgutil import resolve_name
from typing import Any

import torch

from ..moe.activation import GEGLU, GEGLU_TANH, GELU, RELU2, SILU, SWIGLU, Activation
from ..moe.layer import fused_experts
from ..moe.weights import ExpertWeights
from . import host

SWITCH = "TILEWISE_SGLANG"
DTYPES = (torch.bfloat16, torch.float16)
# Calls up to this size are prepared at a layer's first call: more than a default prefill chunk.
MAX_TOKENS = 16384

log = host.logger("sglang")

_KEY = ("none", "triton")
_MOE = "sglang.srt.layers.moe"
_POOL = f"{_MOE}.moe_runner.base:FusedOpPool"
_CONFIG = f"{_MOE}.moe_runner.base:MoeRunnerConfig"
_TRITON = f"{_MOE}.moe_runner.triton:fused_experts_none_to_triton"
_STANDARD = f"{_MOE}.token_dispatcher.standard"
_COMBINE = f"{_STANDARD}:StandardCombineInput"
_INVARIANT = "sglang.srt.batch_invariant_ops:is_batch_invariant_mode_enabled"
_NCCL = "sglang.srt.distributed.device_communicators.pynccl_allocator"
_SYMMETRIC = f"{_NCCL}:is_symmetric_memory_enabled"

# What we rely on, as "module:name": of a function its parameters, of a class its members. Checked
# when the plug-in loads, and in the tests against every release that we name as supported.
FUNCTIONS: dict[str, tuple[str, ...]] = {
    _TRITON: ("dispatch_output", "quant_info", "runner_config"),
    f"{_POOL}.get_fused_func": ("cls", "dispatch_name", "runner_name"),
    _INVARIANT: (),
    _SYMMETRIC: (),
}
MEMBERS = {
    _POOL: ("_fused_funcs",),
    _CONFIG: (
        "activation", "apply_router_weight_on_input", "gemm1_alpha", "gemm1_clamp_limit", "inplace",
        "is_gated", "no_combine", "routed_scaling_factor",
    ),
    f"{_MOE}.moe_runner.triton:TritonMoeQuantInfo": ("b13", "b2", "w13_weight", "w2_weight"),
    f"{_STANDARD}:StandardDispatchOutput": ("hidden_states", "hidden_states_scale", "topk_output"),
    _COMBINE: ("hidden_states",),
    f"{_MOE}.topk:StandardTopKOutput": ("topk_ids", "topk_weights"),
}  # fmt: skip

# Options that are honoured here or don't change the result. Any other that is not at its default,
# of releases to come too, leaves the layer to SGLang.
CONFIG_OPTIONS = frozenset({
    *MEMBERS[_CONFIG], "gate_up_interleaved", "gemm1_beta", "hidden_size",
    "intermediate_size_per_partition", "layer", "layer_id", "no_combine_keep_router_weight",
    "num_experts", "num_fused_shared_experts", "num_local_experts", "params_dtype",
    "routing_method_type", "runner_backend", "swiglu_limit", "top_k",
})  # fmt: skip
WEIGHT_OPTIONS = frozenset({"b13", "b2", "fuse_swiglu_interleaved", "w13_weight", "w2_weight"})

_GATED = {"gelu": GEGLU, "gelu_tanh": GEGLU_TANH}
_UNGATED = {"silu": SILU, "gelu": GELU, "relu2": RELU2}

_prepare = host.Preparation()
_say_once = host.Once(log.info)


def register() -> None:
    """Puts Tilewise in the place of SGLang's fused function for Triton experts.

    Calling it again changes nothing. It never raises: an unknown SGLang keeps its own experts.
    """
    if host.switched_off(SWITCH, log):
        log.info("tilewise: off, %s=%s", SWITCH, os.environ[SWITCH])
        return
    try:
        resolve_name(_TRITON)  # Registers SGLang's own function.
        functions = resolve_name(_POOL)._fused_funcs
        original = functions[_KEY]
        if getattr(original, "is_tilewise", False):
            return
        if (reason := mismatch()) is not None:
            log.warning("tilewise: not used, this SGLang is not the one it knows: %s", reason)
            return
        functions[_KEY] = fused_function(original)
        log.info(
            "tilewise: on for unquantised experts of the Triton runner, %s=0 switches it off; "
            "other runners, and models that call SGLang's fused_experts themselves, never ask it",
            SWITCH,
        )
    except Exception as error:
        log.warning("tilewise: not used, %s: %s", type(error).__name__, error)


def mismatch() -> str | None:
    """What this SGLang lacks or has changed of what the plug-in relies on; None if nothing."""
    for name in (*FUNCTIONS, *MEMBERS):
        try:
            found = resolve_name(name)
        except (ImportError, AttributeError):
            return f"it has no {name}"
        if name in FUNCTIONS:
            parameters = tuple(inspect.signature(getattr(found, "__func__", found)).parameters)
            if parameters != FUNCTIONS[name]:
                return f"{name} takes {', '.join(parameters)}"
        else:
            known = {key for base in found.__mro__ for key in inspect.get_annotations(base)}
            if missing := sorted(set(MEMBERS[name]) - known):
                return f"{name} has no {', '.join(missing)}"
    return None


def fused_function(original: Callable[..., Any]) -> Callable[..., Any]:
    """A function for SGLang's pool that calls `original` for what Tilewise does not serve."""
    combine, invariant, symmetric = map(resolve_name, (_COMBINE, _INVARIANT, _SYMMETRIC))

    def tilewise_experts(dispatch_output: Any, quant_info: Any, runner_config: Any) -> Any:
        reason = why_not(dispatch_output, quant_info, runner_config, symmetric())
        known = translate(runner_config) if reason is None else reason
        if not isinstance(known, str):
            try:
                weights = views(quant_info, *known)
                out = run(dispatch_output, weights, known[0], runner_config, bool(invariant()))
                return combine(out)
            except (ValueError, host.Unprepared) as error:  # Raised before anything runs.
                known = str(error)
        _say_once(f"tilewise: leaving experts to SGLang: {known}")
        return original(dispatch_output, quant_info, runner_config)

    tilewise_experts.is_tilewise = True  # type: ignore[attr-defined]
    return tilewise_experts


def translate(config: Any) -> tuple[Activation, str] | str:
    """The activation as SGLang computes it and the layout of rows, or why Tilewise has none."""
    name = config.activation
    keys = ("gemm1_alpha", "gemm1_clamp_limit", "swiglu_limit", "gemm1_beta")
    alpha, clamp, limit, beta = (getattr(config, key, None) for key in keys)
    if not config.is_gated or name != "silu":
        table = _GATED if config.is_gated else _UNGATED
        if name not in table:
            return f"activation {name}" + ("" if config.is_gated else " without a gate")
        if any(number is not None for number in (alpha, clamp, limit, beta)):
            return f"activation {name} with a clamp or a slope"
        return table[name], "gate_up"
    if alpha is not None:
        # SGLang adds 1 to up, whatever gemm1_beta says.
        if clamp is None or clamp <= 0 or limit is not None or beta not in (None, 1.0):
            return f"activation silu with {alpha=}, {clamp=}, {limit=}, {beta=}"
        # Before 0.5.15 the rows always are.
        layout = "interleaved" if getattr(config, "gate_up_interleaved", True) else "gate_up"
        return Activation("swiglu", alpha=alpha, beta=1.0, limit=clamp), layout
    if clamp is not None:
        return "gemm1_clamp_limit without gemm1_alpha: SGLang clamps after SiLU, Tilewise before"
    if beta not in (None, 0.0) or (limit is not None and limit <= 0):
        return f"activation silu with {limit=}, {beta=}"
    return (SWIGLU if limit is None else Activation("swiglu", limit=limit)), "gate_up"


def why_not(dispatch: Any, quant: Any, config: Any, symmetric: bool = False) -> str | None:
    """Why this call stays with SGLang, its activation aside; None if Tilewise serves it."""
    x, w13 = dispatch.hidden_states, getattr(quant, "w13_weight", None)
    if w13 is None:
        return f"weights in {type(quant).__name__}"
    if (changed := _changed(quant, WEIGHT_OPTIONS)) is not None:
        return f"quantised weights ({changed})"
    if (changed := _changed(config, CONFIG_OPTIONS)) is not None:
        return f"option {changed}"
    for name in ("hidden_states_scale", "hidden_states_pre_quant"):
        if getattr(dispatch, name, None) is not None:
            return "quantised hidden states"
    if x.dtype not in DTYPES or w13.dtype is not x.dtype:
        return f"hidden states in {x.dtype}, weights in {w13.dtype}"
    if not _runs_on(x.device):
        return f"device {x.device.type}"
    if not hasattr(dispatch.topk_output, "topk_ids"):
        return f"routing in {type(dispatch.topk_output).__name__}"
    if config.no_combine and config.inplace:
        return "no_combine with inplace"
    if config.apply_router_weight_on_input and quant.b13 is not None:
        return "apply_router_weight_on_input with a bias: SGLang weighs the bias too"
    if torch.version.hip is not None and config.routed_scaling_factor not in (None, 1.0):
        return "routed_scaling_factor on ROCm"
    if symmetric and not config.inplace and not config.no_combine:
        return "outputs in symmetric memory"
    return None


@functools.lru_cache
def _runs_on(device: torch.device) -> bool:
    if device.type != "cuda" or torch.version.hip is not None:
        return device.type in ("cuda", "cpu")
    return torch.cuda.get_device_capability(device) >= (8, 0)


def _changed(options: Any, known: frozenset[str]) -> str | None:
    """The first option that is not known here and not at its default."""
    names = (f.name for f in fields(options) if getattr(options, f.name) != f.default)
    return next((name for name in names if name not in known), None)


def views(quant: Any, activation: Activation, layout: str) -> ExpertWeights:
    """The layer's weights as ours; nothing that would keep their memory is kept."""
    if getattr(quant, "fuse_swiglu_interleaved", False):
        layout = "interleaved"
    return host.views(
        quant.w13_weight,
        quant.w2_weight,
        quant.b13,
        quant.b2,
        gated=activation.is_gated,
        layout=layout,
    )


def run(
    dispatch: Any, weights: ExpertWeights, activation: Activation, config: Any, invariant: bool
) -> torch.Tensor:
    """The call, after what it needs is compiled."""
    x, ids = dispatch.hidden_states, dispatch.topk_output.topk_ids
    scales, reduce = dispatch.topk_output.topk_weights, not config.no_combine
    on_input = config.apply_router_weight_on_input
    options: dict[str, Any] = {"reduce": reduce, "batch_invariant": invariant}
    options["apply_router_weight_on_input"] = on_input
    tracing = torch.compiler.is_compiling()
    if not tracing:
        prepare(weights, activation, ids, scales, **options)
    factor = config.routed_scaling_factor
    scaled = reduce and factor not in (None, 1.0)
    if scaled and not on_input:
        scales = scales * factor
    elif not (reduce or on_input or getattr(config, "no_combine_keep_router_weight", False)):
        scales = torch.ones_like(scales)  # Whoever sums the slots weighs them.
    write_back = config.inplace and (tracing or x.stride(-1) != 1)
    with torch.no_grad():
        target = x if config.inplace and not write_back else None
        out = fused_experts(x, weights, scales, ids, activation=activation, out=target, **options)
        if scaled and on_input:
            out = out.mul_(factor)
        result: torch.Tensor = x.copy_(out) if write_back else out
    return result


def prepare(
    weights: ExpertWeights, act: Activation, ids: torch.Tensor, scales: torch.Tensor, **options: Any
) -> None:
    """Compiles what such calls can need, once a process, unless a CUDA graph is being captured."""
    num_tokens, top_k = ids.shape
    largest = max(MAX_TOKENS, 1 << max(num_tokens - 1, 0).bit_length())
    done = _prepare(
        weights, act, top_k, num_tokens, largest,
        topk_ids_dtype=ids.dtype, topk_weights_dtype=scales.dtype, **options,
    )  # fmt: skip
    if done is not None:
        log.info("tilewise: serving %s; %s", host.kind_of(weights, act.kind, top_k), done)
