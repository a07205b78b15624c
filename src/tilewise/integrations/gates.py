"""Which of our activations a transformers module computes, told by class or by trying its gate."""

from __future__ import annotations

import builtins
import dis
import functools
import importlib
import math
from types import CodeType, FunctionType, ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import nn

from ..moe.activation import GEGLU, GEGLU_TANH, GELU, GELU_TANH, RELU2, SILU, SWIGLU, Activation

# Class of `act_fn` -> activation with and without a gate. A subclass may compute anything else.
ACTIVATIONS = {
    "torch.nn.functional.silu": (SWIGLU, SILU),
    "torch.nn.modules.activation.SiLU": (SWIGLU, SILU),
    "transformers.activations.SiLUActivation": (SWIGLU, SILU),
    "transformers.activations.GELUActivation": (GEGLU, GELU),
    "transformers.activations.GELUTanh": (GEGLU_TANH, GELU_TANH),
    "transformers.activations.NewGELUActivation": (GEGLU_TANH, GELU_TANH),
    "transformers.activations.ReLUSquaredActivation": (None, RELU2),
}
# What gates of a model's own call the numbers they take; they may read these and `act_fn`.
GATE_NUMBERS = ("alpha", "swiglu_alpha", "limit", "swiglu_limit")


def kind_of(act_fn: Any) -> str:
    """Where the class, or the function, comes from."""
    named = act_fn if isinstance(act_fn, FunctionType) else type(act_fn)
    return f"{named.__module__}.{named.__qualname__}"


def is_changed(module: Any) -> bool:
    """Whether calling this module does more, or something else, than its class says."""
    if not isinstance(module, nn.Module):
        return False
    return "forward" in vars(module) or bool(module._forward_hooks or module._forward_pre_hooks)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def recognise(
    function: Any, kind: str, numbers: tuple[float | None, ...], concatenated: bool
) -> Activation | None:
    """The activation that a gate of a model's own computes, None if we have none like it."""
    return _probe(function, kind, numbers, concatenated)


@functools.cache
def _probe(
    function: Any, kind: str, numbers: tuple[float | None, ...], concatenated: bool
) -> Activation | None:
    """Runs the gate on values around every bend, away from its module, and compares.

    The stand-in for the module has the numbers and the activation, nothing else: a gate that reads
    more fails here, so that whatever is recognised depends on the arguments of this function only.
    """
    if not _is_closed(function):
        return None
    alphas = sorted({1.0, *(n for n in numbers[:2] if n is not None and math.isfinite(n))})
    limits = sorted({n for n in numbers[2:] if n is not None and math.isfinite(n) and n > 0})
    known = {name: n for name, n in zip(GATE_NUMBERS, numbers, strict=True) if n is not None}
    stand_in = SimpleNamespace(**known)
    kinds = ["swiglu"]
    own = ACTIVATIONS.get(kind, (None, None))[0]
    if own is not None:
        module, _, name = kind.rpartition(".")
        act_fn = getattr(importlib.import_module(module), name)
        stand_in.act_fn = act_fn if isinstance(act_fn, FunctionType) else act_fn()
        if own.kind not in kinds:
            kinds.append(own.kind)
    candidates = [
        Activation(name, alpha, beta, limit)
        for limit in (None, *limits)
        for name in kinds
        for alpha in (alphas if name == "swiglu" else [1.0])
        for beta in (0.0, 1.0)
    ]
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        candidates = _agreeing(function, stand_in, candidates, limits, concatenated, dtype)
    return candidates[0] if candidates else None


def _agreeing(
    function: Any,
    stand_in: Any,
    candidates: list[Activation],
    limits: list[float],
    concatenated: bool,
    dtype: torch.dtype,
) -> list[Activation]:
    """The candidates that the gate agrees with, up to what rounding to this dtype explains."""
    exact = dtype is torch.float32
    # Another count of values, and with gradients: a gate that looks at either is told apart.
    with torch.set_grad_enabled(not exact), torch.device("cpu"):
        values = torch.linspace(-12.0, 12.0, 97 if exact else 50)
        bends = [n * scale for n in limits for scale in (-1.5, -1.01, -0.99, 0.99, 1.01, 1.5)]
        far = [n * scale for n in (300.0, 1e3, 1e4) for scale in (-1.0, 1.0)]
        values = torch.cat([values, torch.tensor([*bends, *far, 1e-4])]).to(dtype)
        if dtype is torch.float16:
            values = values.clamp(-200.0, 200.0)  # Products of the gate's own would overflow.
        gate = values[:, None].expand(-1, len(values)).contiguous()
        up = gate.mT.contiguous()
        pair = (gate, up)
        rows = torch.cat(pair, -1) if concatenated else torch.stack(pair, -1).flatten(1)
        try:
            actual = function(stand_in, rows)
        except Exception:
            return []
        if not isinstance(actual, torch.Tensor) or actual.shape != gate.shape:
            return []
        found = []
        for activation in candidates:
            expected = activation.apply(gate, up)
            # Low precision loses digits where 1 + tanh cancels; products may leave its range.
            room = 1e-6 if exact else 0.02 * (gate.float().abs() * (up.float().abs() + 1.0) + 1.0)
            close = (actual.float() - expected).abs() <= room + (
                1e-5 if exact else 0.05
            ) * expected.abs()
            beyond = expected.abs() > torch.finfo(dtype).max / 2
            if bool((close | beyond).all()):
                found.append(activation)
        return found


def _is_closed(function: Any) -> bool:
    """Whether the code reads nothing from outside but its arguments, torch and builtins."""
    code = function.__code__
    if function.__closure__ or any(isinstance(part, CodeType) for part in code.co_consts):
        return False
    for step in dis.get_instructions(code):
        if step.opname == "LOAD_GLOBAL":
            name = step.argval
            if name not in function.__globals__:
                if not hasattr(builtins, name):
                    return False
                continue
            found = function.__globals__[name]
            if not isinstance(found, ModuleType) or found.__name__.split(".")[0] != "torch":
                return False
    return True
