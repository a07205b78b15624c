"""Activations in registers, fp32 in and out."""

import triton
import triton.language as tl

# Square root of 2/pi, and the cubic coefficient of the tanh form of GELU.
_SQRT_2_OVER_PI = tl.constexpr(0.7978845608028654)
_GELU_CUBIC = tl.constexpr(0.044715)
_INV_SQRT_2 = tl.constexpr(0.7071067811865476)


@triton.jit
def _gelu_erf(x):
    return 0.5 * x * (1.0 + tl.math.erf(x * _INV_SQRT_2))


@triton.jit
def _gelu_tanh(x):
    # tanh(z) = 2 sigmoid(2z) - 1: no libdevice call, so it is the same on every backend.
    z = _SQRT_2_OVER_PI * (x + _GELU_CUBIC * x * x * x)
    return x * tl.sigmoid(2.0 * z)


@triton.jit
def _squared_relu(x):
    r = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return r * r


@triton.jit
def activate(
    gate, up, KIND: tl.constexpr, ALPHA: tl.constexpr, BETA: tl.constexpr, LIMIT: tl.constexpr
):
    """`act(gate) * (up + BETA)`, or `act(up)` for the kinds without a gate. NaN stays NaN."""
    if LIMIT is not None:
        if KIND == "silu" or KIND == "gelu" or KIND == "gelu_tanh" or KIND == "relu2":
            up = tl.minimum(up, LIMIT, propagate_nan=tl.PropagateNan.ALL)
        else:
            gate = tl.minimum(gate, LIMIT, propagate_nan=tl.PropagateNan.ALL)
            up = tl.clamp(up, -LIMIT, LIMIT, propagate_nan=tl.PropagateNan.ALL)
    if KIND == "swiglu":
        out = gate * tl.sigmoid(ALPHA * gate) * (up + BETA)
    elif KIND == "geglu":
        out = _gelu_erf(gate) * (up + BETA)
    elif KIND == "geglu_tanh":
        out = _gelu_tanh(gate) * (up + BETA)
    elif KIND == "reglu2":
        out = _squared_relu(gate) * (up + BETA)
    elif KIND == "silu":
        out = up * tl.sigmoid(ALPHA * up)
    elif KIND == "gelu":
        out = _gelu_erf(up)
    elif KIND == "gelu_tanh":
        out = _gelu_tanh(up)
    elif KIND == "relu2":
        out = _squared_relu(up)
    else:
        tl.static_assert(KIND == "none", "unknown activation")
        out = up
    return out
