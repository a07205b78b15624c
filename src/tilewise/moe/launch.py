"""Launching kernels: one place for the interpreter's needs, precision, and compiling without running."""

from __future__ import annotations

import contextlib
import contextvars
import os
from collections.abc import Iterator
from typing import Any

import torch
import triton

from ..target import Target

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"

_recorded: contextvars.ContextVar[list[tuple[str, Any]] | None] = contextvars.ContextVar(
    "tilewise_recorded", default=None
)


def next_power_of_two(value: int) -> int:
    return 1 << max(0, value - 1).bit_length()


def dot_precision(dtype: torch.dtype, target: Target) -> str:
    """Triton's input_precision. fp32 stays fp32-accurate unless the user allowed TF32 to torch.

    Three TF32 products (tf32x3) keep fp32 accuracy on NVIDIA's matrix units; AMD's have fp32 itself.
    """
    if dtype is not torch.float32 or target.backend != "cuda":
        return "ieee"
    return "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def upcast_dot(dtype: torch.dtype) -> bool:
    """Whether kernels must widen operands before a dot: the interpreter gets bf16 products wrong."""
    return INTERPRETED and dtype is torch.bfloat16


@contextlib.contextmanager
def compile_only() -> Iterator[list[tuple[str, Any]]]:
    """Within this context `launch` compiles instead of running; yields (kernel name, key) pairs."""
    keys: list[tuple[str, Any]] = []
    token = _recorded.set(keys)
    try:
        yield keys
    finally:
        _recorded.reset(token)


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Runs `kernel` over `grid`, or compiles it within `compile_only`."""
    keys = _recorded.get()
    if keys is None:
        kernel[grid](*args, **options)
        return
    compiled = kernel.warmup(*args, grid=grid, **options)
    keys.append((kernel.fn.__name__, None if compiled is None else compiled.hash))


def cdiv(a: int, b: int) -> int:
    return triton.cdiv(a, b)
