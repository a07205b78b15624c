"""What a call would do, and what it costs at least: path, configurations, bytes, FLOPs, floor."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from ..dispatch.config import FewActive, GroupedGemm, KernelConfig, StreamConfig
from ..dispatch.rules import rule
from ..dispatch.select import bucketed, costs_speak
from ..models import MoEShape
from ..target import Target
from .activation import SWIGLU, Activation
from .checks import (
    check_activation,
    check_bools,
    check_config,
    check_dtype,
    check_shape,
    check_target,
    check_tokens,
)
from .plan import plan_ints
from .schedule import LayerConfig, LayerProblem, layer_config, schedule
from .workspace import buffer_sizes


def _check(
    shape: MoEShape,
    num_tokens: int,
    dtype: torch.dtype,
    activation: Activation,
    reduce: bool,
    batch_invariant: bool,
    config: LayerConfig | None,
    target: Target | None,
    least: int,
) -> None:
    check_shape(shape)
    check_tokens(num_tokens, least)
    check_dtype(dtype)
    check_activation(activation)
    check_bools(reduce=reduce, batch_invariant=batch_invariant)
    check_config(config)
    check_target(target)


def _problem(
    shape: MoEShape,
    num_tokens: int,
    dtype: torch.dtype,
    activation: Activation,
    reduce: bool,
    batch_invariant: bool,
) -> LayerProblem:
    aligned = (shape.hidden_size * dtype.itemsize) % 16 == 0
    aligned = aligned and (shape.intermediate_size * dtype.itemsize) % 16 == 0
    return LayerProblem(
        num_tokens,
        shape.top_k,
        shape.num_experts,
        shape.hidden_size,
        shape.intermediate_size,
        dtype.itemsize,
        activation.is_gated,
        aligned,
        reduce,
        batch_invariant,
    )


def workspace_size(
    shape: MoEShape,
    num_tokens: int,
    *,
    dtype: torch.dtype = torch.bfloat16,
    activation: Activation = SWIGLU,
    reduce: bool = True,
    batch_invariant: bool = False,
    config: LayerConfig | None = None,
    target: Target | None = None,
) -> int:
    """Bytes of scratch memory for calls of up to `num_tokens` tokens.

    Args:
        shape: the layer; `num_experts` counts the experts on this device.
        num_tokens: the largest call.
        dtype: of hidden states and weights.
        activation, reduce, batch_invariant, config: as the calls pass them.
        target: the machine; probed if None.

    Returns:
        The size of a uint8 `workspace` for `fused_experts(..., out=..., workspace=...)`. Calls that
        run at the same time, on two streams, need one each. 0 for no tokens.

    Raises:
        TypeError: an argument of another type. ValueError: a negative count, another dtype.
    """
    _check(shape, num_tokens, dtype, activation, reduce, batch_invariant, config, target, least=0)
    if num_tokens == 0:
        return 0
    machine = target or Target.probe()
    problem = _problem(shape, num_tokens, dtype, activation, reduce, batch_invariant)
    # The grouped path needs more than decode does, so it bounds every smaller call too.
    return sum(buffer_sizes(problem, config or schedule(problem, machine), machine))


def _as_run(layer: LayerConfig, gated: bool) -> LayerConfig:
    """`layer`, without the sharing that a product with two accumulators does not do."""
    config = layer.gate_up
    if not gated or not isinstance(config, KernelConfig) or config.descriptors:
        return layer  # Gate and up by descriptor are a pair, with one accumulator.
    return replace(layer, gate_up=replace(config, split_k=1))


def _source(problem: LayerProblem, chosen: LayerConfig, target: Target) -> str:
    """Where the choice came from, once if both products have it from one place."""
    if chosen.path != "grouped":
        return "closed form"
    if chosen.fused:
        return "closed form for both products in one launch"
    gemms = problem.gemms(problem.needs_fixed_batch(target))
    gate_up, down = (
        _source_of(gemm, config, few, problem.batch_invariant, target)
        for gemm, config, few in zip(
            gemms, (chosen.gate_up, chosen.down), (chosen.gate_up_few, chosen.down_few), strict=True
        )
    )
    if chosen.permuted:
        gate_up = "closed form for rows copied in expert order"
    return gate_up if gate_up == down else f"gate+up: {gate_up}; down: {down}"


def _source_of(
    gemm: GroupedGemm,
    config: KernelConfig | StreamConfig,
    few: FewActive | None,
    batch_invariant: bool,
    target: Target,
) -> str:
    """One product's: fitted costs, a rule that these do not beat, or a rule alone."""
    if not costs_speak(gemm, target):
        return "closed form"
    ruled = rule(bucketed(gemm), target)  # Costs are compared at the bucket's token count.
    if batch_invariant:
        ruled = replace(ruled, split_k=1)
    if few is None and config == ruled:
        return "closed form, which fitted costs do not beat"
    return "fitted costs"


