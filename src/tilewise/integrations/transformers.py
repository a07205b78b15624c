"""Tilewise as an experts implementation of Hugging Face transformers, 5.10 and newer.

    tilewise.integrations.transformers.register()
    model = AutoModelForCausalLM.from_pretrained(name, experts_implementation="tilewise")

or, for a model that is already there, `use_tilewise(model)`.
"""

from __future__ import annotations

import warnings
from types import FunctionType
from typing import Any, TypeVar

import torch
from torch import nn

from ..moe.activation import GEGLU, GEGLU_TANH, GELU, GELU_TANH, RELU2, SILU, SWIGLU, Activation
from ..moe.layer import fused_experts
from ..moe.weights import ExpertWeights

NAME = "tilewise"
Model = TypeVar("Model", bound=nn.Module)

# Class of `act_fn` -> activation with and without a gate. A subclass may compute anything else.
_ACTIVATIONS = {
    "torch.nn.functional.silu": (SWIGLU, SILU),
    "torch.nn.modules.activation.SiLU": (SWIGLU, SILU),
    "transformers.activations.SiLUActivation": (SWIGLU, SILU),
    "transformers.activations.GELUActivation": (GEGLU, GELU),
    "transformers.activations.GELUTanh": (GEGLU_TANH, GELU_TANH),
    "transformers.activations.NewGELUActivation": (GEGLU_TANH, GELU_TANH),
    "transformers.activations.ReLUSquaredActivation": (None, RELU2),
}
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

_warned: set[tuple[type, str]] = set()
# transformers.integrations.moe, from `register` on: torch.compile cannot trace its import.
_moe: Any = None


def register() -> None:
    """Makes the name "tilewise" known to transformers. Calling it again changes nothing."""
    global _moe
    from transformers.integrations import finegrained_fp8, moe

    _moe = moe
    moe.ExpertsInterface.register(NAME, experts_forward)
    # Models in fp8 look in a registry of their own; they are sent on to their own code.
    fp8 = getattr(finegrained_fp8, "FP8ExpertsInterface", None)
    if fp8 is not None:
        fp8.register(NAME, experts_forward)


def use_tilewise(model: Model) -> Model:
    """Switches a loaded model's experts to Tilewise; returns the model."""
    register()
    model.set_experts_implementation(NAME)  # type: ignore[operator]
    return model


def experts_forward(
    self: Any,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    """The experts of one layer, for transformers to call with one of its experts modules.

    What Tilewise cannot compute exactly runs the model's own code, warning once a class and reason.

    Args:
        self: a module whose class is decorated with `use_experts_implementation`.
        hidden_states: [num_tokens, hidden_size].
        top_k_index: int64 [num_tokens, top_k]; ids >= num_experts belong to another device.
        top_k_weights: [num_tokens, top_k].

    Returns:
        [num_tokens, hidden_size], dtype of `hidden_states`.
    """
    # Read at every call: adapters replace these attributes.
    gated = getattr(self, "has_gate", True)
    name = "gate_up" if gated else "up"
    names = {"up": f"{name}_proj", "down": "down_proj"}
    if getattr(self, "has_bias", False):
        names |= {f"{name}_bias": f"{name}_proj_bias", "down_bias": "down_proj_bias"}
    tensors: dict[str, Any] = {key: getattr(self, name, None) for key, name in names.items()}
    reason, activation = _unsupported(self, tensors, hidden_states, top_k_weights)
    if activation is None:
        _warn(type(self), reason)
        output: torch.Tensor = _own_forward(self)(self, hidden_states, top_k_index, top_k_weights)
        return output
    make = ExpertWeights.from_gate_up if gated else ExpertWeights.from_ungated
    transposed = getattr(self, "is_transposed", False)
    weights = make(tensors.pop("up"), tensors.pop("down"), transposed=transposed, **tensors)
    return fused_experts(hidden_states, weights, top_k_weights, top_k_index, activation=activation)


def _unsupported(
    experts: Any, tensors: dict[str, Any], x: torch.Tensor, top_k_weights: torch.Tensor
) -> tuple[str, Activation | None]:
    """Why Tilewise leaves this call to the model ("" if it doesn't), and the activation."""
    gated = getattr(experts, "has_gate", True)
    gate = getattr(experts, "_apply_gate", None)
    if gated and getattr(gate, "__func__", gate) is not _moe._default_apply_gate:
        return "it gates with a function of its own", None
    if gated and not getattr(experts, "is_concatenated", True):
        return "its gate and up rows are interleaved", None
    act_fn = getattr(experts, "act_fn", None)
    named = act_fn if isinstance(act_fn, FunctionType) else type(act_fn)
    kind = f"{named.__module__}.{named.__qualname__}"
    activation = _ACTIVATIONS.get(kind, (None, None))[0 if gated else 1]
    if activation is None:
        return f"its activation is {kind}", None
    if getattr(experts, "has_post_expert_norm", False):
        return "it normalises each expert's output", None
    for name, tensor in tensors.items():
        if type(tensor) not in (torch.Tensor, nn.Parameter):
            return f"its weights are {type(tensor).__name__}", None
        if tensor.dtype not in _DTYPES or tensor.dtype != x.dtype:
            return f"its weights are {tensor.dtype} and its inputs {x.dtype}", None
        if tensor.device.type not in ("cpu", "cuda"):
            return f"its weights are on {tensor.device.type}", None
        dim = 2 if name.endswith("bias") else 3
        if tensor.dim() != dim or tensor.shape[0] != experts.num_experts:
            return f"its weights are {list(tensor.shape)} for {experts.num_experts} experts", None
    if torch.is_autocast_enabled(x.device.type):
        return "autocast chooses the dtypes", None
    inputs = (x, top_k_weights, *tensors.values())
    if torch.is_grad_enabled() and any(t.requires_grad for t in inputs):
        return "gradients are wanted; for inference use torch.no_grad()", None
    return "", activation


def _own_forward(experts: Any) -> Any:
    """The forward that the class was written with, below transformers' dispatching one."""
    forward = type(experts).forward
    while getattr(forward, "__globals__", None) is _moe.__dict__:
        forward = forward.__wrapped__
    return forward


def _warn(experts_class: type, reason: str) -> None:
    if (experts_class, reason) not in _warned:
        _warned.add((experts_class, reason))
        message = f"{experts_class.__name__} runs its own code instead of Tilewise: {reason}"
        warnings.warn(message, RuntimeWarning, stacklevel=4)
