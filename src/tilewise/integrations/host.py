"""What the plug-ins of vLLM and SGLang share: weights as views, compiling ahead, saying it once."""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Callable
from typing import Any

import torch

from ..models import MoEShape
from ..moe.activation import Activation
from ..moe.warmup import warmup
from ..moe.weights import ExpertWeights

OFF = ("0", "false", "off", "no")
ON = ("1", "true", "on", "yes")


def _switch(name: str) -> str:
    return os.environ.get(name, "").strip().lower()


def switched_on(name: str) -> bool:
    """Whether the environment asks for a plug-in; unset or empty it leaves that to the host."""
    return _switch(name) in ON


def switched_off(name: str, log: logging.Logger) -> bool:
    """Whether the environment switches a plug-in off; what says neither does, with a warning."""
    value = _switch(name)
    if value and value not in OFF + ON:
        log.warning("tilewise: %s=%r is neither 0 nor 1 and is taken for 0", name, value)
        return True
    return value in OFF


# Kinds of layers whose tensors fit together; names and numbers only, no tensor.
_fitting: set[tuple[Any, ...]] = set()


def views(
    w13: torch.Tensor,
    w2: torch.Tensor,
    b13: torch.Tensor | None = None,
    b2: torch.Tensor | None = None,
    *,
    gated: bool = True,
    layout: str = "gate_up",
) -> ExpertWeights:
    """A layer's weights as ours, made anew at every call.

    A view that was kept would keep the memory of weights that the host has moved or freed. What is
    kept is which kinds of layers fit together, so that a call costs the views alone.

    Raises:
        ValueError: shapes, dtypes or devices that don't fit together.
    """
    key: tuple[Any, ...] = (
        gated, layout, w13.shape, w13.dtype, w13.device, w2.shape, w2.dtype, w2.device
    )  # fmt: skip
    if b13 is not None or b2 is not None:
        key += tuple(b if b is None else (b.shape, b.dtype, b.device) for b in (b13, b2))
    if w13.requires_grad or w2.requires_grad:
        w13, w2 = w13.detach(), w2.detach()
        b13, b2 = (b if b is None else b.detach() for b in (b13, b2))
    if torch.compiler.is_compiling() or key not in _fitting:
        if gated:
            weights = ExpertWeights.from_gate_up(
                w13, w2, layout=layout, gate_up_bias=b13, down_bias=b2
            )
        else:
            weights = ExpertWeights.from_ungated(w13, w2, up_bias=b13, down_bias=b2)
        if not torch.compiler.is_compiling():
            _fitting.add(key)
        return weights
    gate, up = _halves(w13, layout) if gated else (None, w13)
    gate_bias, up_bias = (None, b13) if b13 is None or not gated else _halves(b13, layout)
    weights = object.__new__(ExpertWeights)
    weights.__dict__.update(
        gate=gate, up=up, down=w2, gate_bias=gate_bias, up_bias=up_bias, down_bias=b2
    )
    return weights


def _halves(rows: torch.Tensor, layout: str) -> tuple[torch.Tensor, ...]:
    if layout == "interleaved":
        return rows[:, 0::2], rows[:, 1::2]
    return rows.chunk(2, 1)


class Unprepared(RuntimeError):
    """Kernels that a call can need do not compile here."""


class Preparation:
    """Compiles what calls can need, once a process for all layers that are alike."""

    def __init__(self) -> None:
        self._largest: dict[tuple[Any, ...], int] = {}
        self._failed: dict[tuple[Any, ...], str] = {}

    def __call__(
        self,
        weights: ExpertWeights,
        activation: Activation,
        top_k: int,
        num_tokens: int,
        largest: int,
        **options: Any,
    ) -> str | None:
        """Prepares calls of up to `largest` tokens, if those of `num_tokens` are not yet.

        Nothing is compiled while a CUDA graph is captured.

        Args:
            options: as `warmup` takes them.

        Returns:
            What was done, None if there was nothing to do.

        Raises:
            Unprepared: it failed, now or in a layer that is alike.
        """
        biases = weights.gate_bias, weights.up_bias, weights.down_bias
        key = (
            weights.up.shape, weights.up.stride(), weights.down.stride(), weights.dtype,
            *(None if bias is None else bias.dtype for bias in biases), weights.device, top_k,
            activation, *options.values(),
        )  # fmt: skip
        if num_tokens <= self._largest.get(key, 0):
            return None
        if key in self._failed:
            raise Unprepared(self._failed[key])
        device = weights.device
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return None
        experts, inter, hidden = weights.up.shape
        start = time.perf_counter()
        try:
            variants = warmup(
                # A device may hold fewer experts than a token chooses.
                MoEShape(max(experts, top_k), top_k, hidden, inter),
                max_tokens=largest,
                dtype=weights.dtype,
                activation=activation,
                weights=weights,
                routing=False,
                device=device,
                **options,
            )
        except Exception as error:
            self._failed[key] = f"kernels do not compile, {type(error).__name__}: {error}"
            raise Unprepared(self._failed[key]) from error
        self._largest[key] = largest
        seconds = time.perf_counter() - start
        return f"{len(variants)} kernel variants ready for up to {largest} tokens, {seconds:.1f} s"


class Once:
    """Logs a message once, whatever its sizes, and no more than a hundred in all."""

    def __init__(self, log: Callable[[str], None]) -> None:
        self._log = log
        self._said: set[str] = set()

    def __call__(self, message: str) -> None:
        if torch.compiler.is_compiling():
            return
        kind = re.sub(r"\b\d+\b", "0", message)
        if kind not in self._said and len(self._said) < 100:
            self._said.add(kind)
            self._log(message)


def kind_of(weights: ExpertWeights, activation: str, top_k: int) -> str:
    """A layer in words, for the log."""
    experts, inter, hidden = weights.up.shape
    dtype = str(weights.dtype).removeprefix("torch.")
    return (
        f"{activation} experts: {experts} here, top {top_k}, hidden {hidden}, "
        f"intermediate {inter}, {dtype}"
    )


def logger(name: str) -> logging.Logger:
    """A logger below the host's, which has the handlers."""
    return logging.getLogger(f"{name}.tilewise")
