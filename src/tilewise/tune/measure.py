"""Times of many configurations of one product, interleaved, weights never in L2.

A configuration's time is the median of its samples; samples come in two halves, so that whoever
picks the fastest by one half can be scored by the other. Every pass visits the configurations in
another order: on a machine bound by power, who ran before decides the clock.
"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from ..dispatch.config import GroupedGemm, KernelConfig
from ..models import MoEShape
from ..moe.activation import SWIGLU
from ..moe.experts import SplitScratch, grouped_gemm_into, split_elements
from ..moe.launch import compile_only, next_power_of_two
from ..moe.plan import carve_counts, carve_plan, plan_into, plan_ints
from ..ragged import Ragged
from ..target import Target

STAGES = ("gate_up", "down")
REPLAY_BYTES = 200e6  # Weights of one replay: well past any L2.
MAX_SETS = 8


@dataclass(frozen=True)
class Weights:
    """Random weights of a layer, [E, 2I, H] and [E, H, I]."""

    gate_up: torch.Tensor
    down: torch.Tensor

    @staticmethod
    def random(shape: MoEShape, device: str, dtype: torch.dtype = torch.bfloat16) -> Weights:
        e, h, i = shape.num_experts, shape.hidden_size, shape.intermediate_size
        both = torch.empty(e, 2 * i, h, dtype=dtype, device=device).normal_(std=h**-0.5)
        return Weights(both, torch.empty(e, h, i, dtype=dtype, device=device).normal_(std=i**-0.5))


def product(shape: MoEShape, stage: str, num_tokens: int) -> GroupedGemm:
    """The product of a stage as the dispatcher sees it."""
    rows, e = num_tokens * shape.top_k, shape.num_experts
    if stage == "gate_up":
        return GroupedGemm(
            rows, num_tokens, e, shape.intermediate_size, shape.hidden_size, 2, 2, True
        )
    return GroupedGemm(rows, num_tokens, e, shape.hidden_size, shape.intermediate_size, 1, 2)


@dataclass
class InputSet:
    """One routing's plan with the rows on both sides of a product."""

    plan: Ragged
    x: torch.Tensor
    out: torch.Tensor


def input_sets(
    shape: MoEShape, stage: str, routings: Sequence[torch.Tensor], weights: Weights
) -> list[InputSet]:
    """Plans and random rows for each routing, topk_ids [num_tokens, top_k]."""
    made = []
    like = weights.gate_up
    for ids in routings:
        n, e = ids.numel(), shape.num_experts
        ints = torch.empty(plan_ints(n, e), dtype=torch.int32, device=ids.device)
        plan = carve_plan(ints, n, e)
        plan_into(plan, carve_counts(ints, n, e), ids, e, None)
        rows_in, width_in, width_out = (
            (ids.shape[0], shape.hidden_size, shape.intermediate_size)
            if stage == "gate_up"
            else (n, shape.intermediate_size, shape.hidden_size)
        )
        x = torch.empty(rows_in, width_in, dtype=like.dtype, device=ids.device).normal_()
        made.append(InputSet(plan, x, like.new_empty(n, width_out)))
    return made


def launcher(
    shape: MoEShape, stage: str, weights: Weights, target: Target
) -> Callable[[InputSet, KernelConfig, SplitScratch | None], None]:
    """A function that launches one product on one set of inputs."""
    i = shape.intermediate_size

    def run(inputs: InputSet, config: KernelConfig, scratch: SplitScratch | None) -> None:
        gate, up = (
            (weights.gate_up[:, :i], weights.gate_up[:, i:])
            if stage == "gate_up"
            else (None, weights.down)
        )
        grouped_gemm_into(
            inputs.out, inputs.x, gate, up, inputs.plan, config, target,
            gathered=stage == "gate_up", top_k=shape.top_k if stage == "gate_up" else 1,
            activation=SWIGLU if stage == "gate_up" else None, scratch=scratch,
        )  # fmt: skip

    return run


