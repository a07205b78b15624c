"""Profiles one layer on the GPU at hand: compiles variants, times them, fits their costs.

36 to 84 s on one H200, compiling included, for 22 histograms of each of two products. Every
row goes to the file at once, so that a run that was stopped is continued by the next one.
"""

from __future__ import annotations

import gc
import logging
import math
import multiprocessing
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

from ..dispatch.config import KernelConfig, why_illegal
from ..dispatch.rules import rule
from ..dispatch.space import space
from ..dispatch.table import shipped
from ..models import MoEShape
from ..target import Target
from . import measure, store
from .routings import sizes_of
from .store import Profile, Row
from .workloads import Workload, named, token_counts, traced

WRONG = 0.01  # Relative norm by which a configuration may differ from the rule's, in bf16.
LOG = logging.getLogger("tilewise")

Report = Callable[[str, int, int], None]
Hints = Mapping[str, Sequence[KernelConfig]]


def check_possible(shape: MoEShape, target: Target) -> None:
    """Refuses what cannot be profiled.

    Raises:
        ValueError: no GPU, one that no measured space of configurations covers, sizes that do not
            suit its descriptors.
    """
    if target.backend == "cpu":
        raise ValueError(
            f"a profile is measured on a GPU with wgmma (sm_90: H100, H200), and torch "
            f"{torch.__version__} finds none here: run this where the layer will be served"
        )
    if not space(measure.product(shape, "down", 64), target):
        raise ValueError(
            f"{target.arch} cannot be profiled yet: the space of configurations was measured on "
            "sm_90 (H100, H200) alone. Calls here run the configuration by rule; "
            "`tilewise explain` shows it"
        )
    for name in ("hidden_size", "intermediate_size"):
        if getattr(shape, name) % 8:
            raise ValueError(
                f"{name}={getattr(shape, name)} is no multiple of 8, so that rows are not 16-byte "
                "aligned as descriptors need: calls run the configuration by rule, and no profile "
                "is used for them"
            )


def variants(
    shape: MoEShape, stage: str, target: Target, counts: Sequence[int], hints: Hints
) -> list[KernelConfig]:
    """Configurations to time: the rule's first, those of the shipped table or the space, hints."""
    gemm = measure.product(shape, stage, max(counts))
    table = shipped(target.arch)
    usual = list(getattr(table, stage).coefficients) if table is not None else space(gemm, target)
    ruled = [rule(measure.product(shape, stage, count), target) for count in counts]
    wanted = dict.fromkeys((*ruled, *usual, *hints.get(stage, ())))
    return [config for config in wanted if why_illegal(config, gemm, target) is None]


def compile_variants(
    shape: MoEShape, by_stage: Mapping[str, Sequence[KernelConfig]], jobs: int, report: Report
) -> dict[tuple[str, KernelConfig], str]:
    """Compiles into Triton's cache, in `jobs` processes; why, of those that would not compile."""
    work = [(stage, config) for stage, configs in by_stage.items() for config in configs]
    context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork.
    problems = {}
    with ProcessPoolExecutor(max(1, min(jobs, len(work))), mp_context=context) as pool:
        results = pool.map(
            measure.compile_one, [(stage, shape, config) for stage, config in work], chunksize=2
        )
        report("compiling", 0, len(work))
        for number, (one, problem) in enumerate(zip(work, results, strict=True)):
            if problem:
                problems[one] = problem
            report("compiling", number + 1, len(work))
    return problems


def time_case(
    shape: MoEShape,
    stage: str,
    workload: Workload,
    configs: Sequence[KernelConfig],
    weights: measure.Weights,
    target: Target,
    stream: torch.cuda.Stream,
) -> Row:
    """Times configurations on one product of one workload; the first one's result is the norm."""
    ids = workload.routings(shape, stage, str(weights.down.device))
    sizes = [sizes_of(one, shape.num_experts) for one in ids]
    inputs = measure.input_sets(shape, stage, ids, weights)
    run = measure.launcher(shape, stage, weights, target)
    written = inputs[0].out[: sum(sizes[0])]  # Rows past the plan's last are nobody's.
    graphs: dict[KernelConfig, measure.Captured] = {}
    failed: dict[str, str] = {}
    wanted = None
    for config in configs:
        written.fill_(float("nan"))
        try:
            graphs[config] = measure.capture(run, inputs, config, stage, target, stream)
            torch.cuda.synchronize()
        except Exception as error:
            failed[config.name] = f"{type(error).__name__}: {error}"[:200]
            continue
        got = written.float()
        if wanted is None:
            wanted = got
        wrong = ((got - wanted).norm() / wanted.norm()).item()
        if not wrong < WRONG:
            failed[config.name] = f"its result differs by {wrong:.3g}"
            del graphs[config]
    if not graphs:
        raise RuntimeError(f"no configuration ran for {stage}, {workload.routing}: {failed}")
    times = measure.interleaved_us(graphs)
    return {
        "stage": stage,
        "T": workload.num_tokens,
        "routing": workload.routing,
        "sizes": [sorted((size for size in one if size), reverse=True) for one in sizes],
        "times_us": {c.name: [round(us, 3) for us in halves] for c, halves in times.items()},
        "failed": failed,
    }


