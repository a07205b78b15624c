"""How every number is measured: shapes, token counts, routings, inputs, floors and the timer.

A peer is any callable that takes ``(x, topk_ids, topk_weights)`` and returns the combined expert
output. Floors use fixed ceilings, not those of the run at hand: ``COPY_GBS`` and ``BF16_TFLOPS``
were measured once on one H200. A result below the nominal limits is not fast but wrong.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

COPY_GBS, BF16_TFLOPS = 4215.0, 786.0
NOMINAL_GBS, NOMINAL_TFLOPS = 4800.0, 989.0
REPLAY_BYTES = 200e6  # active weights of one replay: well past the 60 MB of an H200's L2


class Shape(NamedTuple):
    """One MoE layer; ``intermediate_size`` is per expert."""

    num_experts: int
    top_k: int
    hidden_size: int
    intermediate_size: int


SHAPES = {
    "mixtral-8x7b": Shape(8, 2, 4096, 14336),
    "qwen3-30b-a3b": Shape(128, 8, 2048, 768),
    "olmoe-1b-7b": Shape(64, 8, 2048, 1024),
    "qwen3-235b-full": Shape(128, 8, 4096, 1536),
    "qwen3-235b-tp8": Shape(128, 8, 4096, 192),
    "deepseek-v3": Shape(256, 8, 7168, 2048),
    "gpt-oss-120b-like": Shape(128, 4, 2880, 2880),
    "qwen2-moe-57b": Shape(64, 8, 3584, 2560),
}
TOKENS = (1, 8, 32, 128, 512, 2048, 8192)
ROUTINGS = ("uniform", "zipf", "hot")

Inputs = tuple[Tensor, Tensor, Tensor]


def make_routing(
    kind: str, num_tokens: int, num_experts: int, top_k: int, gen: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Draws a routing on the generator's device.

    Args:
        kind: ``uniform``; ``zipf``, p(expert) ~ rank^-1.2 over a random expert order; or ``hot``,
            every token to the same experts.

    Returns:
        ``topk_ids`` int32 [num_tokens, top_k], distinct per token, and ``topk_weights`` fp32 of
        the same shape, rows summing to 1.
    """
    device = gen.device
    if kind == "uniform":
        score = torch.rand(num_tokens, num_experts, generator=gen, device=device)
    elif kind == "zipf":
        rank = torch.arange(1, num_experts + 1, device=device, dtype=torch.float32)
        p = rank.pow(-1.2)[torch.randperm(num_experts, generator=gen, device=device)]
        u = torch.rand(num_tokens, num_experts, generator=gen, device=device)
        # Gumbel top-k draws distinct experts with the Zipf probabilities.
        score = torch.log(p / p.sum()) - torch.log(-torch.log(u.clamp_(1e-9, 1 - 1e-7)))
    elif kind == "hot":
        score = torch.rand(1, num_experts, generator=gen, device=device)
        score = score.expand(num_tokens, num_experts)
    else:
        raise ValueError(f"unknown routing {kind!r}; known: {', '.join(ROUTINGS)}")
    ids = score.topk(top_k, dim=-1).indices.to(torch.int32).contiguous()
    logits = torch.randn(num_tokens, top_k, generator=gen, device=device)
    return ids, torch.softmax(logits, -1)


def build_sets(
    kind: str,
    num_tokens: int,
    shape: Shape,
    *,
    seed: int = 0,
    device: str = "cuda",
    dtype: torch.dtype = torch.bfloat16,
) -> tuple[list[Inputs], float]:
    """Builds 2 to 8 input sets, so that the weights of a whole replay cannot sit in L2.

    Returns:
        The sets ``(x, topk_ids, topk_weights)`` and the mean number of active experts.
    """
    num_experts, top_k, hidden, inter = shape
    gen = torch.Generator(device=device).manual_seed(seed)
    routings = [make_routing(kind, num_tokens, num_experts, top_k, gen)]
    active_bytes = routings[0][0].unique().numel() * 3 * hidden * inter * 2
    sets: list[Inputs] = []
    for i in range(min(8, max(2, math.ceil(REPLAY_BYTES / active_bytes)))):
        if i:
            routings.append(make_routing(kind, num_tokens, num_experts, top_k, gen))
        x = torch.randn(num_tokens, hidden, generator=gen, device=device, dtype=torch.float32)
        sets.append((x.to(dtype), *routings[i]))
    active = sum(ids.unique().numel() for _, ids, _ in sets) / len(sets)
    return sets, active


