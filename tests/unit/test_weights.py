"""Weight layouts: which element of a stored tensor is which, and that nothing is copied."""

from __future__ import annotations

import pytest
import torch

from tilewise import ExpertWeights

E, H, I = 3, 5, 4  # noqa: E741


def gate_row(layout: str, i: int) -> int:
    return {"gate_up": i, "up_gate": I + i, "interleaved": 2 * i}[layout]


def up_row(layout: str, i: int) -> int:
    return {"gate_up": I + i, "up_gate": i, "interleaved": 2 * i + 1}[layout]


def numbered(*shape: int) -> torch.Tensor:
    """Every element another number."""
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float32).view(shape)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("layout", ["gate_up", "up_gate", "interleaved"])
def test_from_gate_up(layout: str, transposed: bool) -> None:
    gate_up = numbered(E, H, 2 * I) if transposed else numbered(E, 2 * I, H)
    down = numbered(E, I, H) if transposed else numbered(E, H, I)
    bias, down_bias = numbered(E, 2 * I), numbered(E, H)
    w = ExpertWeights.from_gate_up(
        gate_up, down, layout=layout, transposed=transposed, gate_up_bias=bias, down_bias=down_bias
    )
    assert w.gate is not None and w.gate_bias is not None and w.up_bias is not None
    assert (w.num_local_experts, w.intermediate_size, w.hidden_size) == (E, I, H)
    for e in range(E):
        for i in range(I):
            g, u = gate_row(layout, i), up_row(layout, i)
            assert w.gate_bias[e, i] == bias[e, g]
            assert w.up_bias[e, i] == bias[e, u]
            for h in range(H):
                stored = gate_up[e, h] if transposed else gate_up[e, :, h]
                assert w.gate[e, i, h] == stored[g]
                assert w.up[e, i, h] == stored[u]
                assert w.down[e, h, i] == (down[e, i, h] if transposed else down[e, h, i])
    assert w.down_bias is down_bias


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("layout", ["gate_up", "up_gate", "interleaved"])
def test_views_not_copies(layout: str, transposed: bool) -> None:
    gate_up = numbered(E, H, 2 * I) if transposed else numbered(E, 2 * I, H)
    down = numbered(E, I, H) if transposed else numbered(E, H, I)
    bias = numbered(E, 2 * I)
    w = ExpertWeights.from_gate_up(
        gate_up, down, layout=layout, transposed=transposed, gate_up_bias=bias
    )
    gate_up.zero_(), down.zero_(), bias.zero_()
    for view in (w.gate, w.up, w.down, w.gate_bias, w.up_bias):
        assert view is not None and not view.any()


@pytest.mark.parametrize("transposed", [False, True])
def test_from_ungated(transposed: bool) -> None:
    up, down = numbered(E, I, H), numbered(E, H, I)
    up_bias, down_bias = numbered(E, I), numbered(E, H)
    w = ExpertWeights.from_ungated(
        up.transpose(1, 2).contiguous() if transposed else up,
        down.transpose(1, 2).contiguous() if transposed else down,
        transposed=transposed, up_bias=up_bias, down_bias=down_bias,
    )  # fmt: skip
    assert w.gate is None and w.gate_bias is None and not w.is_gated
    assert torch.equal(w.up, up) and torch.equal(w.down, down)
    assert w.up_bias is up_bias and w.down_bias is down_bias


def test_properties() -> None:
    up = torch.zeros(E, I, H, dtype=torch.bfloat16)
    w = ExpertWeights(up.clone(), up, torch.zeros(E, H, I, dtype=torch.bfloat16))
    assert w.is_gated and w.dtype is torch.bfloat16 and w.device == torch.device("cpu")


def test_biases_may_be_fp32_beside_any_weights() -> None:
    w = ExpertWeights.from_gate_up(
        torch.zeros(E, 2 * I, H, dtype=torch.bfloat16), torch.zeros(E, H, I, dtype=torch.bfloat16),
        gate_up_bias=torch.zeros(E, 2 * I), down_bias=torch.zeros(E, H, dtype=torch.bfloat16),
    )  # fmt: skip
    assert w.gate_bias is not None and w.gate_bias.dtype is torch.float32


