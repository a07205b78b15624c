"""The account of a call, against sums done by hand and against what the call itself takes."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch

import tilewise
from tilewise import (
    MODELS,
    SWIGLU,
    Activation,
    LayerConfig,
    MoEShape,
    Target,
    explain,
    workspace_size,
)
from tilewise.dispatch.config import KernelConfig, StreamConfig
from tilewise.moe.forward import forward_into
from tilewise.moe.warmup import meta_weights
from tilewise.target import CATALOGUE, CPU

H200 = Target.from_arch("sm_90")
MIXTRAL = MODELS["mixtral-8x7b"]
TINY = MoEShape(num_experts=4, top_k=2, hidden_size=64, intermediate_size=32)
DECODE = LayerConfig("decode", StreamConfig(4, 64), StreamConfig(8, 64))


# ---------------------------------------------------------------- explain


@pytest.mark.parametrize("target", CATALOGUE.values(), ids=lambda t: t.arch)
def test_saves_a_third_of_the_traffic(target: Target) -> None:
    assert explain(MIXTRAL, 512, target=target).saving >= 0.35


def test_saving_of_mixtral_by_hand() -> None:
    e, k, h, i, t = 8, 2, 4096, 14336, 512
    rows = t * k
    ints = e + (e + 4) + 2 * rows  # Sizes, offsets padded from e + 1, gather and scatter.
    plan = 2 * ints * 4  # Written and read.
    ours = (
        2 * t * h  # Read hidden states, write the output.
        + 2 * rows * i  # Write and read activations.
        + 2 * rows * h  # Write and read rows before their sum.
    ) * 2 + plan
    unfused = (
        t * h + rows * h  # Permute.
        + 2 * (rows * h + rows * i)  # Gate, up: read rows, write.
        + 3 * rows * i  # Activation: read both, write.
        + rows * i + rows * h  # Down.
        + rows * h + t * h  # Sum.
    ) * 2 + plan  # fmt: skip
    report = explain(MIXTRAL, 512, target=H200)
    assert report.activation_bytes == ours
    assert report.unfused_activation_bytes == unfused
    assert report.saving == pytest.approx(1 - ours / unfused)


RULED = "closed form, which fitted costs do not beat"


def test_account_of_a_tiny_call_by_hand() -> None:
    report = explain(TINY, 3, target=H200, active_experts=3)
    assert report.weight_bytes == 3 * 3 * 64 * 32 * 2
    assert report.flops == 2 * 3 * (3 * 2) * 64 * 32
    rows, ints = 6, 4 + 8 + 8 + 8  # Parts of 4, 5, 6 and 6, each to the next four.
    assert report.activation_bytes == (2 * 3 * 64 + 2 * rows * 32 + 2 * rows * 64) * 2 + 8 * ints
    # 36864 B of weights and 768 B of tokens at 4800 GB/s: memory bound.
    assert report.floor_us == pytest.approx((36864 + 768) / 4800e9 * 1e6)
    assert (report.target, report.source, report.active_experts) == ("sm_90", RULED, 3)
    assert explain(TINY, 2, target=H200).source == "closed form"


def test_floor_of_a_large_call_is_arithmetic() -> None:
    report = explain(MIXTRAL, 8192, target=H200)
    # Three products of 16384 rows with 4096 x 14336, at 989 TFLOP/s.
    flops = 2 * 3 * 16384 * 4096 * 14336
    assert report.flops == flops
    assert report.floor_us == pytest.approx(flops / 989e12 * 1e6)
    assert report.weight_bytes == pytest.approx(8 * 3 * 4096 * 14336 * 2, rel=1e-6)


def test_floor_of_a_small_call_is_memory() -> None:
    report = explain(MIXTRAL, 1, target=H200)
    weights = 2 * 3 * 4096 * 14336 * 2
    assert report.weight_bytes == weights
    assert report.floor_us == pytest.approx((weights + 2 * 4096 * 2) / 4800e9 * 1e6)


def test_active_experts_under_uniform_routing() -> None:
    assert explain(MIXTRAL, 1, target=H200).active_experts == pytest.approx(2)
    assert explain(MIXTRAL, 2, target=H200).active_experts == pytest.approx(8 * (1 - 0.75**2))
    assert explain(MIXTRAL, 4096, target=H200).active_experts == pytest.approx(8)
    assert explain(MIXTRAL, 9, target=H200, active_experts=5.5).active_experts == 5.5


def test_ungated_layers_have_two_products() -> None:
    report = explain(TINY, 3, target=H200, activation=Activation("relu2"), active_experts=4)
    assert report.weight_bytes == 4 * 2 * 64 * 32 * 2
    assert report.flops == 2 * 2 * 6 * 64 * 32


def test_decode_moves_neither_plan_nor_rows() -> None:
    report = explain(TINY, 2, target=H200)
    assert report.config.path == "decode"
    assert report.activation_bytes == (2 * 2 * 64 + 2 * 4 * 32) * 2
    assert explain(TINY, 2, target=H200, batch_invariant=True).config.path == "grouped"
    assert explain(TINY, 2, target=H200, reduce=False).config.path == "grouped"


def test_a_given_config_is_reported() -> None:
    report = explain(TINY, 33, target=H200, config=DECODE)
    assert report.config == DECODE and report.source == "given"


def test_a_given_config_must_be_one_that_runs() -> None:
    tile = KernelConfig(64, 64, 64, descriptors=True)
    config = LayerConfig("grouped", tile, tile, fused=True)
    assert "one for both products" in str(explain(MIXTRAL, 64, target=H200, config=config))
    for arch in ("gfx942", "sm_80"):
        with pytest.raises(ValueError, match=f"tensor descriptors, which {arch} does not have"):
            explain(MIXTRAL, 64, target=Target.from_arch(arch), config=config)
    with pytest.raises(ValueError, match="do not suit a tensor descriptor"):
        odd = MoEShape(8, 2, 4096, 1537)
        explain(odd, 64, target=H200, config=config)


def test_sharing_is_reported_where_it_happens() -> None:
    """A product with two accumulators takes no part: gate and up by pointers."""
    pointers = KernelConfig(16, 64, 64, split_k=4)
    pair = replace(pointers, descriptors=True)
    for given, shown, activation in (
        (pointers, 1, SWIGLU), (pair, 4, SWIGLU), (pointers, 4, Activation("relu2")),
    ):  # fmt: skip
        config = LayerConfig("grouped", given, given)
        told = explain(TINY, 9, target=H200, config=config, activation=activation).config
        assert told.gate_up == replace(given, split_k=shown) and told.down == given


def test_the_text_says_the_numbers() -> None:
    text = str(explain(MIXTRAL, 512, target=H200))
    assert f"grouped on sm_90 (gate+up: {RULED}; down: fitted costs)" in text
    fused = str(explain(MIXTRAL, 300, target=H200))
    assert "grouped on sm_90 (closed form for both products in one launch)" in fused
    assert "(closed form)" in str(explain(MIXTRAL, 512, target=Target.from_arch("sm_89")))
    assert re.search(r"weights     2818\.6 MB, 8\.0 experts", text)
    assert re.search(r"activations \d+\.\d MB, (3[5-9]|[4-9]\d)% less than unfused", text)
    assert "360.8 GFLOP" in text
    assert re.search(r"floor +\d+\.\d us at nominal rates", text)


@pytest.mark.parametrize("batch_invariant", [False, True])
@pytest.mark.parametrize(
    ("shape", "tokens", "source"),
    [
        # The rule shares reductions there, which batch-invariant calls don't.
        (MoEShape(128, 8, 4096, 192), 4, RULED),
        (MIXTRAL, 4, f"gate+up: {RULED}; down: fitted costs"),
        # Of one bucket, at whose largest count costs are compared with the rule.
        *((MIXTRAL, tokens, RULED) for tokens in (1803, 1900, 1951)),
    ],
)
def test_each_product_has_its_source(
    shape: MoEShape, tokens: int, source: str, batch_invariant: bool
) -> None:
    assert explain(shape, tokens, target=H200, batch_invariant=batch_invariant).source == source


def test_no_kernel_is_told_of_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody has asked for a GPU that is not here."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    report = explain(MIXTRAL, 512)
    assert report.target == "cpu" and str(report) == str(explain(MIXTRAL, 512, target=CPU))
    text = "plain torch on cpu: no kernel runs weights 2818.6 MB, 8.0 experts arithmetic 360.8"
    assert " ".join(str(report).split()) == f"path {text} GFLOP"


NONSENSE: list[tuple[type[Exception], dict[str, Any], str]] = [
    (ValueError, {"num_tokens": -1}, "num_tokens=-1 must be at least [01]"),
    (TypeError, {"num_tokens": 1.5}, "num_tokens=1.5 must be an integer"),
    (TypeError, {"num_tokens": "64"}, "num_tokens='64' must be an integer"),
    (TypeError, {"num_tokens": None}, "num_tokens=None must be an integer"),
    (TypeError, {"shape": "mixtral-8x7b"}, "shape='mixtral-8x7b' must be a tilewise.MoEShape"),
    (TypeError, {"num_tokens": True}, "num_tokens=True must be an integer"),
    (TypeError, {"dtype": "bf16"}, "dtype='bf16' must be torch.bfloat16.*, got a str"),
    (ValueError, {"dtype": torch.int8}, "dtype=torch.int8 must be"),
    (TypeError, {"activation": "silu"}, "activation='silu' must be a tilewise.Activation"),
    (TypeError, {"config": "decode"}, "config='decode' must be a tilewise.LayerConfig"),
    (TypeError, {"reduce": "sum"}, "reduce='sum' must be True or False"),
    (TypeError, {"batch_invariant": "no"}, "batch_invariant='no' must be True or False"),
    (TypeError, {"target": "sm_90"}, r"target='sm_90' must be .*from_arch\('sm_90'\)"),
]


@pytest.mark.parametrize("function", [explain, workspace_size])
@pytest.mark.parametrize(("error", "changes", "message"), NONSENSE, ids=lambda value: str(value))
def test_nonsense_is_refused(
    function: Any, error: type[Exception], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(error, match=message):
        function(**{"shape": MIXTRAL, "num_tokens": 64, "target": H200, **changes})


def test_explain_refuses_an_empty_call() -> None:
    with pytest.raises(ValueError, match="num_tokens=0 must be at least 1"):
        explain(MIXTRAL, 0, target=H200)
    for active in (-1, 9):
        with pytest.raises(ValueError, match=rf"active_experts={active} must be between 0 and .*8"):
            explain(MIXTRAL, 4, target=H200, active_experts=active)
    for other in ("8", True):
        with pytest.raises(TypeError, match=f"active_experts={other!r} must be a number between"):
            explain(MIXTRAL, 4, target=H200, active_experts=other)  # type: ignore[arg-type]


# ---------------------------------------------------------------- workspace_size


@pytest.mark.parametrize("options", [{}, {"reduce": False}, {"batch_invariant": True}], ids=str)
@pytest.mark.parametrize("name", ["mixtral-8x7b", "qwen3-30b-a3b", "llama4-scout"])
def test_workspace_grows_with_the_call(name: str, options: dict[str, Any]) -> None:
    sizes = [workspace_size(MODELS[name], t, target=H200, **options) for t in range(140)]
    assert sizes == sorted(sizes)
    assert sizes[0] == 0 and sizes[1] > 0 and sizes[139] > sizes[10]


def test_workspace_by_hand() -> None:
    # Plan: 4 + 8 + 8 + 8 ints in 112 B; activations: 6 x 32 x 2 B; rows: 6 x 64 x 2 B. All to
    # the next 256 B.
    assert workspace_size(TINY, 3, target=Target.from_arch("sm_89")) == 256 + 512 + 768
    assert workspace_size(TINY, 3, target=H200, dtype=torch.float32) == 256 + 768 + 1536
    assert workspace_size(TINY, 2, target=H200) == 256  # Decode: 4 x 32 x 2 B of activations.
    assert workspace_size(TINY, 2, target=H200, reduce=False) == 256 + 256 + 512
    assert workspace_size(TINY, 0, target=H200) == 0


def needed(
    shape: MoEShape, num_tokens: int, workspace: torch.Tensor, *, dtype: torch.dtype,
    activation: Activation, reduce: bool, batch_invariant: bool,
) -> None:  # fmt: skip
    """The call itself, as far as its look at the workspace."""
    w = meta_weights(shape, dtype, activation)
    slots = () if reduce else (shape.top_k,)

    def empty(*size: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, device="meta")

    forward_into(
        empty(num_tokens, *slots, shape.hidden_size), workspace,
        empty(num_tokens, shape.hidden_size), w.gate, w.up, w.down, None, None, None,
        empty(num_tokens, shape.top_k, dtype=torch.float32),
        empty(num_tokens, shape.top_k, dtype=torch.int32),
        activation, None, False, reduce, batch_invariant, "", H200,
    )  # fmt: skip


@pytest.mark.parametrize("num_tokens", [1, 2, 3, 77, 2048])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"dtype": torch.float32},
        {"reduce": False},
        {"batch_invariant": True},
        {"activation": Activation("relu2")},
    ],
    ids=["plain", "fp32", "unreduced", "batch_invariant", "ungated"],
)
def test_workspace_is_what_the_call_takes(num_tokens: int, options: dict[str, Any]) -> None:
    full = {
        "dtype": torch.bfloat16, "activation": SWIGLU, "reduce": True, "batch_invariant": False,
        **options,
    }  # fmt: skip
    for shape in (MODELS["qwen3-30b-a3b"], MoEShape(7, 2, 37, 19)):
        size = workspace_size(shape, num_tokens, target=H200, **full)
        short = torch.empty(size - 1, dtype=torch.uint8, device="meta")
        message = f"workspace has {size - 1} bytes, this call needs {size}: .*workspace_size"
        with pytest.raises(ValueError, match=message):
            needed(shape, num_tokens, short, **full)


def test_a_given_target_needs_no_machine() -> None:
    wide = replace(H200, shared_memory=64 * 1024)
    config = explain(MIXTRAL, 512, target=wide).config
    assert isinstance(config.down, KernelConfig) and config != explain(MIXTRAL, 512, target=H200)
    # What this machine's own configurations need; shared reductions need more on an H200.
    assert tilewise.workspace_size(MIXTRAL, 512) <= workspace_size(MIXTRAL, 512, target=H200)
