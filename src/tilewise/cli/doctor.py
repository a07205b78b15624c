"""`tilewise doctor`: what this machine is, what is known about it, and a test of every kernel.

Outputs are compared with the fp32 specification, which runs on the CPU, so that neither the GPU nor
a precision setting of torch can hide an error in both.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import shutil
import sys
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from ..dispatch.config import KernelConfig, StreamConfig
from ..moe import cpu, ops, reference
from ..moe.activation import SWIGLU, SWIGLU_OAI, Activation
from ..moe.combine import combine_into
from ..moe.launch import INTERPRETED
from ..moe.schedule import LayerConfig
from ..moe.weights import ExpertWeights
from ..target import CATALOGUE, Target
from .device import checked_device

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# Norm of the error over norm of the result: about three times what rounding costs.
TOLERANCE = {"bf16": 1e-2, "fp16": 1.5e-3, "fp32": 1e-5}
# Architectures on which the whole test suite has run; the others are compiled for.
RAN = {"sm_90": "NVIDIA H200"}
PACKAGES = ("torch", "triton", "numpy", "transformers", "vllm")
# The oldest releases that pyproject.toml allows.
OLDEST = {"torch": (2, 9), "triton": (3, 6)}


@dataclass(frozen=True)
class Finding:
    """Something known about this machine or its versions; `level` is "ok", "note" or "bad"."""

    level: str
    text: str


@dataclass(frozen=True)
class Check:
    """One kernel on one set of inputs. `error` and `allowed` are relative; exact checks allow 0."""

    kernel: str
    variant: str
    dtype: str
    ok: bool
    error: float
    allowed: float
    detail: str = ""


def doctor(
    as_json: bool = typer.Option(False, "--json", help="Print one JSON object instead."),
    device: str = typer.Option("", help='"cpu" or "cuda:N"; the GPU if there is one.'),
) -> None:
    """Describe this machine and test every kernel on it against the specification.

    Exits with 1 if a result is wrong or something known to be broken is installed.
    """
    console = Console(width=None if sys.stdout.isatty() else 110)
    device = checked_device(device)
    target = Target.probe(device)
    findings = known(target, versions())
    jobs = list(self_test(device, target))
    checks = []
    with Progress(console=console, transient=True, disable=as_json) as progress:
        task = progress.add_task("testing kernels", total=len(jobs))
        for job in jobs:
            checks.append(job())
            progress.advance(task)
    ok = all(c.ok for c in checks) and all(f.level != "bad" for f in findings)
    if as_json:
        report = {
            "ok": ok,
            "runs": _runs(device),
            "machine": {"name": _name(device), **asdict(target)},
            "versions": versions(),
            "findings": [asdict(finding) for finding in findings],
            "checks": [asdict(c) for c in checks],
        }
        # NaN is no JSON: an error that is none is null.
        typer.echo(json.dumps(_finite(report), indent=1))
    else:
        _print(console, device, target, findings, checks)
    if not ok:
        raise typer.Exit(1)


def versions() -> dict[str, str]:
    """Versions of what matters here, "" where it is not installed."""
    from .. import __version__

    found = {"tilewise": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = ""
    found["torch"] = torch.__version__
    found["cuda"] = torch.version.cuda or ""
    found["hip"] = torch.version.hip or ""
    found["driver"] = _driver()
    return found


def _driver() -> str:
    """The NVIDIA kernel driver's version, "" without one."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        return ""
    match = re.search(r"\b(\d{3,}\.\d+(?:\.\d+)?)\b", text)
    return match.group(1) if match else ""


def _numbers(version: str) -> tuple[int, ...]:
    match = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(int(part) for part in match.group().split(".")) if match else ()


