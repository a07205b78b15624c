"""Activations as values: what happens between the two products, stated once for everyone."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch.nn import functional as F

GATED_KINDS = ("swiglu", "geglu", "geglu_tanh", "reglu2")
UNGATED_KINDS = ("silu", "gelu", "gelu_tanh", "relu2")
KINDS = GATED_KINDS + UNGATED_KINDS


@dataclass(frozen=True)
class Activation:
    """`act(gate) * (up + beta)` for gated kinds, `act(up)` for the others.

    Attributes:
        kind: gated: "swiglu" (SiLU), "geglu" (GELU by erf), "geglu_tanh" (GELU by tanh), "reglu2"
            (squared ReLU); ungated: "silu", "gelu", "gelu_tanh", "relu2".
        alpha: slope inside SiLU's sigmoid, x * sigmoid(alpha * x); "swiglu" and "silu" only.
        beta: added to up; gated kinds only.
        limit: clamps the activated input from above, and for gated kinds up to [-limit, limit];
            applied before anything else. None does not clamp.

    Raises:
        ValueError: a kind or a combination that no kernel computes.
    """

    kind: str
    alpha: float = 1.0
    beta: float = 0.0
    limit: float | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(
                f"activation kind {self.kind!r} is not supported; allowed: {', '.join(KINDS)}. "
                "Apply another one between two grouped products yourself"
            )
        try:
            finite = math.isfinite(self.alpha) and math.isfinite(self.beta)
            clamps = self.limit is None or (math.isfinite(self.limit) and self.limit > 0)
        except TypeError:
            raise TypeError(
                f"alpha={self.alpha!r}, beta={self.beta!r} and limit={self.limit!r} must be "
                "numbers; limit may be None"
            ) from None
        if not finite:
            raise ValueError(f"alpha={self.alpha} and beta={self.beta} must be finite")
        if self.alpha != 1.0 and self.kind not in ("swiglu", "silu"):
            raise ValueError(
                f"alpha={self.alpha} belongs to SiLU; {self.kind!r} takes alpha=1.0 only"
            )
        if self.beta != 0.0 and not self.is_gated:
            raise ValueError(f"beta={self.beta} is added to up; {self.kind!r} has no gate: use 0.0")
        if not clamps:
            raise ValueError(f"limit={self.limit} must be positive and finite, or None")

    @property
    def is_gated(self) -> bool:
        return self.kind in GATED_KINDS

    def apply(self, gate: torch.Tensor | None, up: torch.Tensor) -> torch.Tensor:
        """The specification, in fp32.

        Args:
            gate: any shape, for gated kinds; None otherwise.
            up: the same shape.

        Returns:
            fp32 of that shape.
        """
        if (gate is not None) != self.is_gated:
            given = "no gate" if gate is None else "a gate"
            raise ValueError(f"activation {self.kind!r} got {given}")
        up = up.float()
        if gate is None:
            return self._unary(up if self.limit is None else up.clamp(max=self.limit))
        gate = gate.float()
        if self.limit is not None:
            gate = gate.clamp(max=self.limit)
            up = up.clamp(-self.limit, self.limit)
        return self._unary(gate) * (up + self.beta)

    def _unary(self, x: torch.Tensor) -> torch.Tensor:
        if self.kind in ("swiglu", "silu"):
            return x * torch.sigmoid(self.alpha * x)
        if self.kind in ("geglu", "gelu"):
            return F.gelu(x)
        if self.kind in ("geglu_tanh", "gelu_tanh"):
            return F.gelu(x, approximate="tanh")
        return F.relu(x).square()


SWIGLU = Activation("swiglu")
GEGLU = Activation("geglu")
GEGLU_TANH = Activation("geglu_tanh")
REGLU2 = Activation("reglu2")
SILU = Activation("silu")
GELU = Activation("gelu")
GELU_TANH = Activation("gelu_tanh")
RELU2 = Activation("relu2")
# gpt-oss: gate clamped at 7 from above, up to [-7, 7], and one added to up.
SWIGLU_OAI = Activation("swiglu", alpha=1.702, beta=1.0, limit=7.0)
