"""The demo's verdict in bf16, which only a GPU's demo shows, on a model small enough for a CPU."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", minversion="5.10")
pytest.importorskip("typer")

from rich.console import Console

from tilewise.integrations import transformers as integration

# The package's `demo` is the command, which hides the module.
demo = importlib.import_module("tilewise.cli.demo")
TOKENS = 6


@pytest.fixture
def model() -> Iterator[Any]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # As the demo does: for so small a model, threads only wait.
    yield demo.build_model("cpu")
    torch.set_num_threads(threads)


def verdict(model: Any, capsys: pytest.CaptureFixture[str]) -> tuple[bool, str]:
    prompts = torch.randint(model.config.vocab_size, (3, 8))
    exact = demo.run(model, "eager", prompts, TOKENS, None)
    passed = demo._half_precision(Console(width=110), model, exact, prompts, TOKENS)
    return passed, capsys.readouterr().out


def test_half_precision_passes(model: Any, capsys: pytest.CaptureFixture[str]) -> None:
    passed, printed = verdict(model, capsys)
    assert passed, printed
    decided = int(printed.split("After the same text, ")[1].split()[0])
    assert decided >= 3 * TOKENS // 2, "most tokens decide nothing: the check is worth little"


@pytest.mark.parametrize("factor", [0.0, 0.97, 1.1])
def test_half_precision_notices_experts_that_are_off(
    model: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], factor: float
) -> None:
    original = integration.fused_experts
    monkeypatch.setattr(
        integration, "fused_experts", lambda *args, **kwargs: original(*args, **kwargs) * factor
    )
    passed, printed = verdict(model, capsys)
    assert not passed
    assert "more than rounding" in printed or "more than 1.5 times" in printed


def test_comparison_follows_one_routing(model: Any) -> None:
    prompts = torch.randint(model.config.vocab_size, (1, 4))
    first = demo.run(model, "eager", prompts, 2, None)
    assert len(first.routing) == model.config.num_hidden_layers
    shifted = [(w, (ids + 1) % model.config.num_experts) for w, ids in first.routing]
    other = demo.Run(first.text, first.tokens, first.logits, shifted, 0.0)
    again = demo.run(model, "eager", prompts, 2, first)
    elsewhere = demo.run(model, "eager", prompts, 2, other)
    torch.testing.assert_close(again.logits, first.logits)
    assert (elsewhere.logits - first.logits).abs().max() > 0.1