def make_weights(
    shape: Shape, *, seed: int = 0, device: str = "cuda", dtype: torch.dtype = torch.bfloat16
) -> tuple[Tensor, Tensor]:
    """Draws ``w13`` [E, 2I, H] (gate rows, then up rows) and ``w2`` [E, H, I] of unit gain."""
    num_experts, _, hidden, inter = shape
    gen = torch.Generator(device=device).manual_seed(seed)
    w13 = torch.empty(num_experts, 2 * inter, hidden, device=device, dtype=dtype)
    w2 = torch.empty(num_experts, hidden, inter, device=device, dtype=dtype)
    for expert in range(num_experts):
        w13[expert].normal_(0, hidden**-0.5, generator=gen)
        w2[expert].normal_(0, inter**-0.5, generator=gen)
    return w13, w2


def floors_us(
    num_tokens: int,
    shape: Shape,
    active: float,
    *,
    weight_bytes: float = 2.0,
    tflops: float = BF16_TFLOPS,
    gbs: float = COPY_GBS,
) -> tuple[float, float]:
    """Returns the floor and the floor with intermediates, in microseconds.

    The first is the larger of compulsory bytes (active weights, input and output) over the copy
    rate and FLOPs over the product rate. The second adds the traffic that a two-GEMM layer cannot
    avoid: the activation and the un-combined output, each written and read once.
    """
    _, top_k, hidden, inter = shape
    must = active * 3 * hidden * inter * weight_bytes + 2 * num_tokens * hidden * 2
    extra = num_tokens * top_k * (2 * inter * 2 + 2 * hidden * 2)
    flop_us = 6 * num_tokens * top_k * hidden * inter / tflops / 1e6
    return max(must / gbs / 1e3, flop_us), max((must + extra) / gbs / 1e3, flop_us)


def limit_us(num_tokens: int, shape: Shape, active: float) -> float:
    """Returns the time that no correct layer can beat: the floor at the nominal rates."""
    return floors_us(num_tokens, shape, active, tflops=NOMINAL_TFLOPS, gbs=NOMINAL_GBS)[0]


@dataclass(frozen=True)
class Captured:
    """One CUDA graph of some calls; their outputs are kept so that no write is hidden by reuse."""

    graph: torch.cuda.CUDAGraph
    outputs: list[Tensor]


def capture(calls: Sequence[Callable[[], Tensor]]) -> Captured:
    """Captures the calls, each on its own inputs, in one CUDA graph and replays it once.

    The outputs are NaN before the replay, so that a row that nobody writes is seen.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        outputs = [call() for call in calls]
    for output in outputs:
        output.fill_(float("nan"))
    graph.replay()
    torch.cuda.synchronize()
    return Captured(graph, outputs)


def paired_us(
    peers: dict[str, Captured], *, rounds: int = 3, target_ms: float = 25.0, max_replays: int = 40
) -> dict[str, list[float]]:
    """Times captured peers, interleaved within each round.

    Compare ratios round by round; a peer against itself shows the noise of the run.

    Returns:
        Median microseconds per call, one per round, by peer.
    """
    out: dict[str, list[float]] = {name: [] for name in peers}
    for turn in range(rounds):
        # Each round starts with another peer, so that none is always first after a pause.
        names = list(peers)
        shift = turn * len(names) // max(1, rounds)
        for name in names[shift:] + names[:shift]:
            captured = peers[name]
            replays = _replays_for(captured.graph, target_ms, max_replays)
            pairs = [(_event(), _event()) for _ in range(replays)]
            for start, end in pairs:
                start.record()
                captured.graph.replay()
                end.record()
            torch.cuda.synchronize()
            median_ms = statistics.median(start.elapsed_time(end) for start, end in pairs)
            out[name].append(median_ms * 1e3 / len(captured.outputs))
    return out


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)


def _replays_for(graph: torch.cuda.CUDAGraph, target_ms: float, max_replays: int) -> int:
    start, end = _event(), _event()
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    wanted = target_ms / max(start.elapsed_time(end), 1e-3)
    return int(min(max_replays, max(5, wanted)))
