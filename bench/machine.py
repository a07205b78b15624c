"""Where a number comes from: hardware, versions, commit, and the ceilings of the run at hand."""

from __future__ import annotations

import hashlib
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton

ROOT = Path(__file__).resolve().parent.parent


def require_gpu() -> None:
    """Ends the program with one line where there is no GPU to measure."""
    if not torch.cuda.is_available():
        print(f"this needs a CUDA GPU; torch {torch.__version__} finds none here", file=sys.stderr)
        raise SystemExit(2)


def describe() -> dict[str, Any]:
    """Returns the hardware, the versions and the commit, for the meta of a results file."""
    gpu = torch.cuda.get_device_properties(0)
    return {
        "hardware": gpu.name,
        "sms": gpu.multi_processor_count,
        "memory_GiB": round(gpu.total_memory / 2**30, 1),
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "commit": commit(),
        "source": source_digest(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def commit() -> str:
    """Returns the commit: ``TILEWISE_COMMIT`` where the tree travels without its git folder."""
    return os.environ.get("TILEWISE_COMMIT") or _output("git", "-C", str(ROOT), "rev-parse", "HEAD")


def source_digest(root: Path = ROOT / "src" / "tilewise") -> str:
    """Returns a digest of the library's Python files, which also tells uncommitted changes."""
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def ceilings() -> dict[str, float]:
    """Measures the copy rate (read + write) and the bf16 product rate of this GPU."""
    source = torch.randn(2**31, device="cuda", dtype=torch.bfloat16)
    target = torch.empty_like(source)
    copy_us = _median_us(lambda: target.copy_(source))
    copy_gbs = 2 * source.nbytes / copy_us / 1e3
    a, b = torch.randn(2, 8192, 8192, device="cuda", dtype=torch.bfloat16)
    product_us = _median_us(lambda: a @ b)
    return {"copy_GBs": copy_gbs, "bf16_TFLOPs": 2 * 8192**3 / product_us / 1e6}


def _median_us(call: Callable[[], object], repeats: int = 20) -> float:
    for _ in range(3):
        call()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3)
    return statistics.median(times)


def _output(*command: str) -> str:
    try:
        run = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return run.stdout.strip().splitlines()[0] if run.stdout.strip() else "unknown"