@dataclass(frozen=True)
class Explanation:
    """One call, accounted for. Bytes are device memory traffic, each tensor counted once per pass.

    Attributes:
        target: architecture the decision was made for; "cpu" where calls run no kernel.
        config: path and configuration of each product; of no meaning on a CPU.
        source: where the configuration came from, for each product where they differ.
        active_experts: experts assumed to be active.
        weight_bytes: weights of the active experts, read once.
        activation_bytes: all other traffic of our kernels.
        unfused_activation_bytes: the same for a kernel per step: permute, gate, up, activation,
            multiply rows, down, un-permute and sum.
        flops: multiply-adds counted twice.
        floor_us: the larger of compulsory bytes over bandwidth and FLOPs over the matrix rate
            (nominal).
    """

    target: str
    config: LayerConfig
    source: str
    active_experts: float
    weight_bytes: int
    activation_bytes: int
    unfused_activation_bytes: int
    flops: int
    floor_us: float

    @property
    def saving(self) -> float:
        """Share of the unfused pipeline's activation traffic that is not moved here."""
        return 1.0 - self.activation_bytes / self.unfused_activation_bytes

    def _product(self, label: str, name: str) -> list[str]:
        """A product's configuration; of two, what the device chooses when is said."""
        config, few = getattr(self.config, name), getattr(self.config, f"{name}_few")
        if few is None:
            return [f"{label:11} {config}"]
        return [
            f"{label:11} if more than {few.up_to} experts are active: {config}",
            f"{'':11} else: {few.config}",
        ]

    def __str__(self) -> str:
        weights = f"weights     {self.weight_bytes / 1e6:.1f} MB, {self.active_experts:.1f} experts"
        arithmetic = f"arithmetic  {self.flops / 1e9:.1f} GFLOP"
        if self.target == "cpu":  # Tiles, our kernels' traffic and a floor are a GPU's.
            return f"path        plain torch on cpu: no kernel runs\n{weights}\n{arithmetic}"
        return "\n".join(
            (
                f"path        {self.config.path} on {self.target} ({self.source})",
                *self._product("gate+up", "gate_up"),
                *self._product("down", "down"),
                *(["launches    one for both products"] if self.config.fused else []),
                *(["rows        copied in expert order first"] if self.config.permuted else []),
                weights,
                f"activations {self.activation_bytes / 1e6:.1f} MB, "
                f"{self.saving:.0%} less than unfused",
                arithmetic,
                f"floor       {self.floor_us:.1f} us at nominal rates",
            )
        )


def explain(
    shape: MoEShape,
    num_tokens: int,
    *,
    dtype: torch.dtype = torch.bfloat16,
    activation: Activation = SWIGLU,
    reduce: bool = True,
    batch_invariant: bool = False,
    active_experts: float | None = None,
    config: LayerConfig | None = None,
    target: Target | None = None,
) -> Explanation:
    """What `fused_experts` would do for such a call, without running anything.

    Args:
        shape: the layer. num_tokens: tokens of the call.
        dtype, activation, reduce, batch_invariant, config: as the call passes them.
        active_experts: experts with at least one token; expected under uniform routing if None.
        target: the machine; probed if None. Without a GPU that is the CPU, where calls run plain
            torch: `Target.from_arch("sm_90")` is a machine that is not here.

    Raises:
        TypeError: an argument of another type. ValueError: no tokens, more experts than are, or a
            configuration that cannot run there.
    """
    _check(shape, num_tokens, dtype, activation, reduce, batch_invariant, config, target, least=1)
    if active_experts is not None and type(active_experts) not in (int, float):
        raise TypeError(
            f"active_experts={active_experts!r} must be a number between 0 and "
            f"num_experts={shape.num_experts}, or None"
        )
    if active_experts is not None and not 0 <= active_experts <= shape.num_experts:
        raise ValueError(
            f"active_experts={active_experts} must be between 0 and "
            f"num_experts={shape.num_experts}, or None"
        )
    machine = target or Target.probe()
    problem = _problem(shape, num_tokens, dtype, activation, reduce, batch_invariant)
    given = "" if config is None else config.to_json()
    chosen = layer_config(given, problem, machine)
    layer = _as_run(chosen, activation.is_gated)
    e, k, h, i = shape.num_experts, shape.top_k, shape.hidden_size, shape.intermediate_size
    if active_experts is None:
        active_experts = e * (1.0 - (1.0 - k / e) ** num_tokens)
    size, rows, matrices = dtype.itemsize, num_tokens * k, 3 if activation.is_gated else 2
    weight_bytes = round(active_experts * matrices * h * i * size)
    tokens_in_out = 2 * num_tokens * h * size
    # The activation is written and read once; so are the rows before their sum, unless decode sums
    # them.
    moved = tokens_in_out + 2 * rows * i * size
    if layer.path == "grouped":
        moved += 2 * rows * h * size + 2 * plan_ints(rows, e) * 4
    if layer.permuted:  # Written, and read for the first product.
        moved += 2 * rows * h * size
    # permute: read x, write rows; gate, up: read rows, write; activation: read both, write; down:
    # read, write; sum: read, write out.
    products = matrices - 1
    per_row = h + products * (h + i) + (products + 1) * i + i + 2 * h
    unfused = tokens_in_out + rows * size * per_row
    unfused += 2 * plan_ints(rows, e) * 4
    flops = 2 * matrices * rows * h * i
    compulsory = (weight_bytes + tokens_in_out) / machine.memory_gbs / 1e3
    return Explanation(
        machine.arch,
        layer,
        "given" if config else _source(problem, chosen, machine),
        active_experts,
        weight_bytes,
        moved,
        unfused,
        flops,
        max(compulsory, flops / machine.bf16_tflops / 1e6),
    )
