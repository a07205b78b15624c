"""The layer on an accelerator: plan, two products, combine; or two launches for a few tokens."""

from __future__ import annotations

import torch

from ..target import Target
from .activation import Activation
from .combine import combine_into
from .decode import decode_into
from .experts import grouped_gemm_into, suits_descriptor
from .plan import carve_plan, plan_into
from .schedule import LayerConfig, LayerProblem, given_schedule, schedule
from .workspace import buffer_sizes, carve


def problem_of(
    hidden_states: torch.Tensor,
    gate: torch.Tensor | None,
    up: torch.Tensor,
    down: torch.Tensor,
    topk_ids: torch.Tensor,
    reduce: bool,
    batch_invariant: bool,
) -> LayerProblem:
    """The host-side facts of a call."""
    num_experts, intermediate_size, hidden_size = up.shape
    descriptors = (
        suits_descriptor(up)
        and suits_descriptor(down)
        and (gate is None or suits_descriptor(gate))
    )
    return LayerProblem(
        topk_ids.shape[0],
        topk_ids.shape[1],
        num_experts,
        hidden_size,
        intermediate_size,
        hidden_states.element_size(),
        gate is not None,
        descriptors,
        reduce,
        batch_invariant,
    )


def forward_into(
    out: torch.Tensor,
    workspace: torch.Tensor | None,
    hidden_states: torch.Tensor,
    gate: torch.Tensor | None,
    up: torch.Tensor,
    down: torch.Tensor,
    gate_bias: torch.Tensor | None,
    up_bias: torch.Tensor | None,
    down_bias: torch.Tensor | None,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    activation: Activation,
    expert_map: torch.Tensor | None,
    apply_router_weight_on_input: bool,
    reduce: bool,
    batch_invariant: bool,
    config: str,
    target: Target | None = None,
) -> None:
    """Writes `out`; allocates scratch memory only where `workspace` is None.

    Args:
        out: [num_tokens, hidden_size], or [num_tokens, top_k, hidden_size] if not `reduce`.
        workspace: uint8, 256-byte aligned, at least `workspace_size` bytes; contents don't matter.
        config: a `LayerConfig` as JSON, or "" to choose.
        target: the machine; probed if None.
        Others: as `tilewise.fused_experts`, weights as views.
    """
    num_tokens, top_k = topk_ids.shape
    if num_tokens == 0:
        return
    if target is None:
        target = Target.probe(hidden_states.device)
    problem = problem_of(hidden_states, gate, up, down, topk_ids, reduce, batch_invariant)
    layer = given_schedule(config, problem, target) if config else schedule(problem, target)
    sizes = buffer_sizes(problem, layer)
    if workspace is None:
        workspace = torch.empty(sum(sizes), dtype=torch.uint8, device=hidden_states.device)
    elif workspace.numel() < sum(sizes):
        raise ValueError(
            f"workspace has {workspace.numel()} bytes, this call needs {sum(sizes)}: "
            "size it with tilewise.workspace_size()"
        )
    ints, act, rows = carve(workspace, sizes, hidden_states.dtype)
    num_experts = up.shape[0] if expert_map is None else expert_map.shape[0]
    num_rows = num_tokens * top_k
    if layer.path == "decode":
        decode_into(
            out, act, hidden_states, gate, up, down, gate_bias, up_bias, down_bias,
            topk_weights, topk_ids, activation, expert_map, num_experts,
            apply_router_weight_on_input, layer.gate_up, layer.down,  # type: ignore[arg-type]
        )  # fmt: skip
        return
    _grouped_into(
        out, ints, act, rows, num_rows, num_experts, layer, target,
        hidden_states, gate, up, down, gate_bias, up_bias, down_bias,
        topk_weights, topk_ids, activation, expert_map, apply_router_weight_on_input,
    )  # fmt: skip


def _grouped_into(
    out: torch.Tensor,
    ints: torch.Tensor,
    act: torch.Tensor,
    rows: torch.Tensor,
    num_rows: int,
    num_experts: int,
    layer: LayerConfig,
    target: Target,
    hidden_states: torch.Tensor,
    gate: torch.Tensor | None,
    up: torch.Tensor,
    down: torch.Tensor,
    gate_bias: torch.Tensor | None,
    up_bias: torch.Tensor | None,
    down_bias: torch.Tensor | None,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    activation: Activation,
    expert_map: torch.Tensor | None,
    apply_router_weight_on_input: bool,
) -> None:
    num_local, intermediate_size, hidden_size = up.shape
    ragged = carve_plan(ints, num_rows, num_local)
    act = act[: num_rows * intermediate_size].view(num_rows, intermediate_size)
    rows = rows[: num_rows * hidden_size].view(num_rows, hidden_size)
    plan_into(ragged, topk_ids, num_experts, expert_map)
    grouped_gemm_into(
        act, hidden_states, gate, up, ragged, layer.gate_up, target,  # type: ignore[arg-type]
        gathered=True, top_k=topk_ids.shape[1], gate_bias=gate_bias, up_bias=up_bias,
        row_weights=topk_weights if apply_router_weight_on_input else None, activation=activation,
    )  # fmt: skip
    grouped_gemm_into(
        rows, act, None, down, ragged, layer.down, target,  # type: ignore[arg-type]
        gathered=False, up_bias=down_bias,
    )  # fmt: skip
    combine_into(
        out, rows, ragged.scatter, topk_weights, router_weight=not apply_router_weight_on_input
    )
