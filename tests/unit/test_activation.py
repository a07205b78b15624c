"""Activations against their formulas in Python floats."""

from __future__ import annotations

import math

import pytest
import torch

from tilewise.moe import activation as module
from tilewise.moe.activation import GATED_KINDS, KINDS, SWIGLU_OAI, UNGATED_KINDS, Activation

VALUES = (-9.0, -2.5, -1.0, -0.3, 0.0, 0.3, 1.0, 2.5, 9.0)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def erf_gelu(x: float) -> float:
    return x * 0.5 * (1 + math.erf(x / math.sqrt(2)))


def tanh_gelu(x: float) -> float:
    return 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


UNARY = {
    "swiglu": lambda x: x * sigmoid(x),
    "geglu": erf_gelu,
    "geglu_tanh": tanh_gelu,
    "reglu2": lambda x: max(x, 0.0) ** 2,
    "silu": lambda x: x * sigmoid(x),
    "gelu": erf_gelu,
    "gelu_tanh": tanh_gelu,
    "relu2": lambda x: max(x, 0.0) ** 2,
}


def grid() -> tuple[torch.Tensor, torch.Tensor]:
    pairs = torch.cartesian_prod(torch.tensor(VALUES), torch.tensor(VALUES))
    return pairs[:, 0], pairs[:, 1]


def test_every_kind_has_a_formula_here() -> None:
    assert set(UNARY) == set(KINDS)
    assert set(GATED_KINDS).isdisjoint(UNGATED_KINDS)


