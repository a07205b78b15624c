"""SGLang: what the plug-in relies on in its releases, and the plug-in in a fake SGLang."""

from __future__ import annotations

import importlib.util
import json
import logging
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass, make_dataclass, replace
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

import tilewise
from tilewise.integrations import host as host_parts
from tilewise.integrations import sglang as plugin
from tilewise.moe import reference as specification
from tilewise.moe.activation import GEGLU, GEGLU_TANH, GELU, RELU2, SILU, SWIGLU, Activation

# Names only, read from the sources in the wheels of these releases.
CONTRACTS = json.loads(Path(__file__).with_name("sglang_contract.json").read_text())
MOE = "sglang.srt.layers.moe"
CONFIG = f"{MOE}.moe_runner.base:MoeRunnerConfig"
QUANT = f"{MOE}.moe_runner.triton:TritonMoeQuantInfo"
# Not at the position of a package that the tests themselves put there.
INSTALLED = importlib.util.find_spec("sglang") is not None


@pytest.mark.parametrize("version", CONTRACTS)
class TestReleases:
    def test_functions(self, version: str) -> None:
        found = {k: tuple(v) for k, v in CONTRACTS[version]["functions"].items()}
        assert found == plugin.FUNCTIONS

    def test_members(self, version: str) -> None:
        for name, wanted in plugin.MEMBERS.items():
            assert set(wanted) <= set(CONTRACTS[version]["members"][name]), name

    def test_every_option_is_known_or_refused(self, version: str) -> None:
        """A field that a release adds fails here, so that someone decides what it means."""
        refused = {"use_tp_all_gather_activation", "silu_mul_keep_fp32"}
        assert set(CONTRACTS[version]["members"][CONFIG]) - plugin.CONFIG_OPTIONS <= refused
        others = set(CONTRACTS[version]["members"][QUANT]) - plugin.WEIGHT_OPTIONS
        assert all(name.startswith(("use_", "per_channel", "block_")) or name.endswith(
            ("_scale", "_zp")) for name in others)  # fmt: skip


@pytest.mark.skipif(not INSTALLED, reason="SGLang is not installed here")
def test_installed_sglang() -> None:
    assert plugin.mismatch() is None


def test_named_releases() -> None:
    assert {"0.5.11", "0.5.23"} <= set(CONTRACTS)


def test_entry_point() -> None:
    pyproject = Path(__file__).resolve().parents[2] / "pyproject.toml"
    wanted = 'tilewise = "tilewise.integrations.sglang:register"'
    assert f'[project.entry-points."sglang.srt.plugins"]\n{wanted}\n' in pyproject.read_text()
    for point in entry_points(group="sglang.srt.plugins"):
        if point.name == "tilewise":
            assert point.load() is plugin.register


# An SGLang with the names and signatures of the contract, and next to nothing behind them.


@dataclass
class Config:
    num_experts: int | None = None
    num_local_experts: int | None = None
    activation: str = "silu"
    is_gated: bool = True
    apply_router_weight_on_input: bool = False
    inplace: bool = True
    no_combine: bool = False
    no_combine_keep_router_weight: bool = False
    routed_scaling_factor: float | None = None
    gemm1_alpha: float | None = None
    gemm1_beta: float | None = None
    gemm1_clamp_limit: float | None = None
    swiglu_limit: float | None = None
    gate_up_interleaved: bool = True
    silu_mul_keep_fp32: bool = False


@dataclass
class Quant:
    w13_weight: torch.Tensor
    w2_weight: torch.Tensor
    b13: torch.Tensor | None = None
    b2: torch.Tensor | None = None
    use_fp8_w8a8: bool = False
    w13_scale: torch.Tensor | None = None
    block_shape: list[int] | None = None
    fuse_swiglu_interleaved: bool = False


class TopK(NamedTuple):
    topk_weights: torch.Tensor
    topk_ids: torch.Tensor
    router_logits: torch.Tensor | None = None


class Bypassed(NamedTuple):
    router_logits: torch.Tensor


class Dispatch(NamedTuple):
    hidden_states: torch.Tensor
    hidden_states_scale: torch.Tensor | None
    topk_output: Any
    hidden_states_pre_quant: Any = None


class Combine(NamedTuple):
    hidden_states: torch.Tensor


