"""The layer of the Hub's package: the same as a module's own code, or refused. Never else."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5.10")

from tests.integrations.test_transformers import (  # noqa: E402
    activation_with_a_hook,
    activation_with_a_pre_hook,
    activation_with_another_forward,
    inputs,
    make_experts,
    own_code,
    post_expert_norm,
    subclassed_activation,
)
from tilewise.integrations import transformers as integration  # noqa: E402

HUB = Path(__file__).resolve().parents[2] / "hub" / "layers.py"
DECORATED = re.compile(r"^@use_experts_implementation.*\n(?:@.*\n)*class (\w+)", re.MULTILINE)


def decorated_classes() -> list[str]:
    """Every experts class of the installed transformers, as folder.Class."""
    models = Path(transformers.__file__).parent / "models"
    return [
        f"{path.parent.name}.{name}"
        for path in sorted(models.glob("*/modeling_*.py"))
        for name in DECORATED.findall(path.read_text())
        if path.stem == f"modeling_{path.parent.name}"
    ]


@pytest.fixture(scope="module")
def forward() -> Any:
    """Of the layer, loaded as a module of the package, which its imports are relative to."""
    integration.register()
    spec = importlib.util.spec_from_file_location("tilewise.layers_of_the_hub", HUB)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module.TilewiseExperts.forward
    del sys.modules[spec.name]


def refused(forward: Any, experts: Any) -> bool:
    """Whether the layer refuses the module; if it does not, outputs must agree."""
    args = inputs()
    # Values that every clamp of these models changes.
    args = (args[0] * 30, *args[1:])
    with torch.no_grad():
        try:
            actual = forward(experts, *args)
        except NotImplementedError:
            return True
        expected = own_code(experts, *args)
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    return False


@pytest.mark.parametrize("name", decorated_classes())
def test_every_class_of_transformers(forward: Any, name: str) -> None:
    try:
        experts = make_experts(name)
    except (AttributeError, KeyError, TypeError) as error:
        pytest.skip(f"needs a config of its own: {error}")
    own_gate = type(experts)._apply_gate is not integration._moe._default_apply_gate
    served = not refused(forward, experts)
    assert not (served and own_gate), "a gate of its own is never taken for SiLU"


def test_most_classes_are_covered(forward: Any) -> None:
    """So that a change of configs cannot turn the test above into nothing."""
    made, served = 0, 0
    names = decorated_classes()
    for name in names:
        try:
            experts = make_experts(name)
        except (AttributeError, KeyError, TypeError):
            continue
        made += 1
        served += not refused(forward, experts)
    assert len(names) >= 30 and made >= 0.8 * len(names) and served >= 0.5 * len(names)


def own_gate(experts: Any) -> None:
    experts._apply_gate = lambda rows: rows[..., :24]


def no_gate(experts: Any) -> None:
    experts.has_gate = False


def bias(experts: Any) -> None:
    experts.down_proj_bias = torch.zeros(6, 40)


@pytest.mark.parametrize(
    "change",
    [
        subclassed_activation, activation_with_another_forward, activation_with_a_hook,
        activation_with_a_pre_hook, own_gate, post_expert_norm, no_gate, bias,
    ],
)  # fmt: skip
def test_changed_modules_are_refused(forward: Any, change: Any) -> None:
    experts = make_experts("qwen3_moe.Qwen3MoeExperts")
    assert not refused(forward, experts)
    change(experts)
    assert refused(forward, experts)


@pytest.mark.parametrize("function", [torch.nn.SiLU(), torch.nn.functional.silu])
def test_what_is_silu(forward: Any, function: Any) -> None:
    experts = make_experts("qwen3_moe.Qwen3MoeExperts")
    del experts.act_fn
    experts.act_fn = function
    assert not refused(forward, experts)
