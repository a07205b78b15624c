"""Tilewise as an experts implementation of Hugging Face transformers, 5.10 and newer.

    tilewise.integrations.transformers.register()
    model = AutoModelForCausalLM.from_pretrained(name, experts_implementation="tilewise")

or, for a model that is already there and for Llama 4, `use_tilewise(model)`. What Tilewise cannot
compute exactly runs the model's own code, with one warning that says why; `status` lists it.
"""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Iterator
from types import FunctionType, MethodType
from typing import Any, TypeVar

import torch
from torch import nn

from ..models import MoEShape
from ..moe.activation import Activation
from ..moe.checks import check_tokens
from ..moe.layer import fused_experts
from ..moe.warmup import warmup
from ..moe.weights import ExpertWeights
from .gates import ACTIVATIONS, GATE_NUMBERS, is_changed, kind_of, recognise

NAME = "tilewise"
DEVICES_TO_WARM = ("cuda",)
Model = TypeVar("Model", bound=nn.Module)

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_LLAMA4 = "transformers.models.llama4.modeling_llama4"

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


def use_tilewise(model: Model, *, warm_tokens: int | None = None) -> Model:
    """Switches a loaded model's experts to Tilewise; returns the model.

    Llama 4's experts cannot be switched by name: their block is given another forward, for good.

    Args:
        warm_tokens: compile, now, what calls of up to this many tokens can need. Without it each
            kernel variant is compiled when a call first needs it.

    Raises:
        TypeError: `model` is a name or another thing that is no module; `warm_tokens` no integer.
        ValueError: The model has no experts; `warm_tokens` is less than 1, or given for experts
            whose config does not say how many a token chooses.
    """
    if not isinstance(model, nn.Module):
        name = f"{model!r}" if isinstance(model, str) else "name"
        raise TypeError(
            f"use_tilewise takes a loaded model, got {model!r}: "
            f"AutoModelForCausalLM.from_pretrained({name}) loads one"
        )
    if warm_tokens is not None:
        check_tokens(warm_tokens, 1, "warm_tokens")  # Before anything is switched.
    blocks = list(experts_layers(model))
    if not blocks or not hasattr(model, "set_experts_implementation"):
        raise ValueError(
            f"no experts of transformers found in {type(model).__name__}: use_tilewise takes a "
            "whole model with MoE layers, as from_pretrained returns it"
        )
    register()
    for _, block in blocks:
        if is_llama4(block):
            _switch_llama4(block)
    model.set_experts_implementation(NAME)  # type: ignore[operator]
    if warm_tokens is not None:
        _warm(model, warm_tokens)
    return model


def _warm(model: nn.Module, max_tokens: int) -> None:
    """Compiles ahead for every layer that Tilewise serves, once for those that are alike."""
    served = {name for name, runs in status(model).items() if runs == "tilewise"}
    done = set()
    for name, layer in experts_layers(model):
        llama4 = is_llama4(layer)
        if (f"{name}.experts".lstrip(".") if llama4 else name) not in served:
            continue
        if llama4:
            weights, top_k = _llama4_weights(layer), layer.top_k
            activation = ACTIVATIONS[kind_of(layer.experts.act_fn)][0]
        else:
            weights, top_k = _weights(layer, _tensors(layer)), _top_k(layer)
            activation = _activation_of(layer)[1]
        if activation is None or weights.device.type not in DEVICES_TO_WARM:
            continue
        biases = weights.gate_bias, weights.up_bias, weights.down_bias
        key = (weights.up.shape, weights.up.stride(), weights.down.stride(), weights.dtype,
               *(b is None for b in biases), weights.device, top_k, activation)  # fmt: skip
        if key in done:
            continue
        done.add(key)
        experts, inter, hidden = weights.up.shape
        # Routers give weights in the model's dtype or in fp32.
        for dtype in {weights.dtype, torch.float32}:
            warmup(
                MoEShape(experts, top_k, hidden, inter),
                max_tokens=max_tokens,
                dtype=weights.dtype,
                activation=activation,
                weights=weights,
                topk_ids_dtype=torch.int64,
                topk_weights_dtype=dtype,
                apply_router_weight_on_input=llama4,
                routing=False,
                device=weights.device,
            )


def _top_k(experts: Any) -> int:
    """Experts per token, which the module's config knows under one of these names."""
    names = ("num_experts_per_tok", "top_k_experts", "moe_topk", "moe_k", "top_k")
    found = (getattr(experts.config, name, None) for name in names)
    top_k = next((k for k in found if isinstance(k, int)), None)
    if top_k is None:
        raise ValueError(
            f"the config of {type(experts).__name__} has none of {', '.join(names)}: "
            "call tilewise.warmup yourself"
        )
    return top_k