def fields(**changes: torch.Tensor | None) -> dict[str, torch.Tensor | None]:
    tensors: dict[str, torch.Tensor | None] = {
        "gate": torch.zeros(E, I, H), "up": torch.zeros(E, I, H), "down": torch.zeros(E, H, I),
    }  # fmt: skip
    return {**tensors, **changes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"up": torch.zeros(I, H)}, r"up must be \[num_experts, .*\], got \(4, 5\)"),
        ({"up": torch.zeros(0, I, H)}, r"up is \(0, 4, 5\): every size must be at least 1"),
        ({"up": torch.zeros(E, I, 0)}, r"every size must be at least 1"),
        ({"gate": torch.zeros(E, I + 1, H)}, r"gate must be \(3, 4, 5\) .*got \(3, 5, 5\)"),
        ({"down": torch.zeros(E, I, H)}, r"down must be \(3, 5, 4\) .*got \(3, 4, 5\)"),
        ({"down": torch.zeros(E + 1, H, I)}, r"down must be \(3, 5, 4\)"),
        ({"down_bias": torch.zeros(E, I)}, r"down_bias must be \(3, 5\) .*got \(3, 4\)"),
        ({"up_bias": torch.zeros(E, H)}, r"up_bias must be \(3, 4\) .*got \(3, 5\)"),
        ({"down": torch.zeros(E, H, I).half()},
         r"down is torch\.float16, up is torch\.float32: use one dtype"),
        ({"down_bias": torch.zeros(E, H).half()},
         r"down_bias is torch\.float16, up is torch\.float32: use .* float32"),
        ({"gate": torch.zeros(E, I, H, device="meta")}, r"gate is on meta, up on cpu"),
        ({"gate_bias": torch.zeros(E, I)}, r"gate_bias and up_bias come together"),
        ({"up_bias": torch.zeros(E, I)}, r"gate_bias and up_bias come together"),
        ({"gate": None, "gate_bias": torch.zeros(E, I)}, r"gate_bias is given without gate"),
    ],
)  # fmt: skip
def test_refuses(changes: dict[str, torch.Tensor | None], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ExpertWeights(**fields(**changes))  # type: ignore[arg-type]


def test_from_gate_up_refuses() -> None:
    gate_up, down = torch.zeros(E, 2 * I, H), torch.zeros(E, H, I)
    with pytest.raises(ValueError, match=r"layout='gate' must be one of .*'interleaved'"):
        ExpertWeights.from_gate_up(gate_up, down, layout="gate")
    with pytest.raises(ValueError, match=r"as many rows of gate as of up, got 5.*`transposed`"):
        ExpertWeights.from_gate_up(gate_up.transpose(1, 2), down)
    with pytest.raises(ValueError, match=r"down must be \(3, 5, 4\)"):
        ExpertWeights.from_gate_up(gate_up, down.transpose(1, 2))
    with pytest.raises(ValueError, match=r"three dimensions, got \(8, 5\) and \(3, 5, 4\)"):
        ExpertWeights.from_gate_up(gate_up[0], down)
    with pytest.raises(ValueError, match=r"gate_up_bias must be \(3, 8\) .*got \(3, 4\)"):
        ExpertWeights.from_gate_up(gate_up, down, gate_up_bias=torch.zeros(E, I))
    with pytest.raises(ValueError, match=r"up and down must have three dimensions"):
        ExpertWeights.from_ungated(torch.zeros(I, H), down)


def test_a_forgotten_transposed_is_named() -> None:
    gate_up, down = torch.zeros(E, H, 2 * I), torch.zeros(E, I, H)
    with pytest.raises(ValueError, match=r"gate_up is \(3, 5, 8\).*: pass transposed=True,.*2I\]"):
        ExpertWeights.from_gate_up(gate_up, down)
    even = torch.zeros(E, 2 * H, 2 * I), torch.zeros(E, I, 2 * H)  # As many rows as could be.
    with pytest.raises(ValueError, match="pass transposed=True"):
        ExpertWeights.from_gate_up(*even, gate_up_bias=torch.zeros(E, 2 * I))
    with pytest.raises(ValueError, match=r"\(3, 8, 5\) .*: pass transposed=False, .*\[E, H, I\]"):
        ExpertWeights.from_gate_up(gate_up.mT, down.mT, transposed=True)
    with pytest.raises(ValueError) as refused:  # Transposed alone it would not fit either.
        ExpertWeights.from_gate_up(even[0], torch.zeros(E, I, H))
    assert "pass transposed" not in str(refused.value)