class Host:
    """The fake package: its pool, what it was asked to run itself, and its switches."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, log: pytest.LogCaptureFixture) -> None:
        self.log, self.own_calls = log, 0
        self.invariant = self.symmetric = False
        host = self

        class FusedOpPool:
            _fused_funcs: dict[Any, Any] = {}  # noqa: RUF012

            @classmethod
            def get_fused_func(cls, dispatch_name: str, runner_name: str) -> Any:
                return cls._fused_funcs.get((dispatch_name, runner_name))

        def fused_experts_none_to_triton(
            dispatch_output: Any, quant_info: Any, runner_config: Any
        ) -> Any:
            host.own_calls += 1
            return Combine(dispatch_output.hidden_states)

        FusedOpPool._fused_funcs["none", "triton"] = fused_experts_none_to_triton
        self.pool, self.original = FusedOpPool, fused_experts_none_to_triton
        self.modules: dict[str, Any] = {}
        nccl = "sglang.srt.distributed.device_communicators.pynccl_allocator"
        for name, members in {
            f"{MOE}.moe_runner.base": {"FusedOpPool": FusedOpPool, "MoeRunnerConfig": Config},
            f"{MOE}.moe_runner.triton": {
                "TritonMoeQuantInfo": Quant,
                "fused_experts_none_to_triton": fused_experts_none_to_triton,
            },
            f"{MOE}.token_dispatcher.standard": {
                "StandardDispatchOutput": Dispatch,
                "StandardCombineInput": Combine,
            },
            f"{MOE}.topk": {"StandardTopKOutput": TopK},
            "sglang.srt.batch_invariant_ops": {
                "is_batch_invariant_mode_enabled": lambda: host.invariant
            },
            nccl: {"is_symmetric_memory_enabled": lambda: host.symmetric},
        }.items():
            parts = name.split(".")
            for end in range(1, len(parts) + 1):
                path = ".".join(parts[:end])
                module = self.modules.setdefault(path, types.ModuleType(path))
                module.__path__ = []
                monkeypatch.setitem(sys.modules, path, module)
            vars(self.modules[name]).update(members)

    @property
    def function(self) -> Any:
        return self.pool.get_fused_func("none", "triton")


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Iterator[Host]:
    monkeypatch.delenv(plugin.SWITCH, raising=False)
    monkeypatch.setattr(plugin, "_prepare", host_parts.Preparation())
    monkeypatch.setattr(plugin, "_say_once", host_parts.Once(plugin.log.info))
    with caplog.at_level(logging.INFO, logger="sglang.tilewise"):
        yield Host(monkeypatch, caplog)


class TestRegister:
    def test_twice_is_once(self, host: Host) -> None:
        plugin.register()
        first = host.function
        assert first is not host.original
        plugin.register()
        assert host.function is first
        assert host.log.text.count("tilewise: on for") == 1

    def test_switch(self, host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(plugin.SWITCH, "0")
        plugin.register()
        assert host.function is host.original
        assert "off, TILEWISE_SGLANG=0" in host.log.text

    @pytest.mark.skipif(INSTALLED, reason="SGLang is installed here")
    def test_without_sglang(self, caplog: pytest.LogCaptureFixture) -> None:
        plugin.register()
        assert "not used, ModuleNotFoundError" in caplog.text

    @pytest.mark.parametrize("module", ["moe_runner.triton", "moe_runner.base"])
    def test_a_failing_import_is_harmless(
        self, host: Host, monkeypatch: pytest.MonkeyPatch, module: str
    ) -> None:
        """In a process of SGLang that cannot import its layers, the launcher for one."""
        monkeypatch.setitem(sys.modules, f"{MOE}.{module}", None)
        plugin.register()
        assert host.function is host.original
        assert "tilewise: not used, " in host.log.text

    def test_other_signature(self, host: Host) -> None:
        module = host.modules[f"{MOE}.moe_runner.triton"]
        module.fused_experts_none_to_triton = lambda dispatch_output, quant_info: None
        plugin.register()
        assert host.function is host.original
        assert "takes dispatch_output, quant_info" in host.log.text

    def test_lost_field(self, host: Host) -> None:
        kept = [(k, Any) for k in Quant.__dataclass_fields__ if k != "b13"]
        module = host.modules[f"{MOE}.moe_runner.triton"]
        module.TritonMoeQuantInfo = make_dataclass("TritonMoeQuantInfo", kept)
        plugin.register()
        assert host.function is host.original
        assert "TritonMoeQuantInfo has no b13" in host.log.text


EXPERTS, HIDDEN, INTER, TOP_K = 5, 48, 24, 2


def draw(seed: int, *size: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, generator=generator).to(torch.bfloat16)


def make(
    gated: bool = True, bias: bool = False, tokens: int = 7, top_k: int = TOP_K
) -> tuple[Dispatch, Quant]:
    rows = 2 * INTER if gated else INTER
    w13 = torch.nn.Parameter(draw(0, EXPERTS, rows, HIDDEN) * 0.2, requires_grad=False)
    w2 = torch.nn.Parameter(draw(1, EXPERTS, HIDDEN, INTER) * 0.2, requires_grad=False)
    biases = (draw(2, EXPERTS, rows), draw(3, EXPERTS, HIDDEN)) if bias else (None, None)
    generator = torch.Generator().manual_seed(4)
    ids = torch.stack(
        [torch.randperm(EXPERTS, generator=generator)[:top_k] for _ in range(tokens)]
    ).to(torch.int32)
    ids[tokens // 2, 0] = -1  # Dropped.
    scales = torch.rand(ids.shape, generator=generator)
    return Dispatch(draw(5, tokens, HIDDEN), None, TopK(scales, ids)), Quant(w13, w2, *biases)


def wanted(
    dispatch: Dispatch,
    quant: Quant,
    activation: Activation,
    layout: str = "gate_up",
    factor: float = 1.0,
    ones: bool = False,
    **options: Any,
) -> torch.Tensor:
    """The specification, with weights put together here and the factor applied last."""
    w13, w2, b13, b2 = quant.w13_weight, quant.w2_weight, quant.b13, quant.b2
    if activation.is_gated:
        weights = tilewise.ExpertWeights.from_gate_up(
            w13, w2, layout=layout, gate_up_bias=b13, down_bias=b2
        )
    else:
        weights = tilewise.ExpertWeights.from_ungated(w13, w2, up_bias=b13, down_bias=b2)
    scales, ids, _ = dispatch.topk_output
    scales = torch.ones_like(scales) if ones else scales
    out = specification.fused_experts(
        dispatch.hidden_states.clone(), weights, scales, ids, activation=activation, **options
    )
    return out.float() * factor


OAI = {"gemm1_alpha": 1.702, "gemm1_clamp_limit": 0.7}
OAI_ACTIVATION = Activation("swiglu", alpha=1.702, beta=1.0, limit=0.7)
CASES = [
    ({}, SWIGLU, "gate_up", False),
    ({}, SWIGLU, "gate_up", True),
    ({"swiglu_limit": 0.5}, Activation("swiglu", limit=0.5), "gate_up", False),
    (OAI, OAI_ACTIVATION, "interleaved", True),
    ({**OAI, "gate_up_interleaved": False, "gemm1_beta": 1.0}, OAI_ACTIVATION, "gate_up", False),
    ({"activation": "gelu"}, GEGLU, "gate_up", False),
    ({"activation": "gelu_tanh"}, GEGLU_TANH, "gate_up", False),
    ({"is_gated": False}, SILU, "gate_up", False),
    ({"activation": "gelu", "is_gated": False}, GELU, "gate_up", True),
    ({"activation": "relu2", "is_gated": False}, RELU2, "gate_up", False),
]


@pytest.mark.parametrize("tokens", [1, 7])
@pytest.mark.parametrize(("options", "activation", "layout", "bias"), CASES)
@pytest.mark.parametrize("inplace", [True, False])
def test_is_the_reference(
    host: Host,
    options: dict[str, Any],
    activation: Activation,
    layout: str,
    bias: bool,
    inplace: bool,
    tokens: int,
) -> None:
    plugin.register()
    dispatch, quant = make(activation.is_gated, bias, tokens)
    expected, before = wanted(dispatch, quant, activation, layout), dispatch.hidden_states.clone()
    out = host.function(dispatch, quant, Config(inplace=inplace, **options))
    assert isinstance(out, Combine) and host.own_calls == 0
    torch.testing.assert_close(out.hidden_states.float(), expected, rtol=3e-2, atol=3e-2)
    assert (out.hidden_states is dispatch.hidden_states) == inplace
    assert inplace or torch.equal(dispatch.hidden_states, before)
    assert host.log.text.count("tilewise: serving") == 1


@pytest.mark.parametrize("inplace", [True, False])
@pytest.mark.parametrize("on_input", [True, False])
def test_scaling_factor(host: Host, on_input: bool, inplace: bool) -> None:
    plugin.register()
    dispatch, quant = make(top_k=1)
    options = {"apply_router_weight_on_input": on_input}
    expected = wanted(dispatch, quant, SWIGLU, factor=2.5, **options)
    config = Config(inplace=inplace, routed_scaling_factor=2.5, **options)
    out = host.function(dispatch, quant, config).hidden_states
    torch.testing.assert_close(out.float(), expected, rtol=3e-2, atol=3e-2)


@pytest.mark.parametrize(("on_input", "keep"), [(False, False), (False, True), (True, False)])
def test_no_combine(host: Host, on_input: bool, keep: bool) -> None:
    """Slots as they are: neither the factor nor, unless asked for, the router's weights."""
    plugin.register()
    dispatch, quant = make()
    options = {"apply_router_weight_on_input": on_input}
    expected = wanted(dispatch, quant, SWIGLU, ones=not (on_input or keep), reduce=False, **options)
    config = Config(
        inplace=False, no_combine=True, no_combine_keep_router_weight=keep,
        routed_scaling_factor=2.5, **options,
    )  # fmt: skip
    out = host.function(dispatch, quant, config).hidden_states
    assert out.shape == (7, TOP_K, HIDDEN)
    assert not out[3, 0].any()
    torch.testing.assert_close(out.float(), expected, rtol=3e-2, atol=3e-2)