def known(target: Target, installed: dict[str, str]) -> list[Finding]:
    """What is known to be broken, slow or untested about a machine with these versions."""
    found = []
    for package, oldest in OLDEST.items():
        if not installed[package]:
            found.append(Finding("bad", f"{package} is not installed"))
        elif _numbers(installed[package]) < oldest:
            wanted = ".".join(map(str, oldest))
            found.append(
                Finding("bad", f"{package} {installed[package]} is older than {wanted}: upgrade it")
            )
    if _numbers(installed["triton"])[:2] == (3, 6) and _numbers(installed["numpy"]) >= (2, 4):
        found.append(
            Finding(
                "bad" if INTERPRETED else "note",
                f"Triton 3.6's interpreter fails with numpy {installed['numpy']}, which refuses "
                "int() of an array: pip install 'numpy<2.4' before you set TRITON_INTERPRET=1. "
                "Compiled kernels are not affected",
            )
        )
    if target.backend == "cpu":
        return [*found, *_known_cpu(installed)]
    if target.arch in RAN:
        found.append(Finding("ok", f"{target.arch}: the test suite ran on an {RAN[target.arch]}"))
    elif target.arch in CATALOGUE:
        found.append(
            Finding(
                "note",
                f"{target.arch}: every kernel is compiled for it on every change, but it never "
                "ran before a release. The checks below are the evidence that you have",
            )
        )
    else:
        found.append(
            Finding(
                "note",
                f"{target.arch} is not in the catalogue: tiles are chosen as for its nearest "
                "known relative, and nothing was compiled for it in advance",
            )
        )
    if 0 < target.capability < 80:
        found.append(Finding("bad", f"{target.arch} has no bf16 matrix instructions: sm_80 has"))
    if target.capability >= 100:
        found.append(
            Finding(
                "note",
                "Triton has miscompiled two products into one accumulator on Blackwell. Our "
                "kernels keep an accumulator for each product",
            )
        )
    if target.backend == "hip" or _numbers(installed["triton"])[:2] != (3, 6):
        found.append(
            Finding(
                "note",
                "repeated launches are known to work with Triton 3.6 on NVIDIA only: calls launch "
                "the ordinary way here, at about 50 us of CPU time a kernel. CUDA graphs hide it",
            )
        )
    return [*found, *_known_tools(installed)]


def _known_cpu(installed: dict[str, str]) -> list[Finding]:
    found = []
    if installed["driver"] and installed["cuda"]:
        found.append(
            Finding(
                "bad",
                f"there is an NVIDIA driver ({installed['driver']}) but torch sees no GPU: a "
                f"driver too old for CUDA {installed['cuda']}, or CUDA_VISIBLE_DEVICES",
            )
        )
    elif installed["driver"]:
        found.append(
            Finding("bad", "there is an NVIDIA driver, but this torch is built without CUDA")
        )
    found.append(
        Finding("note", "no GPU: the layer runs as plain torch, correct and not what it is for")
    )
    return found


def _known_tools(installed: dict[str, str]) -> list[Finding]:
    """What Triton needs of the system to build its launchers."""
    found = []
    if not (os.environ.get("CC") or any(map(shutil.which, ("cc", "gcc", "clang")))):
        found.append(Finding("bad", "no C compiler: Triton builds its launchers with one. Set CC"))
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        found.append(
            Finding("note", "no Python.h: Triton needs it to build launchers (python3-dev)")
        )
    cuda, driver = _numbers(installed["cuda"]), _numbers(installed["driver"])
    if cuda >= (13,) and driver and driver < (580,):
        found.append(
            Finding("bad", f"CUDA {installed['cuda']} needs driver 580, not {installed['driver']}")
        )
    elif cuda >= (12,) and driver and driver < (525,):
        found.append(
            Finding("bad", f"CUDA {installed['cuda']} needs driver 525, not {installed['driver']}")
        )
    return found


# ---------------------------------------------------------------- self-test


def self_test(device: str, target: Target) -> Iterator[Callable[[], Check]]:
    """Every kernel and variant that this machine can run, each as a call that gives a `Check`."""
    kernels = target.backend != "cpu" or INTERPRETED
    for scoring, bias, groups in ROUTINGS:
        name = scoring + (", bias, groups" if bias else "")
        yield partial(check, "route", name, "fp32", 1e-5,
                      partial(_route, device, kernels, scoring, bias, groups))  # fmt: skip
    # Beyond 4,096 ids the plan takes another way.
    for ids, mapped, tokens in ((torch.int32, False, 301), (torch.int64, True, 2001)):
        name = f"{3 * tokens:,} {str(ids).removeprefix('torch.')} ids"
        yield partial(check, "plan", name + (", expert map" if mapped else ""), "int32", 0.0,
                      partial(_plan, device, kernels, ids, mapped, tokens))  # fmt: skip
    for dtype in DTYPES:
        test = partial(check, dtype=dtype, allowed=_tolerance(dtype))
        if not kernels:
            yield partial(test, "layer", "swiglu", run=partial(_cpu_layer, dtype, SWIGLU))
            yield partial(
                test, "layer", "clamped, biases", run=partial(_cpu_layer, dtype, SWIGLU_OAI)
            )
            continue
        for name, (config, tokens, options) in layer_variants(target).items():
            kernel = "decode" if config is not None and config.path == "decode" else "grouped"
            run = partial(_layer, device, dtype, config, tokens, **options)
            yield partial(test, "layer" if config is None else kernel, name, run=run)
        for reduce in (True, False):
            yield partial(test, "combine", "sum of slots" if reduce else "each slot",
                          run=partial(_combine, device, dtype, reduce))  # fmt: skip


