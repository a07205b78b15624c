"""Launching kernels: one place for the interpreter's needs, precision, compiling without running,
and recording launches so that a later call can repeat them (replay.py)."""

from __future__ import annotations

import contextlib
import contextvars
import enum
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from triton import knobs

from ..target import Target

# As Triton decides where kernels are defined: TRITON_INTERPRET may be 1, true, on or yes.
INTERPRETED = bool(knobs.runtime.interpret)


def _mend_interpreter() -> None:
    """Keeps a scalar condition a condition where a mask is made of it.

    Triton's interpreter gives the mask the type of what was compared; 3.9 then refuses to load by
    it. No condition changes its value.
    """
    import numpy as np
    import triton.language as tl

    try:
        from triton.runtime.interpreter import InterpreterBuilder, TensorHandle
    except ImportError:  # Another Triton, with other names: it may need no mending.
        return
    splat = InterpreterBuilder.create_splat

    def create_splat(self: Any, ret_ty: Any, arg: Any) -> Any:
        if arg.data.dtype == np.bool_:
            return TensorHandle(np.full(ret_ty.shape, arg.data), tl.int1)
        return splat(self, ret_ty, arg)

    InterpreterBuilder.create_splat = create_splat


if INTERPRETED:
    _mend_interpreter()


@dataclass(frozen=True)
class Launch:
    """One launch as it was made: the compiled kernel, its grid and all its arguments in order."""

    compiled: Any
    grid: tuple[int, int, int]
    args: tuple[Any, ...]


class Overlap(enum.IntEnum):
    """When the next kernel of the stream may start, to wait inside for the end of this one."""

    NONE = 0  # Launched the ordinary way.
    EARLY = 1  # Once all programs have begun: most is gained, unless it takes their place.
    LATE = 2  # Once all programs have stored their results.


class _Mode:
    """What `launch` does besides running: compile instead, or take notes."""

    def __init__(self) -> None:
        self.compiled_keys: list[tuple[str, str]] | None = None
        self.record: list[Launch] | None = None


_mode: contextvars.ContextVar[_Mode | None] = contextvars.ContextVar("tilewise_mode", default=None)


def next_power_of_two(value: int) -> int:
    return 1 << max(0, value - 1).bit_length()


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def dot_precision(dtype: torch.dtype, target: Target) -> str:
    """Triton's input_precision. fp32 stays fp32-accurate unless the user allowed TF32 to torch.

    Three TF32 products (tf32x3) keep fp32 accuracy on NVIDIA's matrix units; AMD's have fp32.
    """
    if dtype is not torch.float32 or target.backend != "cuda":
        return "ieee"
    return "tf32" if tf32_allowed() else "tf32x3"


def tf32_allowed() -> bool:
    """Whether the user let torch's fp32 products on NVIDIA use TF32, by either of its switches."""
    precision = getattr(torch.backends.cuda.matmul, "fp32_precision", "none")
    if precision != "none":
        return bool(precision == "tf32")
    try:
        return torch.get_float32_matmul_precision() != "highest"
    except RuntimeError:  # The newer switch is in use elsewhere, and torch refuses to mix them.
        return False


def upcast_dot(dtype: torch.dtype) -> bool:
    """Whether kernels must widen operands of a dot: the interpreter gets bf16 products wrong."""
    return INTERPRETED and dtype is torch.bfloat16


def on_device(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Makes `device` current: Triton launches on the current device, wherever its arguments are."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(device)


@contextlib.contextmanager
def compile_only() -> Iterator[list[tuple[str, str]]]:
    """Within this context `launch` compiles, runs nothing; yields (kernel name, hash) pairs."""
    mode = _Mode()
    mode.compiled_keys = []
    token = _mode.set(mode)
    try:
        yield mode.compiled_keys
    finally:
        _mode.reset(token)


@contextlib.contextmanager
def recording() -> Iterator[list[Launch]]:
    """Within this context `launch` runs and takes notes."""
    mode = _Mode()
    mode.record = []
    token = _mode.set(mode)
    try:
        yield mode.record
    finally:
        _mode.reset(token)


def launch(
    kernel: Any, grid: tuple[int, ...], *args: Any, first: bool = False, **options: Any
) -> None:
    """Runs `kernel` over `grid`; compiles it instead within `compile_only`.

    A kernel whose OVERLAP is not `Overlap.NONE` starts while the previous one of the stream still
    runs, and waits for it inside (kernels/dependent.py).

    Args:
        first: the kernel before is not ours: this one waits for nothing inside, and starts the
            ordinary way.
    """
    if options.get("OVERLAP") and not first:
        options["launch_pdl"] = True
    mode = _mode.get()
    if mode is not None and mode.compiled_keys is not None:
        compiled = kernel.warmup(*args, grid=grid, **options)
        mode.compiled_keys.append((kernel.fn.__name__, compiled.hash))
        return
    compiled = kernel[grid](*args, **options)
    if mode is not None and mode.record is not None:
        constants = tuple(options[name] for name in kernel.arg_names[len(args) :])
        x, y, z = (*grid, 1, 1)[:3]
        mode.record.append(Launch(compiled, (x, y, z), (*args, *constants)))