def test_rows_that_sglang_interleaved_at_load(host: Host) -> None:
    plugin.register()
    dispatch, quant = make()
    expected = wanted(dispatch, quant, SWIGLU)
    order = torch.arange(2 * INTER).view(2, INTER).T.flatten()
    moved = torch.nn.Parameter(quant.w13_weight[:, order].clone(), requires_grad=False)
    quant = replace(quant, w13_weight=moved, fuse_swiglu_interleaved=True)
    out = host.function(dispatch, quant, Config()).hidden_states
    torch.testing.assert_close(out.float(), expected, rtol=3e-2, atol=3e-2)


def test_strided_hidden_states_in_place(host: Host) -> None:
    plugin.register()
    dispatch, quant = make()
    expected = wanted(dispatch, quant, SWIGLU)
    x = dispatch.hidden_states.T.contiguous().T
    out = host.function(dispatch._replace(hidden_states=x), quant, Config()).hidden_states
    assert out is x
    torch.testing.assert_close(x.float(), expected, rtol=3e-2, atol=3e-2)


def test_no_tokens(host: Host) -> None:
    plugin.register()
    dispatch, quant = make()
    empty = Dispatch(dispatch.hidden_states[:0], None, TopK(*(t[:0] for t in dispatch[2][:2])))
    assert host.function(empty, quant, Config()).hidden_states.shape == (0, HIDDEN)