MANY = 20 if INTERPRETED else 70  # Tokens: several tiles for some expert.
ROUTINGS = (("softmax", False, 1), ("topk_softmax", False, 1), ("sigmoid", True, 4))


def layer_variants(
    target: Target,
) -> dict[str, tuple[LayerConfig | None, int, dict[str, Any]]]:
    """Configuration, tokens and options by name; a configuration of None is the library's choice.

    Small tiles: these must be legal on every machine in every dtype.
    """
    base = KernelConfig(16, 32, 32, 2, 4, 2)
    grouped = {"pointers": base, "persistent": replace(base, persistent=True)}
    # wgmma puts 64 rows on its first operand, which swapped is the weights' columns.
    swapped = replace(base, block_n=64, swap_operands=True)
    grouped["swapped"] = swapped
    if target.tensor_descriptors or target.backend == "cpu":
        grouped["descriptors"] = replace(base, block_m=64, descriptors=True)
        grouped["descriptors, swapped"] = replace(swapped, descriptors=True)
        grouped["descriptors, persistent"] = replace(base, descriptors=True, persistent=True)
    found: dict[str, tuple[LayerConfig | None, int, dict[str, Any]]] = {}
    if "descriptors" in grouped:
        tile = grouped["descriptors"]
        found["one launch"] = (LayerConfig("grouped", tile, tile, fused=True), MANY, {})
        walks = replace(tile, persistent=True, store_parts=2)
        found["expert order"] = (LayerConfig("grouped", walks, walks, permuted=True), MANY, {})
    for name, config in grouped.items():
        layer = LayerConfig("grouped", config, config)
        found[name] = (layer, MANY, {"split": True})
        if config.descriptors:  # Gate and up of one tensor come by one descriptor.
            found[f"{name}, pair"] = (layer, MANY, {})
    found["bias, clamp"] = (
        LayerConfig("grouped", base, base), MANY, {"activation": SWIGLU_OAI, "bias": True}
    )  # fmt: skip
    stream = StreamConfig(16, 64, 4, 1 if target.backend == "hip" else 2)
    found["gate+up, down"] = (LayerConfig("decode", stream, stream), 2, {})
    for tokens in (1, 20) if INTERPRETED else (1, 5, 40, 700):
        found[f"as chosen, {tokens} token{'s' if tokens > 1 else ''}"] = (None, tokens, {})
    return found


def _tolerance(dtype: str) -> float:
    if dtype == "fp32" and torch.get_float32_matmul_precision() != "highest":
        return 2e-3  # The user allowed TF32.
    # The interpreter cuts fp32 off to bf16 instead of rounding it.
    return TOLERANCE[dtype] * (2 if INTERPRETED and dtype == "bf16" else 1)


def check(kernel: str, variant: str, dtype: str, allowed: float, run: Callable[[], float]) -> Check:
    """Runs one check; whatever it raises is this kernel's result."""
    try:
        error = run()
    except Exception as failure:
        text = str(failure).strip().splitlines()
        detail = f"{type(failure).__name__}: {text[0] if text else ''}"[:300]
        return Check(kernel, variant, dtype, False, float("nan"), allowed, detail)
    return Check(kernel, variant, dtype, error <= allowed, error, allowed)


