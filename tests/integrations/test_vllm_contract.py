"""vLLM: what the plug-in relies on in releases, and the plug-in in a vLLM made for the tests."""

from __future__ import annotations

import enum
import importlib
import importlib.util
import inspect
import json
import logging
import sys
import types
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

import tilewise
from tilewise.integrations import host
from tilewise.integrations import vllm as plugin
from tilewise.moe import reference as specification
from tilewise.moe.activation import SWIGLU_OAI, Activation

CONTRACTS = json.loads(Path(__file__).with_name("vllm_contract.json").read_text())
REFUSED = {"relu2", "swiglustep", "situ"}
LAYERS = "vllm.model_executor.layers.fused_moe"
# Not at the position of a package that the tests themselves put there.
INSTALLED = importlib.util.find_spec("vllm") is not None


@pytest.mark.parametrize("version", CONTRACTS)
class TestReleases:
    def test_functions(self, version: str) -> None:
        found = {k: tuple(v or ()) for k, v in CONTRACTS[version]["functions"].items()}
        assert found == plugin.FUNCTIONS

    def test_members(self, version: str) -> None:
        for name, wanted in plugin.MEMBERS.items():
            assert set(wanted) <= set(CONTRACTS[version]["members"][name]), name

    def test_every_abstract_method_is_ours(self, version: str) -> None:
        ours = {*plugin.SUPPORTS, "apply", "workspace_shapes", "finalize_weight_and_reduce_impl"}
        assert set(CONTRACTS[version]["abstract"]) <= ours

    def test_an_addition_is_looked_at(self, version: str) -> None:
        """A name that a release adds fails here, so that someone decides what it means."""
        for name, known in plugin.KNOWN.items():
            assert set(CONTRACTS[version]["public"][name]) <= known, name

    def test_every_activation_is_known_or_refused(self, version: str) -> None:
        for name in CONTRACTS[version]["activations"]:
            limit = 7.0 if name.endswith("_uninterleave") else None
            known = plugin.translate(name, limit, None, None)
            assert isinstance(known, str) == (name in REFUSED), (name, known)


@pytest.mark.skipif(not INSTALLED, reason="vLLM is not installed here")
def test_installed_vllm() -> None:
    assert plugin.mismatch() is None
    assert plugin.additions() == []


def test_named_releases() -> None:
    assert {"0.24.0", "0.33.0"} <= set(CONTRACTS)


def test_entry_point() -> None:
    pyproject = Path(__file__).resolve().parents[2] / "pyproject.toml"
    wanted = 'tilewise = "tilewise.integrations.vllm:register"'
    assert f'[project.entry-points."vllm.general_plugins"]\n{wanted}\n' in pyproject.read_text()
    for point in entry_points(group="vllm.general_plugins"):
        if point.name == "tilewise":
            assert point.load() is plugin.register


class TestTranslate:
    def test_numbers_of_gpt_oss(self) -> None:
        assert plugin.translate("swigluoai", None, None, None) == (SWIGLU_OAI, "interleaved")
        assert plugin.translate("swigluoai", 7.0, 1.702, 1.0) == (SWIGLU_OAI, "interleaved")
        assert "instead of" in plugin.translate("swigluoai", 5.0, None, None)

    def test_clamped(self) -> None:
        clamped = Activation("swiglu", limit=5.0)
        # vLLM's clamped SiLU has slope 1 and offset 0, whatever the layer says.
        assert plugin.translate("silu", 5.0, 1.7, 1.0) == (clamped, "gate_up")
        both = Activation("swiglu", alpha=1.702, beta=1.0, limit=7.0)
        assert plugin.translate("swigluoai_uninterleave", 7.0, 1.702, 1.0) == (both, "gate_up")
        defaults = Activation("swiglu", limit=7.0)
        assert plugin.translate("swigluoai_uninterleave", 7.0, None, None) == (defaults, "gate_up")

    @pytest.mark.parametrize(
        ("name", "limit"),
        [("gelu", 7.0), ("silu", 0.0), ("swigluoai_uninterleave", None), ("relu2", None)],
    )
    def test_refused(self, name: str, limit: float | None) -> None:
        assert isinstance(plugin.translate(name, limit, None, None), str)


# A vLLM with the names and signatures of the contract, and next to nothing behind them.


class Format(enum.Enum):
    Standard = 1
    BatchedExperts = 2