def resumed(path: Path | None, key: dict[str, object]) -> Profile:
    """What the file has of this profile; an empty one if it is not there, or of older kernels.

    Raises:
        ValueError: the file is no profile, or of another layer or machine.
    """
    if path is None or not path.exists():
        return Profile(key)
    found = store.load(path)
    differ = store.is_stale(found.key, key)
    other = [part for part in differ if part not in ("kernels", "triton")]
    if other:
        what = "; ".join(f"{part} is {found.key.get(part)}, here {key[part]}" for part in other)
        raise ValueError(f"{path} is the profile of something else: {what}. Name another file")
    if differ:
        LOG.warning("%s starts anew: %s changed since", path, " and ".join(differ))
        return Profile(key)
    return found


def profile_shape(
    shape: MoEShape,
    target: Target,
    *,
    max_tokens: int = 8192,
    calls: Sequence[torch.Tensor] = (),
    hints: Hints | None = None,
    path: Path | None = None,
    seconds: float = math.inf,
    jobs: int = 16,
    report: Report = lambda phase, done, total: None,
) -> Profile:
    """Profiles a layer of bf16 weights on the current GPU.

    Args:
        target: of the current GPU.
        max_tokens: the largest batch to time.
        calls: ids [num_tokens, top_k] of recorded calls, to time besides the synthetic ones.
        hints: further configurations by product ("gate_up", "down").
        path: the file, written after each row; what it has is not timed again.
        seconds: no row begins after that many; the table is fitted to what is there.
        jobs: processes that compile.
        report: called with ("compiling" or "timing", done, total).

    Returns:
        The profile. Its table is None if time was over before `store.FEWEST_CASES` rows.

    Raises:
        ValueError: what cannot be profiled (`check_possible`), a layer that does not fit in memory,
            traces of another layer, a file of something else.
    """
    end = time.monotonic() + seconds
    check_possible(shape, target)
    counts = token_counts(max_tokens)
    workloads = [*traced(calls, shape, max_tokens), *named(max_tokens)]
    profile = resumed(path, store.here(shape, target))
    profile.meta = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    configs = {
        stage: variants(shape, stage, target, counts, hints or {}) for stage in measure.STAGES
    }
    rows = {store.identity(row): row for row in profile.rows}
    todo = [
        (stage, workload)
        for workload in workloads
        for stage in measure.STAGES
        if (row := rows.get((stage, workload.num_tokens, workload.routing))) is None
        or not store.done(row, [config.name for config in configs[stage]])
    ]
    if todo:
        check_memory(shape)
        problems = compile_variants(shape, configs, jobs, report)
        weights = measure.Weights.random(shape, "cuda")
        stream = torch.cuda.Stream()
        total = len(measure.STAGES) * len(workloads)
        for number, (stage, workload) in enumerate(todo):
            report("timing", total - len(todo) + number, total)
            if time.monotonic() > end:
                break
            able = [config for config in configs[stage] if (stage, config) not in problems]
            row = time_case(shape, stage, workload, able, weights, target, stream)
            row["failed"] |= {c.name: why[:200] for (s, c), why in problems.items() if s == stage}
            rows[store.identity(row)] = row
            profile.rows = list(rows.values())
            if path is not None:
                store.save(profile, path)
            gc.collect()  # Graphs hold memory until they are gone.
        else:
            report("timing", total, total)
    profile.table = store.fitted(profile, target)
    if path is not None:
        store.save(profile, path)
    return profile


def check_memory(shape: MoEShape) -> None:
    """Refuses a layer whose weights do not fit on the current GPU.

    Raises:
        ValueError: they do not.
    """
    need = 6 * shape.num_experts * shape.hidden_size * shape.intermediate_size
    free, _ = torch.cuda.mem_get_info()
    if need > 0.9 * free:
        raise ValueError(
            f"the layer's weights take {need / 1e9:.1f} GB, {free / 1e9:.1f} GB are free here: "
            'profile the shard that a device holds ("MODEL-tpN", "MODEL-epN", or its E,K,H,I)'
        )