def status(model: nn.Module) -> dict[str, str]:
    """Name of each experts module -> "tilewise", or why it runs its own code in inference.

    Weights that accelerate offloads are judged as it will load them.
    """
    register()
    found = {}
    with torch.no_grad():
        for name, layer in experts_layers(model):
            if is_llama4(layer):
                on = layer.forward if "_old_forward" not in vars(layer) else layer._old_forward
                used = getattr(on, "__func__", None) is _llama4_forward
                x = layer.router.weight[:0]
                reason = _unsupported_llama4(layer, x)[0]
                name = f"{name}.experts".lstrip(".")
            else:
                used = getattr(layer.config, "_experts_implementation", None) == NAME
                tensors = _tensors(layer)
                if _is_offloaded(layer):
                    # As they come in a call, for which accelerate loads them.
                    tensors = {k: _loaded(t) for k, t in tensors.items()}
                # A call's inputs come in the dtype of its weights.
                x = torch.empty(0, dtype=getattr(tensors["down"], "dtype", None))
                reason = _unsupported(layer, tensors, x, x)[0]
            found[name] = reason or ("tilewise" if used else "it is not switched on")
    return found


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
    tensors = _tensors(self)
    reason, activation = _unsupported(self, tensors, hidden_states, top_k_weights)
    if activation is None:
        _warn(type(self), reason)
        output: torch.Tensor = _own_forward(self)(self, hidden_states, top_k_index, top_k_weights)
        return output
    weights = _weights(self, tensors)
    return fused_experts(hidden_states, weights, top_k_weights, top_k_index, activation=activation)


def experts_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Experts modules that transformers dispatches, and Llama 4's blocks, with their names."""
    for name, module in model.named_modules():
        dispatched = hasattr(module, "is_concatenated") and hasattr(module, "_apply_gate")
        if dispatched or is_llama4(module):
            yield name, module


def _is_offloaded(module: Any) -> bool:
    """Whether accelerate keeps the module's weights elsewhere and loads them for each call."""
    return bool(getattr(getattr(module, "_hf_hook", None), "offload", False))


def _loaded(tensor: Any) -> Any:
    if not isinstance(tensor, torch.Tensor) or not tensor.is_meta:
        return tensor
    return torch.empty(1, dtype=tensor.dtype).expand(tensor.shape)


def _tensors(experts: Any) -> dict[str, Any]:
    """The weights by their role, None where they are missing."""
    # Read at every call: adapters replace these attributes.
    name = "gate_up" if getattr(experts, "has_gate", True) else "up"
    names = {"up": f"{name}_proj", "down": "down_proj"}
    if getattr(experts, "has_bias", False):
        names |= {f"{name}_bias": f"{name}_proj_bias", "down_bias": "down_proj_bias"}
    return {key: getattr(experts, name, None) for key, name in names.items()}


def _weights(experts: Any, tensors: dict[str, Any]) -> ExpertWeights:
    options = {key: tensor for key, tensor in tensors.items() if key.endswith("bias")}
    options["transposed"] = getattr(experts, "is_transposed", False)
    if not getattr(experts, "has_gate", True):
        return ExpertWeights.from_ungated(tensors["up"], tensors["down"], **options)
    layout = "gate_up" if getattr(experts, "is_concatenated", True) else "interleaved"
    return ExpertWeights.from_gate_up(tensors["up"], tensors["down"], layout=layout, **options)


def _unsupported(
    experts: Any, tensors: dict[str, Any], x: torch.Tensor, top_k_weights: torch.Tensor
) -> tuple[str, Activation | None]:
    """Why Tilewise leaves this call to the model ("" if it doesn't), and the activation."""
    reason, activation = _activation_of(experts)
    if activation is None:
        return reason, None
    if getattr(experts, "has_post_expert_norm", False):
        return "it normalises each expert's output", None
    reason = _unsupported_tensors(tensors, experts.num_experts, x, top_k_weights)
    return reason, None if reason else activation


def _unsupported_tensors(
    tensors: dict[str, Any], num_experts: int, x: torch.Tensor, *others: torch.Tensor
) -> str:
    for name, tensor in tensors.items():
        if type(tensor) not in (torch.Tensor, nn.Parameter):
            return f"its weights are {type(tensor).__name__}"
        if tensor.dtype not in _DTYPES or tensor.dtype != x.dtype:
            return f"its weights are {tensor.dtype} and its inputs {x.dtype}"
        if tensor.device.type not in ("cpu", "cuda"):
            return f"its weights are on {tensor.device.type}"
        dim = 2 if name.endswith("bias") else 3
        if tensor.dim() != dim or tensor.shape[0] != num_experts:
            return f"its weights are {list(tensor.shape)} for {num_experts} experts"
    if torch.is_autocast_enabled(x.device.type):
        return "autocast chooses the dtypes"
    inputs = (x, *others, *tensors.values())
    if torch.is_grad_enabled() and any(t.requires_grad for t in inputs):
        return "gradients are wanted; for inference use torch.no_grad()"
    return ""


