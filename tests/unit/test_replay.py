"""Which calls repeat the launches of an earlier one; tests/gpu repeats them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.cases import Case, Inputs, make_inputs
from tilewise.moe import forward

CASE = Case("square", 5, 4, 2, 32, 32, bias=True, layout="split")


def aliased(inputs: Inputs, **same: str) -> Inputs:
    """`inputs` in which some weights are others' tensors."""
    weights = inputs.weights
    return replace(
        inputs, weights=replace(weights, **{a: getattr(weights, b) for a, b in same.items()})
    )


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Calls that were launched instead of repeated; none launches anything."""
    calls: list[Any] = []

    def launch(out: torch.Tensor, workspace: Any, *args: Any, **options: Any) -> torch.Tensor:
        calls.append(args)
        return torch.empty(16, dtype=torch.uint8)

    monkeypatch.setattr(forward, "_launch", launch)
    monkeypatch.setattr(forward, "_REPLAYS", {})
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 0, raising=False)
    return calls


def call(inputs: Inputs, out: torch.Tensor) -> None:
    w = inputs.weights
    forward._repeat_or_record(
        out, None, inputs.hidden_states, w.gate, w.up, w.down, w.gate_bias, w.up_bias, w.down_bias,
        inputs.topk_weights, inputs.topk_ids, CASE.activation, None, False, True, False, "",
    )  # fmt: skip


ALIASES = [
    {}, {"down": "gate"}, {"down": "up"}, {"gate_bias": "up_bias"}, {"gate_bias": "down_bias"},
    {"up_bias": "down_bias"},
]  # fmt: skip


def test_calls_that_differ_in_which_tensors_are_one_share_no_launches(
    launched: list[Any],
) -> None:
    inputs = make_inputs(CASE, torch.float32)
    out = torch.empty_like(inputs.hidden_states)
    for done, same in enumerate(ALIASES):
        call(aliased(inputs, **same), out)
        assert len(launched) == done + 1, same
    call(inputs, inputs.hidden_states)
    assert len(launched) == len(ALIASES) + 1
    for same in ALIASES:  # Known by now: other tensors, one where they were one, are a repeat.
        call(aliased(inputs, **same), out)
        call(aliased(replace(inputs, topk_ids=inputs.topk_ids.clone()), **same), out)
    assert len(launched) == len(ALIASES) + 1