@pytest.mark.parametrize("kind", GATED_KINDS)
def test_gated_kinds(kind: str) -> None:
    gate, up = grid()
    expected = [UNARY[kind](g) * u for g, u in zip(gate.tolist(), up.tolist(), strict=True)]
    actual = Activation(kind).apply(gate, up)
    torch.testing.assert_close(actual, torch.tensor(expected), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("kind", UNGATED_KINDS)
def test_ungated_kinds(kind: str) -> None:
    up = torch.tensor(VALUES)
    expected = torch.tensor([UNARY[kind](u) for u in VALUES])
    torch.testing.assert_close(Activation(kind).apply(None, up), expected, rtol=2e-6, atol=2e-6)


def test_the_two_gelus_differ() -> None:
    x = torch.tensor([2.0])
    by_erf = Activation("gelu").apply(None, x).item()
    by_tanh = Activation("gelu_tanh").apply(None, x).item()
    assert by_erf == pytest.approx(1.9544997, abs=2e-6)
    assert by_tanh == pytest.approx(1.9545977, abs=2e-6)


def test_alpha_beta_and_limit() -> None:
    gate, up = grid()
    activation = Activation("swiglu", alpha=1.5, beta=0.25, limit=2.0)

    def formula(g: float, u: float) -> float:
        g, u = min(g, 2.0), min(max(u, -2.0), 2.0)
        return g * sigmoid(1.5 * g) * (u + 0.25)

    expected = [formula(g, u) for g, u in zip(gate.tolist(), up.tolist(), strict=True)]
    torch.testing.assert_close(
        activation.apply(gate, up), torch.tensor(expected), rtol=2e-6, atol=2e-6
    )


def test_limit_leaves_the_gate_free_below() -> None:
    activation = Activation("swiglu", limit=1.0)
    low = activation.apply(torch.tensor([-4.0]), torch.tensor([1.0])).item()
    assert low == pytest.approx(-4.0 * sigmoid(-4.0), rel=1e-6)
    high = activation.apply(torch.tensor([4.0]), torch.tensor([1.0])).item()
    assert high == pytest.approx(sigmoid(1.0), rel=1e-6)
    down = activation.apply(torch.tensor([1.0]), torch.tensor([-4.0])).item()
    assert down == pytest.approx(-sigmoid(1.0), rel=1e-6)


def test_limit_of_ungated_kinds_is_from_above_only() -> None:
    actual = Activation("silu", alpha=2.0, limit=1.0).apply(None, torch.tensor([-3.0, 0.5, 3.0]))
    expected = [-3.0 * sigmoid(-6.0), 0.5 * sigmoid(1.0), sigmoid(2.0)]
    torch.testing.assert_close(actual, torch.tensor(expected), rtol=2e-6, atol=1e-6)


def test_gpt_oss_by_hand() -> None:
    # Both sides clamped: 7 * sigmoid(1.702 * 7) * (7 + 1) and 7 * sigmoid(1.702 * 7) * (-7 + 1).
    actual = SWIGLU_OAI.apply(torch.tensor([8.0, 100.0, 1.0]), torch.tensor([50.0, -9.0, 0.0]))
    slope = 7 * sigmoid(1.702 * 7)
    expected = [slope * 8, slope * -6, sigmoid(1.702)]
    torch.testing.assert_close(actual, torch.tensor(expected), rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_computes_in_fp32(dtype: torch.dtype) -> None:
    gate, up = torch.randn(64).to(dtype), torch.randn(64).to(dtype)
    actual = Activation("swiglu", limit=3.0).apply(gate, up)
    assert actual.dtype is torch.float32
    assert torch.equal(actual, Activation("swiglu", limit=3.0).apply(gate.float(), up.float()))


def test_leaves_its_inputs_alone() -> None:
    gate, up = torch.full((3,), 9.0), torch.full((3,), -9.0)
    SWIGLU_OAI.apply(gate, up)
    assert gate.eq(9.0).all() and up.eq(-9.0).all()


def test_constants_are_what_they_say() -> None:
    for name, kind in {
        "SWIGLU": "swiglu", "GEGLU": "geglu", "GEGLU_TANH": "geglu_tanh", "REGLU2": "reglu2",
        "SILU": "silu", "GELU": "gelu", "GELU_TANH": "gelu_tanh", "RELU2": "relu2",
    }.items():  # fmt: skip
        assert getattr(module, name) == Activation(kind)
    assert Activation("swiglu", 1.702, 1.0, 7.0) == SWIGLU_OAI


@pytest.mark.parametrize("kind", KINDS)
def test_is_gated(kind: str) -> None:
    assert Activation(kind).is_gated is (kind in GATED_KINDS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "tanh"}, r"'tanh' is not supported; allowed: swiglu, .*relu2.*Apply another"),
        ({"kind": "geglu", "alpha": 1.702}, r"alpha=1\.702 .*'geglu' takes alpha=1\.0 only"),
        ({"kind": "relu2", "alpha": 2.0}, r"'relu2' takes alpha=1\.0 only"),
        ({"kind": "silu", "beta": 1.0}, r"beta=1\.0 .*'silu' has no gate: use 0\.0"),
        ({"kind": "swiglu", "limit": 0.0}, r"limit=0\.0 must be positive and finite, or None"),
        ({"kind": "swiglu", "limit": -7.0}, r"limit=-7\.0 must be positive"),
        ({"kind": "swiglu", "limit": math.inf}, r"limit=inf must be positive and finite"),
        ({"kind": "swiglu", "limit": math.nan}, r"limit=nan must be positive and finite"),
        ({"kind": "swiglu", "alpha": math.nan}, r"alpha=nan .*must be finite"),
        ({"kind": "swiglu", "beta": math.inf}, r"beta=inf must be finite"),
    ],
)
def test_refuses(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Activation(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("changes", [{"alpha": None}, {"beta": "1"}, {"limit": [7.0]}], ids=str)
def test_refuses_what_is_no_number(changes: dict[str, object]) -> None:
    with pytest.raises(TypeError, match=r"must be numbers; limit may be None"):
        Activation("swiglu", **changes)  # type: ignore[arg-type]


def test_refuses_the_wrong_number_of_inputs() -> None:
    with pytest.raises(ValueError, match="'swiglu' got no gate"):
        Activation("swiglu").apply(None, torch.ones(2))
    with pytest.raises(ValueError, match="'silu' got a gate"):
        Activation("silu").apply(torch.ones(2), torch.ones(2))
