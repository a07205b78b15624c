"""The layer on an accelerator: plan, two products, combine; or two launches for a few tokens."""

from __future__ import annotations

from typing import Any

import torch

from ..dispatch.config import FewActive, KernelConfig, StreamConfig
from ..target import Target
from . import replay
from .activation import Activation
from .combine import combine_into
from .decode import decode_down_into, decode_gate_up_into
from .experts import (
    MAX_RAGGED_ROWS,
    SplitScratch,
    grouped_gemm_into,
    pair_distance,
    suits_descriptor,
)
from .fused import fused_gemms_into
from .launch import INTERPRETED, Overlap, on_device, recording, tf32_allowed
from .permute import permute_into
from .plan import carve_counts, carve_plan, plan_into, plan_ints
from .schedule import LayerConfig, LayerProblem, layer_config, schedule
from .workspace import buffer_sizes, carve, num_counters

# Up to here a launch that starts early gains 1%; from 1,024 rows it can take the place of the one
# before: 0 to 3% of a layer in the mean, up to 14%.
EARLY_ROWS = 256


def overlap_of(num_rows: int, target: Target) -> Overlap:
    """How the kernels of a grouped call overlap."""
    if INTERPRETED or not target.dependent_launch:
        return Overlap.NONE
    return Overlap.EARLY if num_rows <= EARLY_ROWS else Overlap.LATE


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
        suits_descriptor(up) and suits_descriptor(down) and (gate is None or suits_descriptor(gate))
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
        descriptors
        and (gate is None or pair_distance(gate, up) != 0)
        and (intermediate_size * hidden_states.element_size()) % 16 == 0
        and topk_ids.numel() <= MAX_RAGGED_ROWS,
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
        workspace: uint8, contiguous, 16-byte aligned, at least `workspace_size` bytes; its
            contents don't matter.
        config: a `LayerConfig` as JSON, or "" to choose.
        target: the machine; probed if None.
        Others: as `tilewise.fused_experts`, weights as views.
    """
    if topk_ids.shape[0] == 0:
        return
    _check_out(out, hidden_states, topk_ids.shape[1], reduce)
    if workspace is not None:
        _check_workspace(workspace, hidden_states.device)
    if expert_map is not None:
        expert_map = expert_map.contiguous()  # The kernels index it without a stride.
    args = (
        hidden_states, gate, up, down, gate_bias, up_bias, down_bias, topk_weights, topk_ids,
        activation, expert_map, apply_router_weight_on_input, reduce, batch_invariant, config,
    )  # fmt: skip
    with on_device(hidden_states.device):
        if replay.SUPPORTED and hidden_states.is_cuda and target is None:
            _repeat_or_record(out, workspace, *args)
        else:
            machine = target or Target.probe(hidden_states.device)
            _launch(out, workspace, *args, target=machine)


# (shapes, options) -> launches. Layers alike share them, so this is token counts times shapes.
MAX_REPLAYS = 16384
_REPLAYS: dict[tuple[Any, ...], tuple[replay.Replay, int]] = {}


def _repeat_or_record(
    out: torch.Tensor,
    workspace: torch.Tensor | None,
    x: torch.Tensor,
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
    *options: Any,
) -> None:
    """Repeats the launches of a call alike if there was one, else launches and remembers them."""
    tensors = (
        out, x, topk_weights, topk_ids, gate, up, down, gate_bias, up_bias, down_bias, expert_map,
    )  # fmt: skip
    addresses = [0 if t is None else t.data_ptr() for t in tensors]
    # Everything that decides the launches but the addresses themselves: of these, the alignment
    # that Triton specialises on, which tensors are the same, and how far up lies from gate.
    key = (
        x.shape, x.stride(), x.dtype, x.device.index, out.stride(),
        topk_ids.shape, topk_ids.stride(), topk_ids.dtype,
        topk_weights.stride(), topk_weights.dtype,
        # The other weights' shapes and dtypes follow from these; biases may be fp32.
        up.shape, up.stride(), down.stride(),
        None if gate is None else gate.stride(),
        *[None if t is None else (t.stride(), t.dtype) for t in tensors[7:10]],
        None if expert_map is None else (expert_map.shape, expert_map.dtype),
        *[address & 15 for address in addresses],
        *map(addresses.index, addresses),  # Launches know tensors by address: which are one counts.
        0 if gate is None else addresses[5] - addresses[4],
        None if workspace is None else workspace.numel(),
        activation,
        options,
        tf32_allowed() if x.dtype is torch.float32 else None,
    )  # fmt: skip
    known = _REPLAYS.get(key)
    if known is None or replay.profiler_listens():
        with recording() as launches:
            workspace = _launch(
                out, workspace, x, gate, up, down, gate_bias, up_bias, down_bias, topk_weights,
                topk_ids, activation, expert_map, *options, target=Target.probe(x.device),
            )  # fmt: skip
        repeat = replay.Replay(launches, workspace, addresses)
        if not repeat.complete:
            return
        while len(_REPLAYS) >= MAX_REPLAYS:  # Oldest first: dicts keep their order.
            _REPLAYS.pop(next(iter(_REPLAYS), key), None)
        _REPLAYS[key] = (repeat, workspace.numel())
        return
    repeat, size = known
    if workspace is None:
        workspace = torch.empty(size, dtype=torch.uint8, device=x.device)
    repeat.run(
        [workspace.data_ptr(), *addresses], torch._C._cuda_getCurrentRawStream(x.device.index)
    )


def _launch(
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
    *,
    target: Target,
) -> torch.Tensor:
    """Decides and launches; returns the workspace."""
    num_tokens, top_k = topk_ids.shape
    problem = problem_of(hidden_states, gate, up, down, topk_ids, reduce, batch_invariant)
    layer = layer_config(config, problem, target)
    sizes = buffer_sizes(problem, layer, target)
    if workspace is None:
        workspace = torch.empty(sum(sizes), dtype=torch.uint8, device=hidden_states.device)
    _check_size(workspace, sum(sizes))
    ints, act, rows, partials = carve(workspace, sizes, hidden_states.dtype)
    num_experts = up.shape[0] if expert_map is None else expert_map.shape[0]
    num_rows = num_tokens * top_k
    if layer.path == "decode":
        decode_gate_up_into(
            act, hidden_states, gate, up, gate_bias, up_bias, topk_weights, topk_ids, activation,
            expert_map, num_experts, apply_router_weight_on_input,
            layer.gate_up,  # type: ignore[arg-type]
        )  # fmt: skip
        decode_down_into(
            out, act, down, down_bias, topk_weights, topk_ids, expert_map, num_experts,
            apply_router_weight_on_input,
            layer.down,  # type: ignore[arg-type]
        )  # fmt: skip
        return workspace
    _grouped_into(
        out, ints, act, rows, partials, num_rows, num_experts, layer, target,
        hidden_states, gate, up, down, gate_bias, up_bias, down_bias,
        topk_weights, topk_ids, activation, expert_map, apply_router_weight_on_input,
    )  # fmt: skip
    return workspace


def check_buffers(
    out: torch.Tensor,
    workspace: torch.Tensor | None,
    hidden_states: torch.Tensor,
    gate: torch.Tensor | None,
    up: torch.Tensor,
    down: torch.Tensor,
    *,
    topk_ids: torch.Tensor,
    reduce: bool,
    batch_invariant: bool,
    config: str,
) -> None:
    """Refuses an `out` or a `workspace` that a call on an accelerator would refuse."""
    if topk_ids.shape[0] == 0:
        return
    _check_out(out, hidden_states, topk_ids.shape[1], reduce)
    if workspace is None:
        return
    _check_workspace(workspace, hidden_states.device)
    problem = problem_of(hidden_states, gate, up, down, topk_ids, reduce, batch_invariant)
    target = Target.probe(hidden_states.device)
    # As `workspace_size` counts: whether the configuration can run is another machine's question.
    layer = LayerConfig.from_json(config) if config else schedule(problem, target)
    _check_size(workspace, sum(buffer_sizes(problem, layer, target)))


def _check_size(workspace: torch.Tensor, need: int) -> None:
    if workspace.numel() < need:
        raise ValueError(
            f"workspace has {workspace.numel()} bytes, this call needs {need}: "
            "size it with tilewise.workspace_size() and this call's options"
        )


def _check_out(out: torch.Tensor, x: torch.Tensor, top_k: int, reduce: bool) -> None:
    shape = (x.shape[0], x.shape[1]) if reduce else (x.shape[0], top_k, x.shape[1])
    if out.shape != shape or out.dtype is not x.dtype or out.device != x.device:
        raise ValueError(
            f"out must be {shape} {x.dtype} on {x.device}, got {tuple(out.shape)} {out.dtype} on "
            f"{out.device}"
        )
    if out.stride(-1) != 1:
        raise ValueError(f"out must have unit last stride, got strides {out.stride()}")


def _check_workspace(workspace: torch.Tensor, device: torch.device) -> None:
    if workspace.dtype is not torch.uint8 or not workspace.is_contiguous():
        raise ValueError(
            f"workspace must be contiguous uint8, got {workspace.dtype}, "
            f"strides {workspace.stride()}"
        )
    if workspace.device.type != device.type and workspace.device.type != "meta":
        raise ValueError(f"workspace is on {workspace.device}, hidden_states on {device}")
    if workspace.data_ptr() % 16:
        raise ValueError("workspace must be 16-byte aligned: fresh torch.empty() memory is")


def launches(
    config: KernelConfig | StreamConfig, few: FewActive | None, num_experts: int
) -> list[tuple[KernelConfig, tuple[int, int] | None]]:
    """What is launched for one product, each with the active experts (more than, at most)."""
    assert isinstance(config, KernelConfig)
    if few is None or few.up_to >= num_experts:
        return [(config if few is None else few.config, None)]
    return [(config, (few.up_to, num_experts)), (few.config, (0, few.up_to))]


def _grouped_into(
    out: torch.Tensor,
    ints: torch.Tensor,
    act: torch.Tensor,
    rows: torch.Tensor,
    partials: torch.Tensor,
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
    counts = carve_counts(ints, num_rows, num_local)
    num = num_counters(layer, num_local, target)
    first = plan_ints(num_rows, num_local)
    counters = ints[first : first + num] if num else None
    overlap = overlap_of(num_rows, target)
    plan_into(ragged, counts, topk_ids, num_experts, expert_map, counters, overlap)
    row_weights = topk_weights if apply_router_weight_on_input else None
    if layer.fused:
        assert counters is not None
        fused_gemms_into(
            rows, act, hidden_states, gate, up, down, ragged, layer, target, counters,
            top_k=topk_ids.shape[1], activation=activation, gate_bias=gate_bias, up_bias=up_bias,
            down_bias=down_bias, row_weights=row_weights, overlap=overlap,
        )  # fmt: skip
    else:
        halves = (None, None) if counters is None else counters.chunk(2)
        scratch = [None if half is None else SplitScratch(partials, half) for half in halves]
        source = hidden_states
        if layer.permuted:  # Where down will write: nothing of it is read after gate+up.
            permute_into(rows, hidden_states, ragged.scatter, overlap=overlap)
            source = rows
        for config, active in launches(layer.gate_up, layer.gate_up_few, num_local):
            grouped_gemm_into(
                act, source, gate, up, ragged, config, target,
                gathered=not layer.permuted, top_k=topk_ids.shape[1], gate_bias=gate_bias,
                up_bias=up_bias, row_weights=row_weights, activation=activation,
                scratch=scratch[0], overlap=overlap, active=active,
            )  # fmt: skip
        for config, active in launches(layer.down, layer.down_few, num_local):
            grouped_gemm_into(
                rows, act, None, down, ragged, config, target,
                gathered=False, up_bias=down_bias, scratch=scratch[1], overlap=overlap,
                active=active,
            )  # fmt: skip
    combine_into(
        out, rows, ragged.scatter, topk_weights,
        router_weight=not apply_router_weight_on_input, overlap=overlap,
    )  # fmt: skip
