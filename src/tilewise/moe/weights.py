"""Expert weights as views: every layout a checkpoint or a host keeps them in is one code path."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .tensors import check_tensors

LAYOUTS = ("gate_up", "up_gate", "interleaved")


@dataclass(frozen=True, eq=False)
class ExpertWeights:
    """The experts on one device. Nothing is copied: tensors may be slices, transposes or separate.

    Attributes:
        gate: [num_local_experts, intermediate_size, hidden_size], None for experts without a gate.
        up: [num_local_experts, intermediate_size, hidden_size].
        down: [num_local_experts, hidden_size, intermediate_size].
        gate_bias: [num_local_experts, intermediate_size] or None; a bias may also be fp32.
        up_bias: [num_local_experts, intermediate_size] or None.
        down_bias: [num_local_experts, hidden_size] or None.

    Raises:
        TypeError: something else in a tensor's place.
        ValueError: shapes, dtypes or devices that don't fit together.
    """

    gate: torch.Tensor | None
    up: torch.Tensor
    down: torch.Tensor
    gate_bias: torch.Tensor | None = None
    up_bias: torch.Tensor | None = None
    down_bias: torch.Tensor | None = None

    def __post_init__(self) -> None:
        check_tensors(
            ("gate", "gate_bias", "up_bias", "down_bias"), gate=self.gate, up=self.up,
            down=self.down, gate_bias=self.gate_bias, up_bias=self.up_bias,
            down_bias=self.down_bias,
        )  # fmt: skip
        if self.up.dim() != 3:
            raise ValueError(
                "up must be [num_experts, intermediate_size, hidden_size], got "
                f"{tuple(self.up.shape)}"
            )
        e, i, h = self.up.shape
        if not (e and i and h):
            raise ValueError(f"up is {(e, i, h)}: every size must be at least 1")
        if self.up.dtype not in (torch.bfloat16, torch.float16, torch.float32):
            raise ValueError(
                f"weights are {self.up.dtype}; allowed: bfloat16, float16, float32. Quantised "
                "weights are not supported yet: dequantise them first"
            )
        device = self.up.device
        for name, tensor, shape in (
            ("gate", self.gate, (e, i, h)),
            ("down", self.down, (e, h, i)),
            ("gate_bias", self.gate_bias, (e, i)),
            ("up_bias", self.up_bias, (e, i)),
            ("down_bias", self.down_bias, (e, h)),
        ):
            if tensor is None:
                continue
            if tensor.shape != shape:
                raise ValueError(
                    f"{name} must be {shape} to go with up {(e, i, h)}, got {tuple(tensor.shape)}"
                )
            if tensor.device != device:
                raise ValueError(f"{name} is on {tensor.device}, up on {device}: use one device")
            if tensor.dtype is not self.up.dtype:
                bias = name.endswith("bias")
                if not (bias and tensor.dtype is torch.float32):
                    allowed = "that or float32" if bias else "one dtype"
                    raise ValueError(
                        f"{name} is {tensor.dtype}, up is {self.up.dtype}: use {allowed}"
                    )
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
            gate_up: [E, 2I, H], or [E, H, 2I] if `transposed` (gpt-oss, Llama 4 in transformers).
            down: [E, H, I], or [E, I, H] if `transposed`.
            layout: order of the 2I rows: "gate_up" halves, "up_gate" halves, or "interleaved" with
                gate in the even rows.
            gate_up_bias: [E, 2I] in the same order.
            down_bias: [E, H].
        """
        if layout not in LAYOUTS:
            raise ValueError(f"layout={layout!r} must be one of {LAYOUTS}")
        check_tensors(("gate_up_bias",), gate_up_bias=gate_up_bias)
        both, second = _matrices("gate_up", gate_up, down, transposed)
        _, rows, columns = both.shape
        if (2 * second.shape[1], second.shape[2]) == (columns, rows):
            raise ValueError(
                f"gate_up is {tuple(gate_up.shape)} and down {tuple(down.shape)}: pass "
                f"transposed={not transposed}, which is for "
                f"{'[E, 2I, H] and [E, H, I]' if transposed else '[E, H, 2I] and [E, I, H]'}"
            )
        if rows % 2:
            raise ValueError(
                f"gate_up must hold as many rows of gate as of up, got {rows} rows; is "
                "`transposed` right?"
            )
        if gate_up_bias is not None and gate_up_bias.shape != both.shape[:2]:
            raise ValueError(
                f"gate_up_bias must be {tuple(both.shape[:2])} to go with gate_up, got "
                f"{tuple(gate_up_bias.shape)}"
            )

        def split(t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            if layout == "interleaved":
                return t[:, 0::2], t[:, 1::2]
            half = t.shape[1] // 2
            first, second = t[:, :half], t[:, half:]
            return (first, second) if layout == "gate_up" else (second, first)

        gate, up = split(both)
        gate_bias, up_bias = (None, None) if gate_up_bias is None else split(gate_up_bias)
        return cls(gate, up, second, gate_bias, up_bias, down_bias)

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
        up, down = _matrices("up", up, down, transposed)
        return cls(None, up, down, None, up_bias, down_bias)


def _matrices(
    name: str, first: torch.Tensor, down: torch.Tensor, transposed: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Both as [E, rows, columns]."""
    check_tensors(**{name: first}, down=down)
    if first.dim() != 3 or down.dim() != 3:
        raise ValueError(
            f"{name} and down must have three dimensions, got {tuple(first.shape)} and "
            f"{tuple(down.shape)}"
        )
    return (first.transpose(1, 2), down.transpose(1, 2)) if transposed else (first, down)