class Act(enum.Enum):
    SILU = "silu"
    GELU = "gelu"
    GELU_TANH = "gelu_tanh"
    RELU2 = "relu2"
    SWIGLUOAI = "swigluoai"
    SWIGLUOAI_UNINTERLEAVE = "swigluoai_uninterleave"
    SWIGLUSTEP = "swiglustep"
    RELU2_NO_MUL = "relu2_no_mul"


class Backend(enum.Enum):
    TRITON = 1
    FLASHINFER = 2


@dataclass(frozen=True)
class Parallel:
    dp_size: int = 1
    use_batched_activation_format: bool = False
    use_fi_nvl_one_sided_kernels: bool = False


@dataclass
class Config:
    activation: Act = Act.SILU
    experts_per_token: int = 2
    in_dtype: torch.dtype = torch.bfloat16
    is_lora_enabled: bool = False
    max_num_tokens: int = 64
    moe_backend: str = "auto"
    moe_parallel_config: Parallel = field(default_factory=Parallel)
    swiglu_alpha: float | None = None
    swiglu_beta: float | None = None
    swiglu_limit: float | None = None

    @property
    def is_act_and_mul(self) -> bool:
        return not self.activation.value.endswith("_no_mul")


@dataclass
class Quant:
    w1_bias: torch.Tensor | None = None
    w2_bias: torch.Tensor | None = None
    gemm1_alpha: float | None = None
    gemm1_beta: float | None = None
    gemm1_clamp_limit: float | None = None


class TheirExperts:
    """What vLLM would have run."""

    def __init__(self, moe_config: Any, quant_config: Any) -> None: ...