SCALE = torch.ones(())


@pytest.mark.parametrize(
    ("config", "quant", "dispatch", "reason"),
    [
        ({}, {"use_fp8_w8a8": True}, {}, "quantised weights (use_fp8_w8a8)"),
        ({}, {"w13_scale": SCALE}, {}, "quantised weights (w13_scale)"),
        ({}, {"block_shape": [128, 128]}, {}, "quantised weights (block_shape)"),
        ({}, {}, {"hidden_states_scale": SCALE}, "quantised hidden states"),
        ({}, {}, {"hidden_states_pre_quant": (SCALE, SCALE)}, "quantised hidden states"),
        ({}, {}, {"topk_output": Bypassed(SCALE)}, "routing in Bypassed"),
        ({}, {}, {"hidden_states": torch.ones(7, HIDDEN)}, "hidden states in torch.float32"),
        ({"silu_mul_keep_fp32": True}, {}, {}, "option silu_mul_keep_fp32"),
        ({"no_combine": True}, {}, {}, "no_combine with inplace"),
        ({"activation": "situ"}, {}, {}, "activation situ"),
        ({"activation": "gelu_tanh", "is_gated": False}, {}, {}, "without a gate"),
        ({"activation": "gelu", "swiglu_limit": 10.0}, {}, {}, "with a clamp or a slope"),
        ({"gemm1_clamp_limit": 7.0}, {}, {}, "clamps after SiLU"),
        ({"gemm1_alpha": 1.7}, {}, {}, "clamp=None"),
        ({**OAI, "gemm1_beta": 0.5}, {}, {}, "beta=0.5"),
        ({"apply_router_weight_on_input": True}, {"b13": draw(2, EXPERTS, 2 * INTER)}, {}, "bias"),
        ({}, {"w2_weight": draw(1, EXPERTS, HIDDEN, INTER + 8)}, {}, "down must be"),
    ],
)
def test_left_to_sglang(
    host: Host, config: dict[str, Any], quant: dict[str, Any], dispatch: dict[str, Any], reason: str
) -> None:
    plugin.register()
    given, weights = make()
    given, weights = given._replace(**dispatch), replace(weights, **quant)
    for _ in range(2):
        assert host.function(given, weights, Config(**config)).hidden_states is given.hidden_states
    assert host.own_calls == 2
    assert host.log.text.count("leaving experts to SGLang") == 1
    assert reason in host.log.text


