"""The only file that registers torch operators: schemas, fakes, and which code serves which device.

Operators are opaque and coarse, so `torch.compile` neither traces a kernel nor specialises on the
number of tokens. `Library` is used instead of `custom_op` for its overhead: 2 against 15
microseconds a call.
"""

from __future__ import annotations

from typing import Any

import torch

from ..ragged import Ragged
from . import cpu
from .activation import Activation
from .forward import check_buffers, forward_into
from .launch import on_device
from .plan import count_ints, plan_into
from .route import route_into
from .weights import ExpertWeights

lib = torch.library.Library("tilewise", "FRAGMENT")

# Quantised tensors are in the schema from the start, so that formats to come don't change it.
_WEIGHTS = """
    Tensor? gate, Tensor up, Tensor down,
    Tensor? gate_bias, Tensor? up_bias, Tensor? down_bias,
    Tensor? gate_scale, Tensor? up_scale, Tensor? down_scale,
    Tensor? gate_zero, Tensor? up_zero, Tensor? down_zero, str weight_format"""
_OPTIONS = """
    Tensor? expert_map, str activation, float alpha, float beta, float? limit,
    bool apply_router_weight_on_input, bool reduce, bool batch_invariant, str config"""

lib.define(
    "route(Tensor router_logits, int top_k, str scoring_func, bool renormalize, "
    "Tensor? e_score_correction_bias, int num_expert_group, int topk_group, "
    "float routed_scaling_factor) -> (Tensor, Tensor)"
)
lib.define(
    "plan(Tensor topk_ids, int num_local_experts, Tensor? expert_map) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)
lib.define(
    f"fused_experts(Tensor hidden_states, {_WEIGHTS}, Tensor topk_weights, Tensor topk_ids, "
    f"{_OPTIONS}) -> Tensor"
)
lib.define(
    "fused_experts_out(Tensor(a!) out, Tensor(b!)? workspace, Tensor hidden_states, "
    f"{_WEIGHTS}, Tensor topk_weights, Tensor topk_ids, {_OPTIONS}) -> ()"
)


# ---------------------------------------------------------------- route


def _route_empty(router_logits: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (router_logits.shape[0], top_k)
    return (
        router_logits.new_empty(shape, dtype=torch.float32),
        router_logits.new_empty(shape, dtype=torch.int32),
    )


def _route_accelerator(router_logits: torch.Tensor, top_k: int, *options: Any) -> Any:
    weights, ids = _route_empty(router_logits, top_k)
    with on_device(router_logits.device):
        route_into(weights, ids, router_logits, top_k, *options)
    return weights, ids


def _route_cpu(
    router_logits: torch.Tensor,
    top_k: int,
    scoring_func: str,
    renormalize: bool,
    e_score_correction_bias: torch.Tensor | None,
    num_expert_group: int,
    topk_group: int,
    routed_scaling_factor: float,
) -> Any:
    return cpu.route(
        router_logits,
        top_k,
        scoring_func=scoring_func,
        renormalize=renormalize,
        e_score_correction_bias=e_score_correction_bias,
        num_expert_group=num_expert_group or None,
        topk_group=topk_group or None,
        routed_scaling_factor=routed_scaling_factor,
    )


def _route_fake(router_logits: torch.Tensor, top_k: int, *options: Any) -> Any:
    return _route_empty(router_logits, top_k)


# ---------------------------------------------------------------- plan


def _plan_empty(topk_ids: torch.Tensor, num_local_experts: int) -> tuple[torch.Tensor, ...]:
    n = topk_ids.numel()
    sizes = (num_local_experts, num_local_experts + 1, n, n)
    return tuple(topk_ids.new_empty(size, dtype=torch.int32) for size in sizes)


def _plan_accelerator(
    topk_ids: torch.Tensor, num_local_experts: int, expert_map: torch.Tensor | None
) -> Any:
    ragged = Ragged(*_plan_empty(topk_ids, num_local_experts))
    num_experts = num_local_experts if expert_map is None else expert_map.shape[0]
    counts = topk_ids.new_empty(count_ints(topk_ids.numel(), num_local_experts), dtype=torch.int32)
    if expert_map is not None:
        expert_map = expert_map.contiguous()  # The kernels index it without a stride.
    with on_device(topk_ids.device):
        plan_into(ragged, counts, topk_ids, num_experts, expert_map)
    return ragged.sizes, ragged.offsets, ragged.gather, ragged.scatter


def _plan_cpu(
    topk_ids: torch.Tensor, num_local_experts: int, expert_map: torch.Tensor | None
) -> Any:
    return cpu.plan(topk_ids, num_local_experts, expert_map=expert_map)


def _plan_fake(
    topk_ids: torch.Tensor, num_local_experts: int, expert_map: torch.Tensor | None
) -> Any:
    return _plan_empty(topk_ids, num_local_experts)


# ---------------------------------------------------------------- fused_experts


def _out_shape(
    hidden_states: torch.Tensor, topk_ids: torch.Tensor, reduce: bool
) -> tuple[Any, ...]:
    num_tokens, hidden_size = hidden_states.shape
    return (num_tokens, hidden_size) if reduce else (num_tokens, topk_ids.shape[1], hidden_size)


def fused_experts_accelerator(
    hidden_states: torch.Tensor,
    gate: torch.Tensor | None,
    up: torch.Tensor,
    down: torch.Tensor,
    gate_bias: torch.Tensor | None,
    up_bias: torch.Tensor | None,
    down_bias: torch.Tensor | None,
    gate_scale: torch.Tensor | None,
    up_scale: torch.Tensor | None,
    down_scale: torch.Tensor | None,
    gate_zero: torch.Tensor | None,
    up_zero: torch.Tensor | None,
    down_zero: torch.Tensor | None,
    weight_format: str,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    expert_map: torch.Tensor | None,
    activation: str,
    alpha: float,
    beta: float,
    limit: float | None,
    apply_router_weight_on_input: bool,
    reduce: bool,
    batch_invariant: bool,
    config: str,
    out: torch.Tensor | None = None,
    workspace: torch.Tensor | None = None,
) -> torch.Tensor:
    _require_dense(weight_format)
    if out is None:
        out = hidden_states.new_empty(_out_shape(hidden_states, topk_ids, reduce))
    forward_into(
        out, workspace, hidden_states, gate, up, down, gate_bias, up_bias, down_bias,
        topk_weights, topk_ids, Activation(activation, alpha, beta, limit), expert_map,
        apply_router_weight_on_input, reduce, batch_invariant, config,
    )  # fmt: skip
    return out


def _fused_experts_out_accelerator(
    out: torch.Tensor, workspace: torch.Tensor | None, *args: Any
) -> None:
    fused_experts_accelerator(*args, out=out, workspace=workspace)  # type: ignore[misc]


def _fused_experts_cpu(
    hidden_states: torch.Tensor,
    gate: torch.Tensor | None,
    up: torch.Tensor,
    down: torch.Tensor,
    gate_bias: torch.Tensor | None,
    up_bias: torch.Tensor | None,
    down_bias: torch.Tensor | None,
    gate_scale: torch.Tensor | None,
    up_scale: torch.Tensor | None,
    down_scale: torch.Tensor | None,
    gate_zero: torch.Tensor | None,
    up_zero: torch.Tensor | None,
    down_zero: torch.Tensor | None,
    weight_format: str,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    expert_map: torch.Tensor | None,
    activation: str,
    alpha: float,
    beta: float,
    limit: float | None,
    apply_router_weight_on_input: bool,
    reduce: bool,
    batch_invariant: bool,
    config: str,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    _require_dense(weight_format)
    return cpu.fused_experts(
        hidden_states,
        ExpertWeights(gate, up, down, gate_bias, up_bias, down_bias),
        topk_weights,
        topk_ids,
        activation=Activation(activation, alpha, beta, limit),
        expert_map=expert_map,
        apply_router_weight_on_input=apply_router_weight_on_input,
        reduce=reduce,
        batch_invariant=batch_invariant,
        out=out,
    )


def _fused_experts_out_cpu(out: torch.Tensor, workspace: torch.Tensor | None, *args: Any) -> None:
    # The CPU needs no scratch memory, but what a GPU would refuse should not pass here.
    check_buffers(
        out, workspace, *args[:4], topk_ids=args[15], reduce=args[22], batch_invariant=args[23],
        config=args[24],
    )  # fmt: skip
    _fused_experts_cpu(*args, out=out)  # type: ignore[misc]


def _fused_experts_fake(hidden_states: torch.Tensor, *args: Any) -> torch.Tensor:
    topk_ids, reduce = args[14], args[21]
    return hidden_states.new_empty(_out_shape(hidden_states, topk_ids, reduce))


def _require_dense(weight_format: str) -> None:
    if weight_format != "dense":
        raise NotImplementedError(
            f"weight_format={weight_format!r} is not supported; allowed: 'dense'. "
            "Dequantise the weights first."
        )


# ---------------------------------------------------------------- registration

lib.impl("route", _route_accelerator, "CUDA")
lib.impl("route", _route_cpu, "CPU")
lib.impl("plan", _plan_accelerator, "CUDA")
lib.impl("plan", _plan_cpu, "CPU")
lib.impl("fused_experts", fused_experts_accelerator, "CUDA")
lib.impl("fused_experts", _fused_experts_cpu, "CPU")
lib.impl("fused_experts_out", _fused_experts_out_accelerator, "CUDA")
lib.impl("fused_experts_out", _fused_experts_out_cpu, "CPU")
torch.library.register_fake("tilewise::route", _route_fake, lib=lib)
torch.library.register_fake("tilewise::plan", _plan_fake, lib=lib)
torch.library.register_fake("tilewise::fused_experts", _fused_experts_fake, lib=lib)
torch.library.register_fake("tilewise::fused_experts_out", lambda *args: None, lib=lib)


def _no_backward(ctx: Any, *grads: Any) -> Any:
    raise NotImplementedError(
        "tilewise has no backward pass: it runs inference. Wrap the call in torch.no_grad() or "
        "torch.inference_mode(), or train with the framework's own experts."
    )


torch.library.register_autograd("tilewise::route", _no_backward, lib=lib)
torch.library.register_autograd("tilewise::fused_experts", _no_backward, lib=lib)