def fake_modules() -> dict[str, types.ModuleType]:
    names = ("", ".envs", ".logger", ".platforms", ".model_executor", ".model_executor.custom_op")
    layers = ("", ".modular_kernel", ".activation", ".config", ".topk_weight_and_reduce", ".oracle")
    layers += (".unquantized_fused_moe_method", ".oracle.unquantized")
    all_names = [f"vllm{n}" for n in names] + ["vllm.model_executor.layers"]
    all_names += [f"{LAYERS}{n}" for n in layers]
    modules = {name: types.ModuleType(name) for name in all_names}
    for name, module in modules.items():
        module.__path__ = []  # type: ignore[attr-defined]
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(modules[parent], child, module)

    registry: dict[str, type] = {}

    class CustomOp(torch.nn.Module):
        def __new__(cls, *args: Any, **kwargs: Any) -> Any:
            return super().__new__(registry.get(cls.__name__, cls))

        @classmethod
        def register_oot(cls, _decorated_op_cls: Any = None, name: str | None = None) -> Any:
            key = name or cls.__name__
            assert key not in registry
            _decorated_op_cls.name = key
            registry[key] = _decorated_op_cls
            return _decorated_op_cls

    class FusedMoEExperts(ABC):  # noqa: B024
        def __init__(
            self,
            moe_config: Any,
            quant_config: Any,
            max_num_tokens: int | None = None,
            num_dispatchers: int | None = None,
        ) -> None:
            self.moe_config, self.quant_config = moe_config, quant_config

        @staticmethod
        def is_supported_config(
            cls: Any, moe_config: Any, weight_key: Any, activation_key: Any, activation_format: Any
        ) -> tuple[bool, str | None]:
            checks = {
                "device": cls._supports_current_device(),
                "no gate": moe_config.is_act_and_mul or cls._supports_no_act_and_mul(),
                f"{moe_config.activation} activation": cls._supports_activation(
                    moe_config.activation
                ),
                "quantization": cls._supports_quant_scheme(weight_key, activation_key),
                "parallel config": cls._supports_parallel_config(moe_config.moe_parallel_config),
                f"{activation_format} activation format": (
                    activation_format == cls.activation_format()
                ),
                "LoRA": not moe_config.is_lora_enabled,
            }
            failed = [f"kernel does not support {k}" for k, served in checks.items() if not served]
            return not failed, failed[0] if failed else None

    for name in plugin.SUPPORTS:
        setattr(FusedMoEExperts, name, staticmethod(abstractmethod(lambda *a: None)))

    class FusedMoEExpertsModular(FusedMoEExperts):
        @abstractmethod
        def finalize_weight_and_reduce_impl(self) -> Any: ...

    for key in ("workspace_shapes", "apply"):
        wanted = plugin.FUNCTIONS[f"{LAYERS}.modular_kernel:FusedMoEExpertsModular.{key}"]
        method = eval(f"lambda {', '.join(wanted)}: None")
        setattr(FusedMoEExpertsModular, key, abstractmethod(method))
    # Abstract methods are counted when the class is made.
    experts_base = type("FusedMoEExperts", (FusedMoEExperts,), dict(vars(FusedMoEExperts)))
    body = {k: v for k, v in vars(FusedMoEExpertsModular).items() if not k.startswith("_abc")}
    modular = type("FusedMoEExpertsModular", (experts_base,), body)

    class FusedMoEKernel:
        def __init__(self, experts: Any) -> None:
            self.experts = experts

        @property
        def fused_experts(self) -> Any:
            return self.experts

    class UnquantizedFusedMoEMethod(CustomOp):
        name = "unquantized_fused_moe"
        topk_indices_dtype = None
        choice: Any = (Backend.TRITON, TheirExperts)

        def __init__(self, moe: Any) -> None:
            super().__init__()
            self.moe, self.moe_kernel = moe, None
            self.unquantized_backend, self.experts_cls = self.choice
            self.processed: list[Any] = []

        def process_weights_after_loading(self, layer: Any) -> None:
            self.processed.append(self.experts_cls)
            if self.moe_kernel is None:
                quant = Quant(getattr(layer, "w13_bias", None), getattr(layer, "w2_bias", None))
                quant.gemm1_clamp_limit = getattr(layer, "swiglu_limit", None)
                experts = self.experts_cls(moe_config=self.moe, quant_config=quant)
                self.moe_kernel = FusedMoEKernel(experts)

    platform = types.SimpleNamespace(
        is_cuda_alike=lambda: True, is_rocm=lambda: False, has_device_capability=lambda c: True
    )
    contents = {
        "vllm.envs": {"VLLM_BATCH_INVARIANT": False},
        "vllm.platforms": {"current_platform": platform},
        "vllm.model_executor.custom_op": {"CustomOp": CustomOp, "op_registry_oot": registry},
        f"{LAYERS}.modular_kernel": {
            "FusedMoEExperts": experts_base,
            "FusedMoEExpertsModular": modular,
            "FusedMoEActivationFormat": Format,
            "FusedMoEKernel": FusedMoEKernel,
        },
        f"{LAYERS}.activation": {"MoEActivation": Act},
        f"{LAYERS}.config": {
            "FusedMoEConfig": Config,
            "FusedMoEParallelConfig": Parallel,
            "FusedMoEQuantConfig": Quant,
        },
        f"{LAYERS}.topk_weight_and_reduce": {
            "TopKWeightAndReduceNoOP": type("TopKWeightAndReduceNoOP", (), {"apply": None})
        },
        f"{LAYERS}.oracle.unquantized": {"UnquantizedMoeBackend": Backend},
        f"{LAYERS}.unquantized_fused_moe_method": {
            "UnquantizedFusedMoEMethod": UnquantizedFusedMoEMethod
        },
    }
    for name, values in contents.items():
        vars(modules[name]).update(values)
    return modules


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Iterator[Any]:
    """The vLLM of this file in the place of any other, and everything that the log says."""
    for name in [n for n in sys.modules if n.split(".")[0] == "vllm"]:
        monkeypatch.delitem(sys.modules, name)
    for name, module in fake_modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    ours = "tilewise.integrations.vllm_experts"
    monkeypatch.delitem(sys.modules, ours, raising=False)
    monkeypatch.delenv(plugin.SWITCH, raising=False)
    caplog.set_level(logging.INFO, logger="vllm.tilewise")
    monkeypatch.setattr(host, "warmup", lambda *_, **__: [])
    yield types.SimpleNamespace(
        registry=sys.modules["vllm.model_executor.custom_op"].op_registry_oot,
        method=lambda moe: sys.modules[
            f"{LAYERS}.unquantized_fused_moe_method"
        ].UnquantizedFusedMoEMethod(moe),
        log=caplog,
        platform=sys.modules["vllm.platforms"].current_platform,
    )
    sys.modules.pop(ours, None)