def _error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference over norm of the result; a single element far off counts too."""
    actual, expected = actual.float().cpu(), expected.float().cpu()
    if not bool(actual.isfinite().all()):
        return float("inf")
    difference = actual - expected
    norm = float(difference.norm() / expected.norm().clamp(min=1e-30))
    worst = float(difference.abs().max() / expected.abs().max().clamp(min=1e-30))
    if bool(actual[(expected == 0).all(-1)].any()):
        return float("inf")  # What is skipped contributes exactly 0.
    return max(norm, worst / 4)


def _route(device: str, kernels: bool, scoring: str, bias: bool, groups: int) -> float:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(33, 32, generator=generator)
    logits[3, 5] = float("nan")
    correction = torch.randn(32, generator=generator) if bias else None
    limits = {"num_expert_group": groups, "topk_group": 2} if groups > 1 else {}
    options: dict[str, Any] = {"e_score_correction_bias": correction, **limits}
    expected, expected_ids = reference.route(logits, 4, scoring_func=scoring, **options)
    if kernels:
        moved = None if correction is None else correction.to(device)
        weights, ids = ops._route_accelerator(
            logits.to(device), 4, scoring, True, moved, groups if groups > 1 else 0,
            2 if groups > 1 else 0, 1.0,
        )  # fmt: skip
    else:
        weights, ids = cpu.route(logits, 4, scoring_func=scoring, **options)
    if not torch.equal(ids.cpu(), expected_ids):
        return float("inf")
    return _error(weights, expected)


def _plan(device: str, kernels: bool, dtype: torch.dtype, mapped: bool, tokens: int) -> float:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(-1, 14, (tokens, 3), generator=generator).to(
        dtype
    )  # -1, 12 and 13: skipped.
    experts = 6 if mapped else 12
    mapping = torch.arange(12, dtype=torch.int32) // 2 if mapped else None
    if mapping is not None:
        mapping[::2] = -1
    expected = reference.plan(ids, 12, expert_map=mapping, num_local_experts=experts)
    if kernels:
        moved = None if mapping is None else mapping.to(device)
        actual = ops._plan_accelerator(ids.to(device), experts, moved)
    else:
        actual = cpu.plan(ids, experts, expert_map=mapping)
    # Past the last row, `gather` is unspecified.
    rows = int(expected[1][-1])
    sizes, offsets, gather, scatter = (t.cpu() for t in actual)
    same = zip((sizes, offsets, gather[:rows], scatter),
               (*expected[:2], expected[2][:rows], expected[3]), strict=True)  # fmt: skip
    return float(not all(torch.equal(a, e) for a, e in same))


def _inputs(dtype: str, tokens: int, activation: Activation, bias: bool) -> tuple[Any, ...]:
    """Hidden states, weights, routing and the expected output, on the CPU."""
    generator = torch.Generator().manual_seed(2)
    experts, top_k, hidden, inter = 6, 2, 128, 96

    def draw(*size: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(size, generator=generator) * scale).to(DTYPES[dtype])

    weights = ExpertWeights.from_gate_up(
        draw(experts, 2 * inter, hidden, scale=hidden**-0.5),
        draw(experts, hidden, inter, scale=inter**-0.5),
        gate_up_bias=draw(experts, 2 * inter) if bias else None,
        down_bias=draw(experts, hidden) if bias else None,
    )
    x = draw(tokens, hidden)
    ids = torch.rand(tokens, experts, generator=generator).topk(top_k).indices.to(torch.int32)
    ids[0, 0] = -1
    if tokens > 8:
        ids[7] = -1  # A token without experts.
    router = torch.rand(tokens, top_k, generator=generator)
    expected = reference.fused_experts(x, weights, router, ids, activation=activation)
    return x, weights, router, ids, expected


def _cpu_layer(dtype: str, activation: Activation) -> float:
    x, weights, router, ids, expected = _inputs(dtype, 40, activation, activation != SWIGLU)
    return _error(cpu.fused_experts(x, weights, router, ids, activation=activation), expected)


def _layer(
    device: str,
    dtype: str,
    config: LayerConfig | None,
    tokens: int,
    *,
    activation: Activation = SWIGLU,
    bias: bool = False,
    split: bool = False,
) -> float:
    """Past torch's dispatcher, so that Triton's interpreter can run it on a CPU."""
    x, w, router, ids, expected = _inputs(dtype, tokens, activation, bias)
    gate_up = torch.cat([w.gate, w.up], 1).to(device)
    gate, up = gate_up[:, : w.intermediate_size], gate_up[:, w.intermediate_size :]
    if split:
        gate, up = gate.contiguous(), up.contiguous()
    biases = [None if b is None else b.to(device) for b in (w.gate_bias, w.up_bias, w.down_bias)]
    x, router, ids = x.to(device), router.to(device), ids.to(device)
    arguments = (
        x, gate, up, w.down.to(device), *biases, None, None, None, None, None, None, "dense",
        router, ids, None, activation.kind, activation.alpha, activation.beta, activation.limit,
        False, True, False, "" if config is None else config.to_json(),
    )  # fmt: skip
    # The second call repeats the first one's launches where that is supported.
    outs = [torch.full_like(x, float("nan")) for _ in range(2)]
    for out in outs:
        ops.fused_experts_accelerator(*arguments, out=out)  # type: ignore[misc]
    if not torch.equal(*outs):
        return float("inf")
    return _error(outs[0], expected)


def _combine(device: str, dtype: str, reduce: bool) -> float:
    generator = torch.Generator().manual_seed(3)
    tokens, top_k, hidden = 21, 3, 72
    rows = torch.randn(tokens * top_k, hidden, generator=generator).to(DTYPES[dtype])
    scatter = torch.randperm(tokens * top_k, generator=generator).to(torch.int32)
    scatter[::5] = -1
    scatter[3:6] = -1
    weights = torch.rand(tokens, top_k, generator=generator)
    kept = rows.float()[scatter.clamp(min=0).long()] * (scatter >= 0)[:, None]
    expected = kept.view(tokens, top_k, hidden) * weights[:, :, None]
    expected = expected.sum(1) if reduce else expected
    out = torch.full(expected.shape, float("nan"), dtype=rows.dtype, device=device)
    combine_into(out, rows.to(device), scatter.to(device), weights.to(device), router_weight=True)
    return _error(out, expected)


# ---------------------------------------------------------------- printing


def _runs(device: str) -> str:
    """What the checks run on this machine, in words."""
    if Target.probe(device).backend != "cpu":
        return "kernels on the GPU"
    if INTERPRETED:
        return "kernels in Triton's interpreter, on the CPU"
    return "the CPU path: no kernel runs without a GPU"


def _name(device: str) -> str:
    if device == "cpu":
        return f"{platform.machine()} CPU"
    return str(torch.cuda.get_device_name(device))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(v) for name, v in value.items()}
    if isinstance(value, list):
        return [_finite(v) for v in value]
    if isinstance(value, float) and not abs(value) < float("inf"):
        return None
    return value


def _print(
    console: Console, device: str, target: Target, findings: list[Finding], checks: list[Check]
) -> None:
    console.print(f"[bold]{_name(device)}[/bold]", highlight=False)
    if target.backend != "cpu":
        console.print(
            f"{target.arch}, {target.num_sms} multiprocessors, {target.shared_memory // 1024} KiB "
            f"shared memory, {target.l2_bytes >> 20} MiB L2, nominal {target.memory_gbs:.0f} GB/s "
            f"and {target.bf16_tflops:.0f} bf16 TFLOP/s",
            highlight=False,
        )
        has = "yes" if target.tensor_descriptors else "no"
        wgmma = "yes" if target.warpgroup_mma else "no"
        console.print(f"tensor descriptors: {has} · wgmma: {wgmma}", highlight=False)
    line = " · ".join(f"{name} {version}" for name, version in versions().items() if version)
    console.print(line, style="dim", highlight=False)
    marks = {"ok": "[green]ok[/green]  ", "note": "[yellow]note[/yellow]", "bad": "[red]bad[/red] "}
    for finding in findings:
        console.print(f"{marks[finding.level]} {finding.text}", highlight=False)

    console.print(f"\nSelf-test of {_runs(device)}", style="bold", highlight=False)
    table = Table()
    for column in ("kernel", "variant", *DTYPES, "int32"):
        table.add_column(column, justify="left" if column in ("kernel", "variant") else "right")
    names = dict.fromkeys((c.kernel, c.variant) for c in checks)
    cells = {(c.kernel, c.variant, c.dtype): c for c in checks}
    for name in sorted(names, key=lambda n: ORDER.index(n[0])):
        found = [cells.get((*name, dtype)) for dtype in (*DTYPES, "int32")]
        table.add_row(*name, *map(_cell, found))
    console.print(table)
    failed = [c for c in checks if not c.ok]
    for c in failed:
        reason = c.detail or f"error {c.error:.1e}, allowed {c.allowed:.1e}"
        console.print(
            f"[red]failed[/red] {c.kernel}, {c.variant}, {c.dtype}: {reason}", highlight=False
        )
    if failed:
        console.print(f"[red]{len(failed)} of {len(checks)} checks failed.")
    else:
        console.print(f"[green]{len(checks)} of {len(checks)} checks passed.")


ORDER = ("route", "plan", "layer", "grouped", "decode", "combine")


def _cell(result: Check | None) -> str:
    if result is None:
        return ""
    if not result.ok:
        return "[red]failed"
    return "[green]exact" if result.error == 0 else f"[green]{result.error:.0e}"
