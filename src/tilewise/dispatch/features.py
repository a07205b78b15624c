"""What of a configuration and a histogram decides the time: grid geometry, bytes, machine.

After RaMP's wave cost (arXiv 2604.26039: start, waves, programs, their logarithm), with tall and
short tiles apart, steps of the reduction beside tiles, the compulsory bytes, and the bytes that are
read again; docs/dispatch.md derives each term.
"""

from __future__ import annotations

from ..target import KIB, Target
from .config import GroupedGemm, KernelConfig, shared_memory
from .histogram import Histogram

FEATURES = (
    "launch",  # 1
    "wave_steps",  # waves of resident programs, times steps of the reduction
    "waves",
    "grid_steps",  # all programs' steps, in thousands
    "grid",  # programs, in thousands
    "weights",  # us to read the active weights once, at the nominal bandwidth
    "output",  # us to write the rows
    "traffic",  # weights and rows that programs read, through L2, in 10 MB
    "sm_steps",  # programs of the busiest multiprocessor, times steps
    "sm_programs",
    "work_steps",  # like grid_steps, a short tile counted as what it costs
    "work",
    "flow_steps",  # waves, at least one and not rounded up, times steps
    "excess",  # us that matrix products at the nominal rate take longer than the active weights
)
SHORT_TILE = 0.55  # A short tile's cost in tall ones, at 64 of 128 rows on one H200.
RESERVED = 1 * KIB  # Shared memory that the driver keeps for every program.


def programs_per_sm(config: KernelConfig, gemm: GroupedGemm, target: Target) -> int:
    """Programs that one multiprocessor holds, by shared memory and by accumulators in registers."""
    by_memory = (target.shared_memory + RESERVED) // (shared_memory(config, gemm) + RESERVED)
    # Accumulators, and about 80 registers a lane for addresses, operands and the loop.
    accumulators = config.block_m * config.block_n * gemm.num_weights // (32 * config.num_warps)
    by_registers = 65536 // (32 * config.num_warps * min(255, accumulators + 80))
    return max(1, min(by_memory, by_registers, 32))


def features(
    config: KernelConfig, gemm: GroupedGemm, target: Target, histogram: Histogram
) -> tuple[float, ...]:
    """The values of `FEATURES` for one product under one histogram."""
    tall, short = histogram.tiles(config.block_m, config.tail_m)
    columns = -(-gemm.n // config.block_n)
    steps_all = -(-gemm.k // config.block_k)
    tiles = (tall + short) * columns
    split = 1
    if config.split_k > 1:  # As the kernel decides it.
        room = target.num_sms * config.occupancy // max(1, tiles)
        split = max(1, min(config.split_k, room, -(-gemm.k // (2 * config.block_k))))
    steps = -(-steps_all // split)
    grid = tiles * split
    work = (tall + (SHORT_TILE if config.tail_m else 0.0) * short) * columns * split
    per_sm = config.occupancy if config.persistent else programs_per_sm(config, gemm, target)
    waves = -(-grid // (target.num_sms * per_sm))
    busiest = -(-grid // target.num_sms)
    flow = max(1.0, grid / (target.num_sms * per_sm))
    rate = target.memory_gbs * 1e3  # bytes a microsecond
    row_bytes = gemm.k * gemm.itemsize
    padded = (tall * config.block_m + short * config.tail_m) * columns
    traffic = (tiles * config.block_n * gemm.num_weights + padded) * row_bytes
    read = histogram.active * gemm.n * gemm.num_weights * row_bytes / rate
    flops = 2 * padded * steps * split * config.block_k * config.block_n * gemm.num_weights
    return (
        1.0,
        float(waves * steps),
        float(waves),
        grid * steps / 1e3,
        grid / 1e3,
        read,
        histogram.rows * gemm.n * gemm.itemsize / rate,
        traffic / 1e7,
        float(busiest * steps),
        float(busiest),
        work * steps / 1e3,
        work / 1e3,
        flow * steps,
        max(0.0, flops / (target.bf16_tflops * 1e6) - read),
    )
