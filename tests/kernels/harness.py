"""Calling the kernels' launchers on whatever runs them here: a GPU, or Triton's interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.cases import Case, Inputs
from tilewise.models import MoEShape
from tilewise.moe.explain import workspace_size
from tilewise.moe.forward import forward_into
from tilewise.moe.launch import INTERPRETED
from tilewise.moe.schedule import LayerConfig
from tilewise.target import Target

DEVICE = "cpu" if INTERPRETED else "cuda"
if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("needs a GPU, or TRITON_INTERPRET=1", allow_module_level=True)


def run_layer(
    case: Case,
    inputs: Inputs,
    config: LayerConfig | None,
    *,
    batch_invariant: bool = False,
    workspace: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    size_only: bool = False,
    target: Target | None = None,
) -> Any:
    """The layer's Triton path on `inputs`, past the operators: the interpreter runs it on a CPU."""
    w, x = inputs.weights, inputs.hidden_states
    if size_only:
        shape = MoEShape(w.num_local_experts, case.top_k, w.hidden_size, w.intermediate_size)
        return workspace_size(shape, case.num_tokens, dtype=x.dtype, activation=case.activation)
    slots = () if case.reduce else (case.top_k,)
    if out is None:
        out = torch.empty((case.num_tokens, *slots, case.hidden_size), dtype=x.dtype, device=DEVICE)
    forward_into(
        out, workspace, x, w.gate, w.up, w.down, w.gate_bias, w.up_bias, w.down_bias,
        inputs.topk_weights, inputs.topk_ids, case.activation, inputs.expert_map,
        case.apply_router_weight_on_input, case.reduce, batch_invariant,
        "" if config is None else config.to_json(), target,
    )  # fmt: skip
    return out