def _activation_of(experts: Any) -> tuple[str, Activation | None]:
    """Why the activation is none of ours ("" if it is), and which it is."""
    act_fn = getattr(experts, "act_fn", None)
    kind = kind_of(act_fn)
    if is_changed(act_fn):
        return f"its activation {kind} has hooks or another forward", None
    gated = getattr(experts, "has_gate", True)
    gate = getattr(experts, "_apply_gate", None)
    function = getattr(gate, "__func__", gate)
    concatenated = getattr(experts, "is_concatenated", True)
    if gated and function is not _moe._default_apply_gate:
        activation = None
        of_class = getattr(type(experts), "_apply_gate", None)
        # What was put on the instance may be anything.
        if isinstance(of_class, FunctionType) and "_apply_gate" not in vars(experts):
            values: list[Any] = [getattr(experts, name, None) for name in GATE_NUMBERS]
            numbers = tuple(float(v) if type(v) in (int, float) else None for v in values)
            activation = recognise(of_class, kind, numbers, concatenated)
        return ("" if activation else "it gates with a function of its own"), activation
    if gated and not concatenated:
        return "its gate and up rows are interleaved, its gate takes halves", None
    activation = ACTIVATIONS.get(kind, (None, None))[0 if gated else 1]
    return ("" if activation else f"its activation is {kind}"), activation


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


def is_llama4(module: Any) -> bool:
    return type(module).__module__ == _LLAMA4 and type(module).__qualname__ == "Llama4TextMoe"


def _switch_llama4(block: Any) -> None:
    """Gives a Llama 4 block our forward, below a wrapper that accelerate may have put around it."""
    slot = "_old_forward" if "_old_forward" in vars(block) else "forward"
    current = getattr(getattr(block, slot), "__func__", None)
    if current is not type(block).forward and current is not _llama4_forward:
        _warn(type(block), "its forward has been replaced")
    elif not _llama4_agrees(block.__class__):
        _warn(type(block), "its code is not the one that Tilewise knows")
    else:
        setattr(block, slot, MethodType(_llama4_forward, block))


def _llama4_forward(self: Any, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Llama 4's block: routed experts, their inputs scaled by the router, and a shared expert.

    The block's own code runs every expert on every token, scaled by 0 unless chosen.
    """
    x = hidden_states.reshape(-1, self.hidden_dim)
    reason, activation = _unsupported_llama4(self, x)
    if activation is None:
        _warn(type(self), reason)
        output: tuple[torch.Tensor, torch.Tensor] = type(self).forward(self, hidden_states)
        return output
    router_scores, router_logits = self.router(x)
    topk_weights, topk_ids = router_scores.topk(self.top_k, dim=1)
    weights = _llama4_weights(self)
    routed = fused_experts(
        x, weights, topk_weights, topk_ids, activation=activation, apply_router_weight_on_input=True
    )
    return self.shared_expert(x) + routed, router_logits


def _llama4_weights(block: Any) -> ExpertWeights:
    experts = block.experts
    return ExpertWeights.from_gate_up(experts.gate_up_proj, experts.down_proj, transposed=True)


def _unsupported_llama4(block: Any, x: torch.Tensor) -> tuple[str, Activation | None]:
    experts, router = block.experts, block.router
    for module, name in ((experts, "Llama4TextExperts"), (router, "Llama4Router")):
        if type(module).__module__ != _LLAMA4 or type(module).__qualname__ != name:
            return f"its {name} is a {type(module).__name__}", None
    if experts._forward_hooks or experts._forward_pre_hooks:
        return "its experts have hooks, which would not run", None
    kind = kind_of(experts.act_fn)
    if is_changed(experts.act_fn):
        return f"its activation {kind} has hooks or another forward", None
    activation = ACTIVATIONS.get(kind, (None, None))[0]
    if activation is None:
        return f"its activation is {kind}", None
    tensors = {"up": experts.gate_up_proj, "down": experts.down_proj}
    reason = _unsupported_tensors(tensors, block.num_experts, x, router.weight)
    if not reason and experts.down_proj.shape[1] != experts.intermediate_size:
        reason = "its weights are split between devices"
    return reason, None if reason else activation


@functools.cache
def _llama4_agrees(block_class: Any) -> bool:
    """Whether the installed block computes what `_llama4_forward` does, on a tiny one."""
    host = importlib.import_module("transformers")
    with torch.no_grad(), torch.device("cpu"), torch.random.fork_rng(devices=[]):
        try:
            config = host.Llama4TextConfig(
                hidden_size=16, intermediate_size=8, num_local_experts=4, num_experts_per_tok=2
            )
            block = block_class(config).float()
            for parameter in block.parameters():
                nn.init.normal_(parameter, std=0.5)
            x = torch.randn(2, 5, 16, dtype=torch.float32)
            if _unsupported_llama4(block, x)[0]:
                return False
            pairs = zip(_llama4_forward(block, x), block(x), strict=True)
            return all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in pairs)
        except Exception:
            return False