def test_symmetric_memory_is_sglangs(host: Host) -> None:
    plugin.register()
    host.symmetric = True
    dispatch, quant = make()
    host.function(dispatch, quant, Config(inplace=False))
    assert host.own_calls == 1
    host.function(dispatch, quant, Config())
    assert host.own_calls == 1


def test_weights_that_moved_are_seen_and_freed(host: Host) -> None:
    plugin.register()
    dispatch, quant = make()
    host.function(dispatch, quant, Config(inplace=False))
    for tensor in (quant.w13_weight, quant.w2_weight):
        old = StorageWeakRef(tensor.untyped_storage())
        tensor.data = tensor.data * 0.5
        assert old.expired()
    expected = wanted(dispatch, quant, SWIGLU)
    out = host.function(dispatch, quant, Config(inplace=False)).hidden_states
    torch.testing.assert_close(out.float(), expected, rtol=3e-2, atol=3e-2)


def test_weights_are_left_as_they_were(host: Host, tmp_path: Path) -> None:
    """So that they can be saved, and loaded where only plain tensors may be."""
    plugin.register()
    dispatch, quant = make()
    host.function(dispatch, quant, Config())
    assert not vars(quant.w13_weight)
    torch.save(quant.w13_weight, tmp_path / "w13")
    assert torch.equal(torch.load(tmp_path / "w13", weights_only=True), quant.w13_weight)


def test_layers_whose_kernels_do_not_compile_stay_with_sglang(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[int] = []

    def fails(*_: Any, **__: Any) -> list[str]:
        tried.append(1)
        raise RuntimeError("out of resource: shared memory")

    monkeypatch.setattr(host_parts, "warmup", fails)
    plugin.register()
    for _ in range(2):
        dispatch, quant = make()
        assert host.function(dispatch, quant, Config()).hidden_states is dispatch.hidden_states
    assert (host.own_calls, len(tried)) == (2, 1)
    assert "kernels do not compile, RuntimeError: out of resource" in host.log.text


def test_reasons_are_logged_once_whatever_the_sizes(host: Host) -> None:
    plugin.register()
    _, quant = make()
    for tokens in range(1, 20):
        dispatch, _ = make(tokens=tokens)
        wrong = dispatch._replace(hidden_states=dispatch.hidden_states[:, :-8])
        host.function(wrong, quant, Config())
    assert host.own_calls == 19
    assert host.log.text.count("leaving experts to SGLang") == 1
    said: list[str] = []
    once = host_parts.Once(said.append)
    for number in range(200):
        once(f"reason {chr(1000 + number)}")
    assert len(said) == 100


def test_warm_up_and_batch_invariance(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(host_parts, "warmup", lambda shape, **options: asked.append(options) or [])
    monkeypatch.setattr(plugin, "MAX_TOKENS", 8)
    plugin.register()
    for _ in range(2):  # Two layers that are alike.
        dispatch, quant = make()
        host.function(dispatch, quant, Config())
    assert [(a["max_tokens"], a["reduce"], a["batch_invariant"]) for a in asked] == [
        (8, True, False)
    ]
    host.invariant = True
    host.function(dispatch, quant, Config())
    assert len(asked) == 2 and asked[-1]["batch_invariant"]
    host.function(make(tokens=9)[0], quant, Config())
    assert len(asked) == 3 and asked[-1]["max_tokens"] == 16


def test_call_that_the_contract_describes(host: Host) -> None:
    """The fake is no wider than the releases: each of its fields is one of theirs."""
    newest = CONTRACTS["0.5.23"]["members"]
    assert set(Config.__dataclass_fields__) <= set(newest[CONFIG])
    assert set(Quant.__dataclass_fields__) <= set(newest[QUANT])
    standard = f"{MOE}.token_dispatcher.standard:StandardDispatchOutput"
    assert set(Dispatch._fields) == set(newest[standard])
    assert plugin.mismatch() is None