def compile_one(job: tuple[str, MoEShape, KernelConfig]) -> str | None:
    """Compiles one configuration, for a pool of processes; the reason if it does not compile."""
    stage, shape, config = job
    e, h, i = shape.num_experts, shape.hidden_size, shape.intermediate_size
    target = Target.probe()

    def meta(*size: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, device="meta")

    weights = Weights(meta(e, 2 * i, h), meta(e, h, i))
    n = 64 * shape.top_k
    plan = carve_plan(meta(plan_ints(n, e), dtype=torch.int32), n, e)
    x = meta(64, h) if stage == "gate_up" else meta(n, i)
    out = meta(n, i if stage == "gate_up" else h)
    try:
        with compile_only():
            launcher(shape, stage, weights, target)(
                InputSet(plan, x, out), config, scratch_of(config, stage, target, "meta")
            )
    except Exception as error:
        return f"{stage} {config}: {type(error).__name__}: {error}"
    return None


def scratch_of(
    config: KernelConfig, stage: str, target: Target, device: str
) -> SplitScratch | None:
    """Memory for a shared reduction, or None where nothing is shared."""
    if config.split_k == 1:
        return None
    elements = split_elements(config, 2 if stage == "gate_up" else 1, target.num_sms)
    counters = next_power_of_two(target.num_sms * config.occupancy)
    return SplitScratch(
        torch.empty(elements, dtype=torch.float32, device=device),
        torch.zeros(counters, dtype=torch.int32, device=device),
    )


@dataclass
class Captured:
    """A graph of one launch per input set."""

    graph: torch.cuda.CUDAGraph
    launches: int
    keep: list[object]


def capture(
    run: Callable[[InputSet, KernelConfig, SplitScratch | None], None],
    sets: Sequence[InputSet],
    config: KernelConfig,
    stage: str,
    target: Target,
    stream: torch.cuda.Stream,
) -> Captured:
    """Captures a launch per input set; counters are zeroed once, as the plan does in the layer."""
    scratch = [scratch_of(config, stage, target, "cuda") for _ in sets]
    counters = [s.counters for s in scratch if s is not None]
    flat = torch.cat(counters) if counters else None
    if flat is not None:  # One memset for all launches of the graph.
        parts = flat.split([c.numel() for c in counters])
        scratch = [
            SplitScratch(s.partials, part)
            for s, part in zip((s for s in scratch if s is not None), parts, strict=True)
        ]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # Loads the kernel, outside of the capture.
        run(sets[0], config, scratch[0])
        if flat is not None:
            flat.zero_()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        if flat is not None:
            flat.zero_()
        for inputs, memory in zip(sets, scratch, strict=True):
            run(inputs, config, memory)
    return Captured(graph, len(sets), [scratch, flat])


def interleaved_us(
    graphs: Mapping[KernelConfig, Captured],
    *,
    sample_ms: float = 0.6,
    rounds: Sequence[tuple[int, float]] = ((2, 1.5), (4, 1.06), (6, 0.0)),
    seed: int = 0,
) -> dict[KernelConfig, tuple[float, float]]:
    """Microseconds of a launch of each configuration, by the odd and by the even passes.

    Args:
        rounds: (passes, screen): after these passes only configurations within `screen` times the
            fastest go on, so that most samples go where the choice is.
    """
    order = list(graphs)
    shuffle = random.Random(seed)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    samples: dict[KernelConfig, list[float]] = {config: [] for config in order}
    replays: dict[KernelConfig, int] = {}

    def once(config: KernelConfig, count: int) -> float:
        start.record()
        for _ in range(count):
            graphs[config].graph.replay()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end))

    for config in order:  # Also brings the clock to where work of this kind holds it.
        once(config, 1)
        replays[config] = max(1, min(50, math.ceil(sample_ms / max(once(config, 1), 1e-3))))
    for passes, screen in rounds:
        for _ in range(passes):
            shuffle.shuffle(order)
            for config in order:
                count = replays[config]
                us = once(config, count) * 1e3 / count / graphs[config].launches
                samples[config].append(us)
        limit = screen * min(statistics.median(times) for times in samples.values())
        order = [c for c in order if statistics.median(samples[c]) <= limit]
    return {
        config: (statistics.median(times[0::2]), statistics.median(times[1::2]))
        for config, times in samples.items()
    }


def num_sets(shape: MoEShape, stage: str, active: int) -> int:
    """Input sets that a replay must rotate through so that no weight is still in L2."""
    matrices = 2 if stage == "gate_up" else 1
    one = active * matrices * shape.hidden_size * shape.intermediate_size * 2
    return min(MAX_SETS, max(2, math.ceil(REPLAY_BYTES / max(1, one))))
