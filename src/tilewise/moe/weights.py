"""Expert weights as views: every layout a checkpoint or a host keeps them in is one code path."""

from __future__ import annotations

from dataclasses import dataclass

import torch

LAYOUTS = ("gate_up", "up_gate", "interleaved")


@dataclass(frozen=True, eq=False)
class ExpertWeights:
    """The experts on one device. Nothing is copied: tensors may be slices, transposes or separate.

    Attributes:
        gate: [num_local_experts, intermediate_size, hidden_size], None for experts without a gate.
        up: [num_local_experts, intermediate_size, hidden_size].
        down: [num_local_experts, hidden_size, intermediate_size].
        gate_bias: [num_local_experts, intermediate_size] or None.
        up_bias: [num_local_experts, intermediate_size] or None.
        down_bias: [num_local_experts, hidden_size] or None.

    Raises:
        ValueError: shapes, dtypes or devices that don't fit together.
    """

    gate: torch.Tensor | None
    up: torch.Tensor
    down: torch.Tensor
    gate_bias: torch.Tensor | None = None
    up_bias: torch.Tensor | None = None
    down_bias: torch.Tensor | None = None

    def __post_init__(self) -> None:
        if self.up.dim() != 3:
            raise ValueError(
                "up must be [num_experts, intermediate_size, hidden_size], got "
                f"{tuple(self.up.shape)}"
            )
        e, i, h = self.up.shape
        expected = {
            "gate": (e, i, h),
            "down": (e, h, i),
            "gate_bias": (e, i),
            "up_bias": (e, i),
            "down_bias": (e, h),
        }
        for name, shape in expected.items():
            tensor: torch.Tensor | None = getattr(self, name)
            if tensor is None:
                continue
            if tuple(tensor.shape) != shape:
                raise ValueError(
                    f"{name} must be {shape} to go with up {(e, i, h)}, got {tuple(tensor.shape)}"
                )
            if tensor.device != self.up.device:
                raise ValueError(f"{name} is on {tensor.device}, up on {self.up.device}")
            if tensor.dtype != self.up.dtype and not name.endswith("bias"):
                raise ValueError(f"{name} is {tensor.dtype}, up is {self.up.dtype}: use one dtype")
        if self.gate is None and self.gate_bias is not None:
            raise ValueError("gate_bias is given without gate")
        if self.gate is not None and (self.gate_bias is None) != (self.up_bias is None):
            raise ValueError("gate_bias and up_bias come together: give both or neither")

    @property
    def num_local_experts(self) -> int:
        return self.up.shape[0]

    @property
    def intermediate_size(self) -> int:
        return self.up.shape[1]

    @property
    def hidden_size(self) -> int:
        return self.up.shape[2]

    @property
    def dtype(self) -> torch.dtype:
        return self.up.dtype

    @property
    def device(self) -> torch.device:
        return self.up.device

    @property
    def is_gated(self) -> bool:
        return self.gate is not None

    @classmethod
    def from_gate_up(
        cls,
        gate_up: torch.Tensor,
        down: torch.Tensor,
        *,
        layout: str = "gate_up",
        transposed: bool = False,
        gate_up_bias: torch.Tensor | None = None,
        down_bias: torch.Tensor | None = None,
    ) -> ExpertWeights:
        """Views of weights stored together.

        Args:
            gate_up: [E, 2I, H], or [E, H, 2I] if `transposed` (gpt-oss in transformers).
            down: [E, H, I], or [E, I, H] if `transposed`.
            layout: order of the 2I rows: "gate_up" halves, "up_gate" halves, or "interleaved" with gate
                in the even rows.
            gate_up_bias: [E, 2I] in the same order.
            down_bias: [E, H].
        """
        if layout not in LAYOUTS:
            raise ValueError(f"layout={layout!r} must be one of {LAYOUTS}")
        if gate_up.dim() != 3 or down.dim() != 3:
            raise ValueError(
                f"gate_up and down must have three dimensions, got {tuple(gate_up.shape)} and "
                f"{tuple(down.shape)}"
            )
        if transposed:
            gate_up, down = gate_up.transpose(1, 2), down.transpose(1, 2)
        if gate_up.shape[1] % 2:
            raise ValueError(f"gate_up holds gate and up, but has {gate_up.shape[1]} rows: odd")

        def split(t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            if layout == "interleaved":
                return t[:, 0::2], t[:, 1::2]
            half = t.shape[1] // 2
            first, second = t[:, :half], t[:, half:]
            return (first, second) if layout == "gate_up" else (second, first)

        gate, up = split(gate_up)
        gate_bias, up_bias = (None, None) if gate_up_bias is None else split(gate_up_bias)
        return cls(gate, up, down, gate_bias, up_bias, down_bias)

    @classmethod
    def from_ungated(
        cls,
        up: torch.Tensor,
        down: torch.Tensor,
        *,
        transposed: bool = False,
        up_bias: torch.Tensor | None = None,
        down_bias: torch.Tensor | None = None,
    ) -> ExpertWeights:
        """Views of weights without a gate: up [E, I, H], down [E, H, I], or both transposed."""
        if transposed:
            up, down = up.transpose(1, 2), down.transpose(1, 2)
        return cls(None, up, down, None, up_bias, down_bias)
