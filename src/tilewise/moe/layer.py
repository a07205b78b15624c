"""The MoE layer: functions on tensors, and the modules that hold weights."""

from __future__ import annotations

import torch
from torch import nn

from ..models import MoEShape
from ..ragged import Ragged
from . import ops
from .activation import SWIGLU, Activation
from .checks import (
    ID_DTYPES,
    check_activation,
    check_bools,
    check_config,
    check_experts_args,
    check_ints,
    check_route_args,
    check_shape,
    check_weights,
)
from .schedule import LayerConfig
from .tensors import check_tensors
from .weights import ExpertWeights


def route(
    router_logits: torch.Tensor,
    top_k: int,
    *,
    scoring_func: str = "softmax",
    renormalize: bool = True,
    e_score_correction_bias: torch.Tensor | None = None,
    num_expert_group: int | None = None,
    topk_group: int | None = None,
    routed_scaling_factor: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Chooses each token's experts.

    Ties go to the lower expert index. Ids are unique within a token and in range whatever the
    logits; a NaN logit ranks lowest and its weight is 0.

    Args:
        router_logits: [num_tokens, num_experts], fp32, fp16 or bf16.
        top_k: experts per token.
        scoring_func: "softmax" over all logits, "topk_softmax" over the chosen ones, or "sigmoid".
        renormalize: divide the chosen scores by their sum.
        e_score_correction_bias: [num_experts], added to the scores for choosing only (DeepSeek-V3,
            arXiv 2412.19437, section 2.1.2).
        num_expert_group: groups of consecutive experts for group-limited routing (DeepSeek-V2,
            arXiv 2405.04434, section 2.2.2); a group ranks by its best expert, or with a bias by
            the sum of its two best.
        topk_group: groups a token may choose from.
        routed_scaling_factor: multiplies the weights last.

    Returns:
        topk_weights fp32 and topk_ids int32, both [num_tokens, top_k], best first.

    Raises:
        TypeError: an argument of another type.
        ValueError: sizes or options that don't fit together.
    """
    check_bools(renormalize=renormalize)
    check_tensors(
        ("e_score_correction_bias",), router_logits=router_logits,
        e_score_correction_bias=e_score_correction_bias,
    )  # fmt: skip
    if router_logits.dim() != 2:
        raise ValueError(
            f"router_logits must be [num_tokens, num_experts], got {tuple(router_logits.shape)}"
        )
    bias_shape = None if e_score_correction_bias is None else e_score_correction_bias.shape
    check_route_args(
        router_logits.shape[1], top_k, scoring_func, num_expert_group, topk_group, bias_shape
    )
    weights, ids = torch.ops.tilewise.route(
        router_logits,
        top_k,
        scoring_func,
        renormalize,
        e_score_correction_bias,
        num_expert_group or 0,
        topk_group or 0,
        routed_scaling_factor,
    )
    return weights, ids


def plan(
    topk_ids: torch.Tensor,
    num_experts: int,
    *,
    expert_map: torch.Tensor | None = None,
    num_local_experts: int | None = None,
) -> Ragged:
    """Groups assignments by expert, on the device, in one launch and without a sync.

    Args:
        topk_ids: int32 or int64 [num_tokens, top_k], global ids; -1 and >= num_experts are skipped.
        num_experts: experts in the model.
        expert_map: int32 [num_experts], global -> local or -1.
        num_local_experts: experts on this device; `num_experts` without a map.

    Returns:
        A `Ragged` of local experts; its sources are assignments, token * top_k + slot, in order.
    """
    check_tensors(("expert_map",), topk_ids=topk_ids, expert_map=expert_map)
    check_ints(num_experts=num_experts)
    if num_local_experts is not None:
        check_ints(num_local_experts=num_local_experts)
    if expert_map is not None and expert_map.shape != (num_experts,):
        raise ValueError(
            f"expert_map must be [num_experts={num_experts}], got {tuple(expert_map.shape)}"
        )
    if topk_ids.dim() != 2 or topk_ids.dtype not in ID_DTYPES:
        raise ValueError(
            "topk_ids must be int32 or int64 [num_tokens, top_k], got "
            f"{topk_ids.dtype} {tuple(topk_ids.shape)}"
        )
    local = num_experts if num_local_experts is None else num_local_experts
    if local < 1:
        raise ValueError(f"num_local_experts={local} must be at least 1")
    if expert_map is None and local != num_experts:
        raise ValueError("num_local_experts differs from num_experts: pass an expert_map")
    return Ragged(*torch.ops.tilewise.plan(topk_ids, local, expert_map))


def fused_experts(
    hidden_states: torch.Tensor,
    weights: ExpertWeights,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    *,
    activation: Activation = SWIGLU,
    expert_map: torch.Tensor | None = None,
    apply_router_weight_on_input: bool = False,
    reduce: bool = True,
    batch_invariant: bool = False,
    config: LayerConfig | None = None,
    out: torch.Tensor | None = None,
    workspace: torch.Tensor | None = None,
) -> torch.Tensor:
    """The routed experts of a layer: gate and up products, activation, down product, weighted sum.

    Nothing here reads device data on the host; a call can be captured in a CUDA graph and replayed
    with other routings. The same input gives the same bits, run after run.

    Args:
        hidden_states: [num_tokens, hidden_size], any strides.
        weights: the experts on this device, as views.
        topk_weights: [num_tokens, top_k], fp32, fp16 or bf16.
        topk_ids: [num_tokens, top_k], int32 or int64, global ids. -1 and ids past the last expert
            are skipped: they contribute exactly 0.
        activation: what happens between the products.
        expert_map: int32 [num_experts], global -> local or -1 for experts held elsewhere.
        apply_router_weight_on_input: scale an expert's input by its weight instead of its output
            (Llama 4).
        reduce: False returns each slot's weighted output, for a host that sums them itself.
        batch_invariant: a token's bits do not depend on the other tokens of the call.
        config: overrides the choice of path and tiles.
        out: written and returned if given; [num_tokens, hidden_size], or with the slots between.
        workspace: scratch memory, uint8, `workspace_size()` bytes; needs `out`.

    Returns:
        [num_tokens, hidden_size], or [num_tokens, top_k, hidden_size] without `reduce`; dtype of
        `hidden_states`.

    Raises:
        TypeError: an argument of another type.
        ValueError: shapes, dtypes or options that don't fit together, or a config this machine
            cannot run.
        NotImplementedError: `out` under autograd; without it, the backward pass raises it.
    """
    check_experts_args(
        hidden_states,
        weights,
        topk_weights,
        topk_ids,
        activation=activation,
        expert_map=expert_map,
        apply_router_weight_on_input=apply_router_weight_on_input,
    )
    check_config(config)
    check_bools(
        apply_router_weight_on_input=apply_router_weight_on_input,
        reduce=reduce,
        batch_invariant=batch_invariant,
    )
    tensors = (
        hidden_states, weights.gate, weights.up, weights.down, topk_weights, topk_ids, expert_map,
    )  # fmt: skip
    args = (
        hidden_states,
        weights.gate,
        weights.up,
        weights.down,
        weights.gate_bias,
        weights.up_bias,
        weights.down_bias,
        None,
        None,
        None,
        None,
        None,
        None,
        "dense",
        topk_weights,
        topk_ids,
        expert_map,
        activation.kind,
        activation.alpha,
        activation.beta,
        activation.limit,
        apply_router_weight_on_input,
        reduce,
        batch_invariant,
        "" if config is None else config.to_json(),
    )
    wants_grad = _requires_grad(hidden_states, weights, topk_weights)
    if out is None:
        if workspace is not None:
            raise ValueError("workspace is given without out: pass out too, or neither")
        if _plain_call(wants_grad, *tensors):
            return ops.fused_experts_accelerator(*args)
        result: torch.Tensor = torch.ops.tilewise.fused_experts(*args)
        return result
    if wants_grad is not None:
        raise NotImplementedError(
            f"out is given, but {wants_grad} requires grad: writing to out has no derivative. "
            "Wrap the call in torch.no_grad() or torch.inference_mode()"
        )
    check_tensors(("workspace",), out=out, workspace=workspace)
    shape = (hidden_states.shape[0], *(() if reduce else (topk_ids.shape[1],)), weights.hidden_size)
    if tuple(out.shape) != shape or out.dtype != hidden_states.dtype or out.stride(-1) != 1:
        raise ValueError(
            f"out must be {shape} {hidden_states.dtype} with unit last stride, got "
            f"{tuple(out.shape)} {out.dtype} strides {out.stride()}"
        )
    if _plain_call(wants_grad, *tensors, out):
        return ops.fused_experts_accelerator(*args, out=out, workspace=workspace)
    torch.ops.tilewise.fused_experts_out(out, workspace, *args)
    return out


def _requires_grad(
    hidden_states: torch.Tensor, weights: ExpertWeights, topk_weights: torch.Tensor
) -> str | None:
    """The name of an argument that autograd wants a gradient of; None in inference."""
    if not torch.is_grad_enabled():
        return None
    if hidden_states.requires_grad:
        return "hidden_states"
    if topk_weights.requires_grad:
        return "topk_weights"
    for name in ("gate", "up", "down", "gate_bias", "up_bias", "down_bias"):
        tensor: torch.Tensor | None = getattr(weights, name)
        if tensor is not None and tensor.requires_grad:
            return name
    return None


_PLAIN_TYPES = frozenset((torch.Tensor, nn.Parameter, type(None)))


def _plain_call(wants_grad: str | None, x: torch.Tensor, *others: torch.Tensor | None) -> bool:
    """Whether nothing listens to the dispatcher: going past it saves 20 us of CPU time a call."""
    return (
        x.is_cuda
        and wants_grad is None
        and type(x) in _PLAIN_TYPES
        and _PLAIN_TYPES.issuperset(map(type, others))
        and not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._len_torch_function_stack() == 0
    )


def fused_moe(
    hidden_states: torch.Tensor,
    router_weight: torch.Tensor,
    weights: ExpertWeights,
    top_k: int,
    *,
    activation: Activation = SWIGLU,
    scoring_func: str = "softmax",
    renormalize: bool = True,
    e_score_correction_bias: torch.Tensor | None = None,
    num_expert_group: int | None = None,
    topk_group: int | None = None,
    routed_scaling_factor: float = 1.0,
    shared_experts: nn.Module | None = None,
    expert_map: torch.Tensor | None = None,
    apply_router_weight_on_input: bool = False,
    batch_invariant: bool = False,
) -> torch.Tensor:
    """The whole layer: router product, `route`, `fused_experts`, shared experts if there are any.

    Args:
        hidden_states: [num_tokens, hidden_size].
        router_weight: [num_experts, hidden_size].
        shared_experts: a module whose output on `hidden_states` is added to every token.
        Others: as `route` and `fused_experts`.

    Returns:
        [num_tokens, hidden_size], dtype of `hidden_states`.
    """
    check_weights(weights)
    check_tensors(
        ("expert_map",), hidden_states=hidden_states, router_weight=router_weight,
        expert_map=expert_map,
    )  # fmt: skip
    num_experts = weights.num_local_experts if expert_map is None else expert_map.shape[0]
    if router_weight.dim() != 2 or router_weight.shape[0] != num_experts:
        raise ValueError(
            f"router_weight is {tuple(router_weight.shape)}, but there are {num_experts} experts: "
            "it must be [num_experts, hidden_size], and experts held elsewhere need an expert_map"
        )
    logits = nn.functional.linear(hidden_states, router_weight.to(hidden_states.dtype))
    topk_weights, topk_ids = route(
        logits,
        top_k,
        scoring_func=scoring_func,
        renormalize=renormalize,
        e_score_correction_bias=e_score_correction_bias,
        num_expert_group=num_expert_group,
        topk_group=topk_group,
        routed_scaling_factor=routed_scaling_factor,
    )
    output = fused_experts(
        hidden_states,
        weights,
        topk_weights,
        topk_ids,
        activation=activation,
        expert_map=expert_map,
        apply_router_weight_on_input=apply_router_weight_on_input,
        batch_invariant=batch_invariant,
    )
    return output if shared_experts is None else output + shared_experts(hidden_states)


class FusedExperts(nn.Module):
    """Routed experts that own their weights, `[gate; up]` and down.

    Args:
        shape: sizes of the layer.
        activation: what happens between the products.
        dtype: of weights and outputs.
        device: of the weights.
    """

    def __init__(
        self,
        shape: MoEShape,
        *,
        activation: Activation = SWIGLU,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        check_shape(shape)
        check_activation(activation)
        self.shape = shape
        self.activation = activation
        e, h, i = shape.num_experts, shape.hidden_size, shape.intermediate_size
        rows = 2 * i if activation.is_gated else i
        self.gate_up_proj = nn.Parameter(
            torch.empty(e, rows, h, dtype=dtype, device=device), requires_grad=False
        )
        self.down_proj = nn.Parameter(
            torch.empty(e, h, i, dtype=dtype, device=device), requires_grad=False
        )
        nn.init.normal_(self.gate_up_proj, std=h**-0.5)
        nn.init.normal_(self.down_proj, std=i**-0.5)

    @property
    def weights(self) -> ExpertWeights:
        if self.activation.is_gated:
            return ExpertWeights.from_gate_up(self.gate_up_proj, self.down_proj)
        return ExpertWeights.from_ungated(self.gate_up_proj, self.down_proj)

    def forward(
        self, hidden_states: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor
    ) -> torch.Tensor:
        """[num_tokens, hidden_size] -> [num_tokens, hidden_size]; see `fused_experts`."""
        return fused_experts(
            hidden_states, self.weights, topk_weights, topk_ids, activation=self.activation
        )


class FusedMoE(FusedExperts):
    """Router and routed experts in one module, with optional shared experts.

    Args:
        shape: sizes of the layer.
        scoring_func: see `route`. renormalize: see `route`.
        shared_experts: a module added to every token's output.
        Others: as `FusedExperts`.
    """

    def __init__(
        self,
        shape: MoEShape,
        *,
        activation: Activation = SWIGLU,
        scoring_func: str = "softmax",
        renormalize: bool = True,
        shared_experts: nn.Module | None = None,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(shape, activation=activation, dtype=dtype, device=device)
        self.scoring_func = scoring_func
        self.renormalize = renormalize
        self.shared_experts = shared_experts
        self.router_weight = nn.Parameter(
            torch.empty(shape.num_experts, shape.hidden_size, dtype=dtype, device=device),
            requires_grad=False,
        )
        nn.init.normal_(self.router_weight, std=shape.hidden_size**-0.5)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        """[..., hidden_size] -> [..., hidden_size]."""
        check_tensors(hidden_states=hidden_states)
        if hidden_states.shape[-1] != self.shape.hidden_size:
            raise ValueError(
                f"hidden_states must end in hidden_size={self.shape.hidden_size}, got "
                f"{tuple(hidden_states.shape)}"
            )
        flat = hidden_states.reshape(-1, self.shape.hidden_size)
        output = fused_moe(
            flat,
            self.router_weight,
            self.weights,
            self.shape.top_k,
            activation=self.activation,
            scoring_func=self.scoring_func,
            renormalize=self.renormalize,
            shared_experts=self.shared_experts,
        )
        return output.view(hidden_states.shape)