class TestRegister:
    def test_twice_changes_nothing(self, vllm: Any) -> None:
        plugin.register()
        (registered,) = vllm.registry.values()
        plugin.register()
        assert list(vllm.registry.values()) == [registered]
        assert registered.name == "unquantized_fused_moe"
        assert vllm.log.text.count("tilewise: on for unquantised experts") == 1
        assert "never ask it" in vllm.log.text

    def test_a_name_that_no_release_has_is_logged(
        self, vllm: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        base = sys.modules[f"{LAYERS}.modular_kernel"].FusedMoEExpertsModular
        monkeypatch.setattr(base, "post_gemm3_hook", None, raising=False)
        plugin.register()
        assert len(vllm.registry) == 1
        assert "unknown to it in this vLLM: post_gemm3_hook" in vllm.log.text

    def test_switch(self, vllm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(plugin.SWITCH, "0")
        plugin.register()
        assert not vllm.registry
        assert "off" in vllm.log.text

    def test_another_plugin_was_first(self, vllm: Any) -> None:
        vllm.registry["UnquantizedFusedMoEMethod"] = object
        plugin.register()
        assert vllm.registry["UnquantizedFusedMoEMethod"] is object
        assert "already" in vllm.log.text

    def test_without_vllm(self, vllm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "vllm.model_executor.custom_op", None)
        plugin.register()
        assert "not used" in vllm.log.text

    def test_a_changed_vllm_keeps_its_experts(
        self, vllm: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        base = sys.modules[f"{LAYERS}.modular_kernel"].FusedMoEExpertsModular
        monkeypatch.setattr(base, "apply", lambda self, output, something_new: None)
        plugin.register()
        assert not vllm.registry
        assert "something_new" in vllm.log.text


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (Config(is_lora_enabled=True), "LoRA"),
        (Config(moe_backend="triton"), "moe_backend=triton was asked for"),
        (Config(in_dtype=torch.float32), "dtype torch.float32"),
        (Config(activation=Act.SWIGLUSTEP), "SWIGLUSTEP activation"),
        (Config(activation=Act.GELU, swiglu_limit=7.0), "activation gelu with limit 7.0"),
        (
            Config(moe_parallel_config=Parallel(use_batched_activation_format=True)),
            "BatchedExperts activation format",
        ),
        (
            Config(moe_parallel_config=Parallel(use_fi_nvl_one_sided_kernels=True)),
            "parallel config",
        ),
    ],
)
def test_refused_layers_stay_with_vllm(vllm: Any, config: Config, reason: str) -> None:
    plugin.register()
    vllm.log.clear()
    method = vllm.method(config)
    assert (method.unquantized_backend, method.experts_cls) == (Backend.TRITON, TheirExperts)
    vllm.method(config)
    (record,) = vllm.log.records
    assert "leaving experts to vLLM" in record.getMessage() and reason in record.getMessage()


def test_an_unknown_device_stays_with_vllm(vllm: Any) -> None:
    vllm.platform.has_device_capability = lambda capability: False
    plugin.register()
    assert vllm.method(Config()).experts_cls is TheirExperts
    assert "device" in vllm.log.text


def ours() -> Any:
    return importlib.import_module("tilewise.integrations.vllm_experts").TilewiseExperts


@pytest.mark.parametrize("switch", [None, "1", "on"])
def test_another_backend_than_triton_is_left_unless_asked(
    vllm: Any, monkeypatch: pytest.MonkeyPatch, switch: str | None
) -> None:
    if switch is not None:
        monkeypatch.setenv(plugin.SWITCH, switch)
    plugin.register()
    base = sys.modules[f"{LAYERS}.unquantized_fused_moe_method"].UnquantizedFusedMoEMethod
    monkeypatch.setattr(base, "choice", (Backend.FLASHINFER, TheirExperts))
    assert vllm.method(Config()).experts_cls is (TheirExperts if switch is None else ours())
    said = "vLLM chose FLASHINFER, TILEWISE_VLLM=1 puts Tilewise in its place"
    assert (said in vllm.log.text) == (switch is None)


@pytest.mark.parametrize("backend", ["marlin", "humming"])
def test_backends_of_quantised_layers_leave_the_others_free(vllm: Any, backend: str) -> None:
    plugin.register()
    assert vllm.method(Config(moe_backend=backend)).experts_cls is ours()


def make_layer(activation: Act, bias: bool, local: int, **clamp: Any) -> tuple[Any, Any, Any]:
    """(method, layer, config) of 5 experts, `local` of them here, top 2, in a fake vLLM."""
    generator = torch.Generator().manual_seed(0)

    def draw(*size: int) -> torch.Tensor:
        values = torch.randn(size, generator=generator) * size[-1] ** -0.5
        return values.to(torch.bfloat16)

    hidden, inter = 48, 24
    config = Config(activation=activation, **clamp)
    rows = 2 * inter if config.is_act_and_mul else inter
    layer = types.SimpleNamespace(
        w13_weight=torch.nn.Parameter(draw(local, rows, hidden), requires_grad=False),
        w2_weight=torch.nn.Parameter(draw(local, hidden, inter), requires_grad=False),
        expert_map=None if local == 5 else torch.tensor([-1, 1, -1, 0, 2], dtype=torch.int32),
    )
    if bias:
        layer.w13_bias, layer.w2_bias = draw(local, rows), draw(local, hidden)
    method = sys.modules[f"{LAYERS}.unquantized_fused_moe_method"].UnquantizedFusedMoEMethod(config)
    method.process_weights_after_loading(layer)
    return method, layer, config


def call(method: Any, layer: Any, config: Config, num_tokens: int, on_input: bool = False) -> Any:
    """Calls experts as vLLM's kernel does; returns the output and what a reference needs."""
    generator = torch.Generator().manual_seed(num_tokens)
    hidden, top_k = layer.w13_weight.shape[2], 1 if on_input else config.experts_per_token
    x = torch.randn((num_tokens, hidden), generator=generator).to(torch.bfloat16)
    ids = torch.stack([torch.randperm(5, generator=generator)[:top_k] for _ in range(num_tokens)])
    ids = ids.to(torch.int32)
    routing = torch.rand((num_tokens, top_k), generator=generator)
    experts = method.moe_kernel.fused_experts
    local, rows, _ = layer.w13_weight.shape
    shapes = experts.workspace_shapes(
        num_tokens, rows, hidden, top_k, 5, local, None, config.activation
    )
    # The first workspace and the output share memory in vLLM; poisoned, as real memory may be.
    work13, work2, out = (torch.full(s, torch.nan, dtype=torch.bfloat16) for s in shapes)
    experts.apply(
        output=out,
        hidden_states=x * routing.to(x.dtype) if on_input else x,
        w1=layer.w13_weight,
        w2=layer.w2_weight,
        topk_weights=routing,
        topk_ids=ids,
        activation=config.activation,
        global_num_experts=5,
        expert_map=layer.expert_map,
        a1q_scale=None,
        a2_scale=None,
        workspace13=work13,
        workspace2=work2,
        expert_tokens_meta=None,
        apply_router_weight_on_input=on_input,
    )
    return out, x, routing, ids


@pytest.mark.parametrize("num_tokens", [1, 7])
@pytest.mark.parametrize("local", [5, 3])
@pytest.mark.parametrize(
    ("activation", "bias", "clamp"),
    [
        (Act.SILU, False, {}),
        (Act.SILU, False, {"swiglu_limit": 0.5}),
        (Act.GELU, True, {}),
        (Act.GELU_TANH, False, {}),
        (Act.SWIGLUOAI, True, {}),
        (Act.SWIGLUOAI_UNINTERLEAVE, False, {"swiglu_limit": 0.7, "swiglu_alpha": 1.7}),
        (Act.RELU2_NO_MUL, True, {}),
    ],
)
def test_experts_are_the_reference(
    vllm: Any, activation: Act, bias: bool, clamp: dict[str, float], local: int, num_tokens: int
) -> None:
    plugin.register()
    method, layer, config = make_layer(activation, bias, local, **clamp)
    assert method.unquantized_backend is Backend.TRITON
    out, x, routing, ids = call(method, layer, config, num_tokens)
    assert torch.equal(out, expected(method, layer, x, routing, ids))
    assert vllm.log.text.count("tilewise: serving") == 1


def expected(
    method: Any, layer: Any, x: torch.Tensor, routing: torch.Tensor, ids: torch.Tensor
) -> torch.Tensor:
    """`fused_experts` with weights put together here, itself close to the specification."""
    experts = method.moe_kernel.fused_experts
    w13, w2 = layer.w13_weight, layer.w2_weight
    bias, down_bias = getattr(layer, "w13_bias", None), getattr(layer, "w2_bias", None)
    known = plugin.translate(
        method.moe.activation.value, method.moe.swiglu_limit, method.moe.swiglu_alpha, None
    )
    assert not isinstance(known, str)
    activation, layout = known
    if not activation.is_gated:
        weights = tilewise.ExpertWeights.from_ungated(w13, w2, up_bias=bias, down_bias=down_bias)
    else:
        weights = tilewise.ExpertWeights.from_gate_up(
            w13, w2, layout=layout, gate_up_bias=bias, down_bias=down_bias
        )
    options: dict[str, Any] = {"activation": activation, "expert_map": layer.expert_map}
    assert experts.quant_config.w1_bias is bias
    out = tilewise.fused_experts(x, weights, routing, ids, **options)
    reference = specification.fused_experts(x, weights, routing, ids, **options)
    torch.testing.assert_close(out.float(), reference.float(), rtol=2e-2, atol=2e-2)
    return out


def test_weights_that_are_in_the_input_already(vllm: Any) -> None:
    plugin.register()
    method, layer, config = make_layer(Act.SILU, False, 5)
    out, x, routing, ids = call(method, layer, config, 6, on_input=True)
    ones = torch.ones_like(routing)
    assert torch.equal(out, expected(method, layer, x * routing.to(x.dtype), ones, ids))


def test_weights_that_moved_are_seen_and_freed(vllm: Any) -> None:
    """As offloading needs, which gives parameters other memory after loading and in each call."""
    plugin.register()
    method, layer, config = make_layer(Act.GELU, True, 5)
    experts = method.moe_kernel.fused_experts
    experts.quant_config.w1_bias = layer.w13_bias = torch.nn.Parameter(layer.w13_bias, False)
    call(method, layer, config, 5)
    for tensor in (layer.w13_weight, layer.w2_weight, layer.w13_bias):
        old = StorageWeakRef(tensor.untyped_storage())
        tensor.data = tensor.data * 2
        assert old.expired()
    out, x, routing, ids = call(method, layer, config, 5)
    assert torch.equal(out, expected(method, layer, x, routing, ids))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("layout", ["gate_up", "interleaved", "ungated"])
def test_views_are_those_that_are_checked(layout: str, bias: bool) -> None:
    """At a second call of a kind, which skips the checks, they are the same."""
    w13, w2 = torch.randn(3, 8, 5), torch.randn(3, 5, 8 if layout == "ungated" else 4)
    b13, b2 = (torch.randn(3, 8), torch.randn(3, 5)) if bias else (None, None)
    options: Any = {"gated": layout != "ungated"}
    if options["gated"]:
        options["layout"] = layout
    host._fitting.clear()
    first, second = (host.views(w13, w2, b13, b2, **options) for _ in range(2))
    assert len(host._fitting) == 1
    for a, b in zip(vars(first).values(), vars(second).values(), strict=True):
        assert (a is None and b is None) or (a.data_ptr() == b.data_ptr() and torch.equal(a, b))
        assert a is None or a.stride() == b.stride()
    with pytest.raises(ValueError, match="down must be"):
        host.views(w13, w2[:, 1:], b13, b2, **options)


@pytest.mark.parametrize("error", [RuntimeError("out of resource: shared memory"), KeyError("x")])
def test_layers_whose_kernels_do_not_compile_stay_with_vllm(
    vllm: Any, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    plugin.register()
    tried: list[int] = []

    def fails(*_: Any, **__: Any) -> list[str]:
        tried.append(1)
        raise error

    monkeypatch.setattr(host, "warmup", fails)
    for _ in range(2):  # A second layer that is alike does not try again.
        method, _, _ = make_layer(Act.SILU, False, 5)
        assert isinstance(method.moe_kernel.fused_experts, TheirExperts)
        assert method.processed == [ours(), TheirExperts]
    assert len(tried) == 1
    assert "leaving experts to vLLM: Unprepared: kernels do not compile" in vllm.log.text
    assert "serving" not in vllm.log.text


def test_numbers_that_only_the_layer_has_are_decided_on(vllm: Any) -> None:
    """The layer's clamp counts in vLLM, and is known only after the method was chosen."""
    plugin.register()
    method, layer, _ = make_layer(Act.GELU, False, 5)
    assert isinstance(method.moe_kernel.fused_experts, ours())
    method.moe_kernel, layer.swiglu_limit = None, 7.0
    method.process_weights_after_loading(layer)
    assert isinstance(method.moe_kernel.fused_experts, TheirExperts)
    assert "activation gelu with limit 7.0" in vllm.log.text


def test_failure_where_vllm_chose_another_backend(
    vllm: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its weights have been made in the sizes of Triton: there is no way back."""
    monkeypatch.setenv(plugin.SWITCH, "1")
    plugin.register()
    base = sys.modules[f"{LAYERS}.unquantized_fused_moe_method"].UnquantizedFusedMoEMethod
    monkeypatch.setattr(base, "choice", (Backend.FLASHINFER, TheirExperts))
    monkeypatch.setattr(host, "warmup", None)
    with pytest.raises(host.Unprepared):
        make_layer(Act.SILU, False, 5)
    assert "TILEWISE_VLLM=0 uses vLLM's experts" in vllm.log.text


def test_a_call_after_a_warm_up_that_failed(vllm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    plugin.register()
    method, layer, config = make_layer(Act.SILU, False, 5)
    monkeypatch.setattr(host, "warmup", None)
    out, x, routing, ids = call(method, layer, config, 65)
    assert torch.equal(out, expected(method, layer, x, routing, ids))
    assert "kernels do not compile" in vllm.log.text


def test_what_a_call_asks_for_and_ours_do_not_do(vllm: Any) -> None:
    plugin.register()
    method, layer, config = make_layer(Act.SILU, False, 5)
    with pytest.raises(ValueError, match="activation gelu, the layer has silu"):
        call(method, layer, replace(config, activation=Act.GELU), 3)
    method.moe_kernel.fused_experts.post_gemm2_hook = lambda rows, out: None
    with pytest.raises(NotImplementedError, match="post_gemm2_hook"):
        call(method, layer, config, 3)


def test_fewer_experts_here_than_a_token_chooses(vllm: Any) -> None:
    plugin.register()
    method, layer, config = make_layer(Act.SILU, False, 3)
    config.experts_per_token = 4
    out, x, routing, ids = call(method, layer, config, 5)
    assert torch.equal(out, expected(method, layer, x, routing, ids))


def test_workspace_is_no_larger_than_vllms_own(vllm: Any) -> None:
    plugin.register()
    method, _, config = make_layer(Act.SILU, False, 5)
    experts = method.moe_kernel.fused_experts
    for tokens in (64, 2048, 8192):
        first, second, out = experts.workspace_shapes(
            tokens, 1536, 2048, 8, 128, 128, None, config.activation
        )
        assert (first, out) == ((0,), (tokens, 2048))
        # vLLM's Triton experts ask for two of [tokens, top_k, the larger of 2I and H].
        assert second[0] < 2 * tokens * 8 * 2048


def test_warm_up_is_asked_for_what_the_router_gives(
    vllm: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    plugin.register()
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(host, "warmup", lambda shape, **options: asked.append(options) or [])
    method, layer, config = make_layer(Act.SILU, False, 3)
    assert [(a["max_tokens"], a["expert_map"], a["topk_ids_dtype"]) for a in asked] == [
        (64, True, torch.int32)
    ]
    make_layer(Act.SILU, False, 3)
    call(method, layer, config, 64)
    assert len(asked) == 1  # One layer stands for all that are alike.
    call(method, layer, config, 65)
    assert asked[-1]["max_tokens"] == 65
    batch = method.moe_kernel.fused_experts
    batch.moe_config = replace(config, moe_parallel_config=Parallel(dp_size=4))
    call(method, layer, config, 66)
    assert asked[-1]["max_tokens"] == 256


def test_batch_invariance_is_passed_on(vllm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    sys.modules["vllm.envs"].VLLM_BATCH_INVARIANT = True  # type: ignore[attr-defined]
    plugin.register()
    module = importlib.import_module("tilewise.integrations.vllm_experts")
    seen: list[bool] = []
    real = module.fused_experts

    def spy(*args: Any, **options: Any) -> torch.Tensor:
        seen.append(options["batch_invariant"])
        return real(*args, **options)

    monkeypatch.setattr(module, "fused_experts", spy)
    method, layer, config = make_layer(Act.SILU, False, 5)
    call(method, layer, config, 3)
    assert seen == [True]


def test_ours_take_what_vllm_passes(vllm: Any) -> None:
    plugin.register()
    module = importlib.import_module("tilewise.integrations.vllm_experts")
    for key in ("apply", "workspace_shapes"):
        wanted = plugin.FUNCTIONS[f"{LAYERS}.modular_kernel:FusedMoEExpertsModular.{key}"]
        assert tuple(inspect.signature(getattr(module.TilewiseExperts, key)).parameters) == wanted
