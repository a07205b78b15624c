"""transformers: our experts function against the code that each experts class was written with."""

from __future__ import annotations

import copy
import importlib
import inspect
import re
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5.10")

from transformers.integrations import moe  # noqa: E402

from tilewise.integrations import gates  # noqa: E402
from tilewise.integrations import transformers as integration  # noqa: E402
from tilewise.moe.activation import Activation  # noqa: E402

EXPERTS, TOP_K, HIDDEN, INTER = 6, 3, 40, 24

# Usual classes, and what others lack: a function as activation, no gate, gates of their own. Their
# limits are set to clamp a third of what they get.
# Whether Tilewise runs them.
CLASSES = {
    "qwen3_moe.Qwen3MoeExperts": True,
    "mixtral.MixtralExperts": True,
    "deepseek_v3.DeepseekV3Experts": True,
    "glm4_moe.Glm4MoeExperts": True,
    "gemma4.Gemma4TextExperts": True,
    "lfm2_moe.Lfm2MoeExperts": True,
    "nemotron_h.NemotronHExperts": True,
    "gpt_oss.GptOssExperts": True,
    "deepseek_v4.DeepseekV4Experts": True,
    "openai_privacy_filter.OpenAIPrivacyFilterExperts": True,
    "minimax_m3_vl.MiniMaxM3VLExperts": True,
    "hy_v4.HYV4Experts": True,
    "glm5_next.Glm5NextTextExperts": True,
    "beam.BeamExperts": True,
    "step3p7.Step3p7Experts": False,
}


@pytest.fixture(autouse=True)
def _registered() -> None:
    integration.register()
    integration._warned.clear()


# Model -> what its config calls the number of experts and their size.
MODELS = {
    "Qwen3Moe": ("num_experts", "moe_intermediate_size"),
    "Mixtral": ("num_local_experts", "intermediate_size"),
    "Olmoe": ("num_experts", "intermediate_size"),
}


def tiny_model(device: str = "cpu", family: str = "Qwen3Moe") -> Any:
    torch.manual_seed(0)
    experts, inter = MODELS[family]
    config = getattr(transformers, f"{family}Config")(
        vocab_size=97, hidden_size=HIDDEN, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, num_experts_per_tok=TOP_K, bos_token_id=1, eos_token_id=2,
        pad_token_id=0, **{experts: EXPERTS, inter: INTER},
    )  # fmt: skip
    model = getattr(transformers, f"{family}ForCausalLM")._from_config(config)
    model.generation_config.eos_token_id = None
    return scaled(model).to(device).eval()


def scaled(module: Any) -> Any:
    """Weights at which experts matter, where the usual small ones leave them nearly silent."""
    for parameter in module.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
        elif parameter.dim() == 1:
            torch.nn.init.normal_(parameter, mean=1.0, std=0.2)
    return module


def make_experts(name: str, **changes: Any) -> Any:
    """One experts module of transformers with tiny sizes, whatever its config calls them."""
    family, class_name = name.split(".")
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    names = {
        "num": "num_experts num_local_experts n_routed_experts moe_num_experts num_moe_experts",
        "hidden": "hidden_size moe_latent_size",
        "inter": "intermediate_size moe_intermediate_size expert_ffn_hidden_size",
        "act": "hidden_act hidden_activation mlp_hidden_act",
    }
    sizes = {"num": EXPERTS, "hidden": HIDDEN, "inter": INTER, "act": "silu", **changes}
    config = SimpleNamespace(**{n: sizes[k] for k, text in names.items() for n in text.split()})
    config.swiglu_limit, config.swiglu_alpha = 7.0, 1.702
    config._experts_implementation = integration.NAME
    config.text_config = config
    return scaled(getattr(module, class_name)(config)).requires_grad_(False)


def inputs(
    tokens: int = 9, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    scores, ids = torch.rand(tokens, EXPERTS).topk(TOP_K)
    return torch.randn(tokens, HIDDEN).to(dtype), ids, scores.softmax(-1).to(dtype)


def own_code(experts: Any, *args: torch.Tensor) -> torch.Tensor:
    result: torch.Tensor = integration._own_forward(experts)(experts, *args)
    return result


def runs_tilewise(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that grows with each call that Tilewise itself computes."""
    calls: list[int] = []
    original = integration.fused_experts

    def counted(*args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append(1)
        return original(*args, **kwargs)

    monkeypatch.setattr(integration, "fused_experts", counted)
    return calls


def test_registering_twice_changes_nothing() -> None:
    integration.register()
    integration.register()
    assert moe.ExpertsInterface._global_mapping["tilewise"] is integration.experts_forward


@pytest.mark.parametrize("family", MODELS)
def test_generates_the_same_tokens(
    monkeypatch: pytest.MonkeyPatch, device: str, family: str
) -> None:
    model = tiny_model(device, family)
    prompts = torch.randint(97, (2, 5), device=device)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    model.set_experts_implementation("eager")
    expected = model.generate(prompts, attention_mask=torch.ones_like(prompts), **options)
    calls = runs_tilewise(monkeypatch)
    assert integration.use_tilewise(model) is model
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        actual = model.generate(prompts, attention_mask=torch.ones_like(prompts), **options)
    assert actual.tolist() == expected.tolist()
    assert len(calls) == 8 * 2, "every step of every layer is ours"
    with torch.no_grad():
        ours = model(expected).logits
        model.set_experts_implementation("eager")
        torch.testing.assert_close(ours, model(expected).logits, rtol=1e-4, atol=1e-4)


def test_from_pretrained_takes_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    model.save_pretrained(tmp_path)
    ours = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, experts_implementation="tilewise"
    )
    calls = runs_tilewise(monkeypatch)
    ids = torch.randint(97, (1, 7))
    model.set_experts_implementation("eager")
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)
    assert len(calls) == 2


@pytest.mark.parametrize("act", ["silu", "swish", "gelu", "gelu_pytorch_tanh", "gelu_new"])
@pytest.mark.parametrize("tokens", [0, 1, 9])
def test_known_activations(monkeypatch: pytest.MonkeyPatch, act: str, tokens: int) -> None:
    experts = make_experts("qwen3_moe.Qwen3MoeExperts", act=act)
    calls = runs_tilewise(monkeypatch)
    args = inputs(tokens)
    torch.testing.assert_close(experts(*args), own_code(experts, *args))
    assert calls


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("act", ["silu", "gelu_pytorch_tanh"])
def test_classes_agree_with_their_own_code(
    monkeypatch: pytest.MonkeyPatch, name: str, act: str
) -> None:
    folder, class_name = name.split(".")
    source = Path(transformers.__file__).parent / "models" / folder / f"modeling_{folder}.py"
    if not source.exists() or f"class {class_name}(" not in source.read_text():
        pytest.skip(f"this transformers has no {name}")
    experts = make_experts(name, act=act)
    for number in ("limit", "swiglu_limit"):
        if hasattr(experts, number):
            setattr(experts, number, 0.5)
    calls = runs_tilewise(monkeypatch)
    args = inputs()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        torch.testing.assert_close(experts(*args), own_code(experts, *args))
    assert bool(calls) == CLASSES[name]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    experts = make_experts("qwen3_moe.Qwen3MoeExperts")
    x, ids, scores = inputs(33)
    half = copy.deepcopy(experts).to(dtype)
    x, scores = x.to(dtype), scores.to(dtype)
    exact = own_code(copy.deepcopy(half).float(), x.float(), ids, scores.float())
    ours, theirs = half(x, ids, scores), own_code(half, x, ids, scores)
    assert ours.dtype == dtype
    assert (ours.float() - exact).norm() <= 1.5 * (theirs.float() - exact).norm()


def gpt_oss_gate(self: Any, rows: torch.Tensor) -> torch.Tensor:
    gate, up = rows[..., ::2].clamp(max=self.limit), rows[..., 1::2].clamp(-self.limit, self.limit)
    return (up + 1) * gate * torch.sigmoid(self.alpha * gate)


def decorated(gate: Any = None, **options: Any) -> Any:
    """A class with sizes and tensors of every layout the decorator can describe."""
    gated, transposed = options.get("has_gate", True), options.get("is_transposed", False)

    class Experts(torch.nn.Module):
        def __init__(self, config: Any) -> None:
            super().__init__()
            self.num_experts, self.alpha, self.limit = EXPERTS, 1.25, 0.75
            self.act_fn = transformers.activations.ACT2FN["silu" if gated else "relu2"]
            rows = 2 * INTER if gated else INTER
            up, down = torch.randn(EXPERTS, rows, HIDDEN), torch.randn(EXPERTS, HIDDEN, INTER)
            if transposed:
                up, down = up.mT.contiguous(), down.mT.contiguous()
            name = "gate_up_proj" if gated else "up_proj"
            self.register_parameter(name, torch.nn.Parameter(up / 6, False))
            self.down_proj = torch.nn.Parameter(down / 5, False)
            self.register_buffer(f"{name}_bias", torch.randn(EXPERTS, rows))
            self.register_buffer("down_proj_bias", torch.randn(EXPERTS, HIDDEN))

        def forward(self, *args: torch.Tensor) -> torch.Tensor:
            return moe.batched_mm_experts_forward(self, *args)

    if gate is not None:
        Experts._apply_gate = gate  # type: ignore[attr-defined]
    made = moe.use_experts_implementation(**options)(Experts)
    return made(SimpleNamespace(_experts_implementation=integration.NAME))


@pytest.mark.parametrize("rows", ["concatenated", "interleaved", "ungated"])
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("is_transposed", [True, False])
def test_layouts(
    monkeypatch: pytest.MonkeyPatch, rows: str, has_bias: bool, is_transposed: bool
) -> None:
    experts = decorated(
        gate=gpt_oss_gate if rows == "interleaved" else None,
        has_gate=rows != "ungated",
        is_concatenated=rows != "interleaved",
        has_bias=has_bias,
        is_transposed=is_transposed,
    )
    calls = runs_tilewise(monkeypatch)
    args = inputs()
    torch.testing.assert_close(experts(*args), own_code(experts, *args), rtol=1e-4, atol=1e-5)
    assert calls


def test_gates_are_recognised_by_what_they_compute() -> None:
    def activation(gate: Any, **options: Any) -> Any:
        experts = decorated(gate=gate, **{"is_concatenated": False} | options)
        return integration._activation_of(experts)[1]

    oai = Activation("swiglu", alpha=1.25, beta=1.0, limit=0.75)
    assert activation(gpt_oss_gate) == oai
    assert activation(gpt_oss_gate, is_concatenated=True) is None

    def halves(self: Any, rows: torch.Tensor) -> torch.Tensor:
        gate, up = rows.chunk(2, dim=-1)
        gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        return (up + 1) * gate * torch.sigmoid(self.alpha * gate)

    assert activation(halves, is_concatenated=True) == oai
    assert activation(halves) is None

    def act_fn(self: Any, rows: torch.Tensor) -> torch.Tensor:
        return self.act_fn(rows[..., ::2]) * rows[..., 1::2]

    assert activation(act_fn) == Activation("swiglu")

    def off_by_little(self: Any, rows: torch.Tensor) -> torch.Tensor:
        return self.act_fn(rows[..., ::2]) * rows[..., 1::2] * 1.001

    def clamps_after(self: Any, rows: torch.Tensor) -> torch.Tensor:
        return self.act_fn(rows[..., ::2]).clamp(max=self.limit) * rows[..., 1::2]

    def reads_more(self: Any, rows: torch.Tensor) -> torch.Tensor:
        return self.act_fn(rows[..., ::2]) * rows[..., 1::2] * (2.0 if self.training else 1.0)

    for gate in (off_by_little, clamps_after, reads_more):
        assert activation(gate) is None, gate


SCALE = [1.0]


def far_clamp(self: Any, rows: torch.Tensor) -> torch.Tensor:
    return self.act_fn(rows[..., ::2].clamp(max=400.0)) * rows[..., 1::2].clamp(-400.0, 400.0)


def farther_clamp(self: Any, rows: torch.Tensor) -> torch.Tensor:
    return self.act_fn(rows[..., ::2]) * rows[..., 1::2].clamp(max=9e3)


def clamp_in_bf16(self: Any, rows: torch.Tensor) -> torch.Tensor:
    gate = rows[..., ::2]
    gate = gate.clamp(max=8.0) if rows.dtype == torch.bfloat16 else gate
    return self.act_fn(gate) * rows[..., 1::2]


def clamp_in_fp16(self: Any, rows: torch.Tensor) -> torch.Tensor:
    up = rows[..., 1::2]
    return self.act_fn(rows[..., ::2]) * (up.clamp(-8, 8) if rows.dtype == torch.float16 else up)


def with_gradients(self: Any, rows: torch.Tensor) -> torch.Tensor:
    return self.act_fn(rows[..., ::2]) * rows[..., 1::2] * (2 if torch.is_grad_enabled() else 1)


def by_size(self: Any, rows: torch.Tensor) -> torch.Tensor:
    return self.act_fn(rows[..., ::2]) * rows[..., 1::2] * (1 if rows.shape[0] > 100 else 2)


def reads_a_global(self: Any, rows: torch.Tensor) -> torch.Tensor:
    return self.act_fn(rows[..., ::2]) * rows[..., 1::2] * SCALE[0]


def calls_a_global(self: Any, rows: torch.Tensor) -> torch.Tensor:
    return gpt_oss_gate(self, rows)


def reads_a_global_inside(self: Any, rows: torch.Tensor) -> torch.Tensor:
    return self.act_fn(rows[..., ::2]) * rows[..., 1::2] * (lambda: SCALE[0])()


@pytest.mark.parametrize(
    "gate",
    [far_clamp, farther_clamp, clamp_in_bf16, clamp_in_fp16, with_gradients, by_size,
     reads_a_global, calls_a_global, reads_a_global_inside],
)  # fmt: skip
def test_gates_that_differ_where_few_look(gate: Any) -> None:
    experts = decorated(gate=gate, is_concatenated=False)
    assert integration._activation_of(experts)[1] is None


def test_gates_that_read_a_closure() -> None:
    scale = 1.0

    def gate(self: Any, rows: torch.Tensor) -> torch.Tensor:
        return self.act_fn(rows[..., ::2]) * rows[..., 1::2] * scale

    experts = decorated(gate=gate, is_concatenated=False)
    assert integration._activation_of(experts)[1] is None


@pytest.mark.parametrize("alpha", [1.0, 1.702])
@pytest.mark.parametrize("limit", [0.3, 7.0, 100.0])
def test_gates_in_low_precision_are_not_refused_for_rounding(alpha: float, limit: float) -> None:
    experts = decorated(gate=gpt_oss_gate, is_concatenated=False)
    experts.alpha, experts.limit = alpha, limit
    wanted = Activation("swiglu", alpha=alpha, beta=1.0, limit=limit)
    assert integration._activation_of(experts)[1] == wanted


def test_numbers_of_a_gate_are_read_at_call_time() -> None:
    experts = decorated(gate=gpt_oss_gate, is_concatenated=False)
    args = inputs()
    for experts.alpha, experts.limit in ((1.25, 0.75), (2.0, 0.75), (2, 3)):
        torch.testing.assert_close(experts(*args), own_code(experts, *args), rtol=1e-4, atol=1e-5)
    experts.limit = torch.tensor(0.5)  # Reading it on the host might wait for a device.
    with pytest.warns(RuntimeWarning, match="gates with a function of its own"):
        assert torch.equal(experts(*args), own_code(experts, *args))


@pytest.mark.parametrize("name", ["qwen3_moe.Qwen3MoeExperts", "gpt_oss.GptOssExperts"])
def test_ids_of_other_devices_are_skipped(name: str) -> None:
    """Under expert parallelism, ids >= num_experts are elsewhere, whatever their weights say."""
    experts = make_experts(name)
    x, ids, scores = inputs()
    elsewhere = torch.rand(ids.shape) < 0.5
    elsewhere[0] = True
    masked = torch.where(elsewhere, EXPERTS, ids)
    before = masked.clone()
    actual = experts(x, masked, scores)
    expected = own_code(experts, x, ids, scores.masked_fill(elsewhere, 0.0))
    torch.testing.assert_close(actual, expected)
    assert actual[0].abs().max() == 0
    assert torch.equal(masked, before)


def test_weights_are_read_at_call_time() -> None:
    """As adapters need, which replace the parameter by a function of it."""
    experts = make_experts("qwen3_moe.Qwen3MoeExperts")

    class AddOne(torch.nn.Module):
        def forward(self, weight: torch.Tensor) -> torch.Tensor:
            return weight + 0.1

    args = inputs()
    before = experts(*args)
    torch.nn.utils.parametrize.register_parametrization(experts, "gate_up_proj", AddOne())
    after = experts(*args)
    torch.testing.assert_close(after, own_code(experts, *args))
    assert (after - before).abs().max() > 1e-2


def post_expert_norm(experts: Any) -> None:
    experts.has_post_expert_norm = True


def own_gate(experts: Any) -> None:
    gate = type(experts)._apply_gate
    experts._apply_gate = lambda rows: gate(experts, rows).clamp(max=0.1)


def interleaved(experts: Any) -> None:
    experts.is_concatenated = False


def unknown_activation(experts: Any) -> None:
    experts.act_fn = torch.nn.Mish()


def subclassed_activation(experts: Any) -> None:
    class Doubled(torch.nn.SiLU):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    experts.act_fn = Doubled()


def activation_with_another_forward(experts: Any) -> None:
    experts.act_fn = torch.nn.SiLU()
    experts.act_fn.forward = lambda x: 0 * x


def activation_with_a_hook(experts: Any) -> None:
    experts.act_fn = torch.nn.SiLU()
    experts.act_fn.register_forward_hook(lambda module, args, output: 2 * output)


def activation_with_a_pre_hook(experts: Any) -> None:
    experts.act_fn = torch.nn.SiLU()
    experts.act_fn.register_forward_pre_hook(lambda module, args: (2 * args[0],))


def double_precision(experts: Any) -> None:
    experts.double()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (own_gate, "gates with a function of its own"),
        (interleaved, "interleaved"),
        (unknown_activation, "Mish"),
        (subclassed_activation, "Doubled"),
        (activation_with_another_forward, "SiLU has hooks or another forward"),
        (activation_with_a_hook, "SiLU has hooks or another forward"),
        (activation_with_a_pre_hook, "SiLU has hooks or another forward"),
        (post_expert_norm, "normalises"),
        (double_precision, "float64"),
    ],
)
def test_what_is_not_understood_runs_its_own_code(
    monkeypatch: pytest.MonkeyPatch, change: Any, reason: str
) -> None:
    experts = make_experts("qwen3_moe.Qwen3MoeExperts")
    change(experts)
    calls = runs_tilewise(monkeypatch)
    args = inputs(dtype=experts.down_proj.dtype)
    with pytest.warns(RuntimeWarning, match=reason):
        actual = experts(*args)
    assert torch.equal(actual, own_code(experts, *args))
    assert not calls
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        experts(*args)  # Warned once.


def test_training_runs_its_own_code() -> None:
    experts = make_experts("qwen3_moe.Qwen3MoeExperts").requires_grad_()
    args = inputs()
    with pytest.warns(RuntimeWarning, match="no_grad"):
        experts(*args).sum().backward()
    assert experts.gate_up_proj.grad.abs().max() > 0
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        experts(*args)


def test_training_only_the_router_or_a_bias_runs_its_own_code() -> None:
    """With frozen expert matrices, gradients still flow to what surrounds them."""
    experts = decorated(has_bias=True)
    x, ids, scores = inputs()
    with pytest.warns(RuntimeWarning, match="no_grad"):
        experts(x, ids, scores.requires_grad_()).sum().backward()
    assert scores.grad is not None and scores.grad.abs().max() > 0
    experts.gate_up_proj_bias.requires_grad_()
    experts(x, ids, scores.detach()).sum().backward()
    assert experts.gate_up_proj_bias.grad.abs().max() > 0


def test_autocast_runs_its_own_code() -> None:
    experts = make_experts("qwen3_moe.Qwen3MoeExperts")
    args = inputs()
    with torch.autocast("cpu", torch.bfloat16), pytest.warns(RuntimeWarning, match="autocast"):
        assert torch.equal(experts(*args), own_code(experts, *args))


def test_fp8_experts_run_their_own_code() -> None:
    """They look the name up in a registry of their own, which must know it."""
    fp8 = importlib.import_module("transformers.integrations.finegrained_fp8")
    function = fp8.ALL_FP8_EXPERTS_FUNCTIONS.get_interface(integration.NAME, None)
    assert function is integration.experts_forward


@pytest.mark.parametrize("name", ["qwen3_moe.Qwen3MoeExperts", "gpt_oss.GptOssExperts"])
def test_compiles_without_graph_breaks(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    gates._probe.cache_clear()
    experts = make_experts(name)
    args = inputs()
    monkeypatch.setattr(integration, "_warn", None)
    compiled = torch.compile(experts, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(*args), own_code(experts, *args))


def llama4_block() -> Any:
    config = transformers.Llama4TextConfig(
        hidden_size=HIDDEN, intermediate_size=INTER, num_local_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
    )  # fmt: skip
    module = importlib.import_module("transformers.models.llama4.modeling_llama4")
    return scaled(module.Llama4TextMoe(config)).requires_grad_(False)


def check_llama4(
    monkeypatch: pytest.MonkeyPatch, block: Any, expected_calls: int, change: Any = None
) -> None:
    x = torch.randn(2, 3, HIDDEN)
    expected = block(x)
    integration._switch_llama4(block)
    if change is not None:
        change(block)
    calls = runs_tilewise(monkeypatch)
    for ours, theirs in zip(block(x), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert len(calls) == expected_calls


def test_llama4_block(monkeypatch: pytest.MonkeyPatch) -> None:
    block = llama4_block()
    check_llama4(monkeypatch, block, 1)
    check_llama4(monkeypatch, copy.deepcopy(block), 1)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 3, HIDDEN)
    torch.testing.assert_close(compiled(x)[0], type(block).forward(block, x)[0])
    assert integration.status(block) == {"experts": "tilewise"}


def test_llama4_block_that_accelerate_wrapped(monkeypatch: pytest.MonkeyPatch) -> None:
    block = llama4_block()
    block._old_forward = block.forward
    block.forward = lambda x: block._old_forward(x)
    check_llama4(monkeypatch, block, 1)
    assert integration.status(block) == {"experts": "tilewise"}


def test_llama4_blocks_that_run_their_own_code(monkeypatch: pytest.MonkeyPatch) -> None:
    def hook(block: Any) -> None:
        block.experts.register_forward_hook(lambda *_: None)

    def gradients(block: Any) -> None:
        block.router.weight.requires_grad_()

    def activation(block: Any) -> None:
        class Renamed(torch.nn.SiLU):
            pass

        block.experts.act_fn = Renamed()

    def activation_hook(block: Any) -> None:
        block.experts.act_fn.register_forward_hook(lambda *_: None)

    changes = ((hook, "experts have hooks"), (gradients, "no_grad"), (activation, "Renamed"),
               (activation_hook, "hooks or another forward"))  # fmt: skip
    for change, reason in changes:
        with pytest.warns(RuntimeWarning, match=reason):
            check_llama4(monkeypatch, llama4_block(), 0, change)

    replaced = llama4_block()
    replaced.forward = lambda x: type(replaced).forward(replaced, x)
    with pytest.warns(RuntimeWarning, match="replaced"):
        check_llama4(monkeypatch, replaced, 0)

    integration._llama4_agrees.cache_clear()
    other = llama4_block()
    with monkeypatch.context() as patch, pytest.warns(RuntimeWarning, match="not the one"):
        original = type(other).forward
        patch.setattr(
            type(other), "forward", lambda self, x: (2 * original(self, x)[0], original(self, x)[1])
        )
        check_llama4(monkeypatch, other, 0)
    integration._llama4_agrees.cache_clear()


def test_models_without_experts_are_refused() -> None:
    with pytest.raises(ValueError, match="no experts of transformers found in"):
        integration.use_tilewise(torch.nn.Linear(2, 2))


@pytest.mark.parametrize(("model", "name"), [("Qwen/Q", "'Qwen/Q'"), (None, "name")])
def test_names_are_no_models(model: Any, name: str) -> None:
    message = rf"takes a loaded model, got {model!r}: .*from_pretrained\({name}\) loads one"
    with pytest.raises(TypeError, match=message):
        integration.use_tilewise(model)


@pytest.mark.parametrize(
    ("tokens", "error"), [(-1, ValueError), (0, ValueError), ("8", TypeError), (1.5, TypeError)]
)
def test_warm_tokens_are_checked_before_anything_is_switched(
    tokens: Any, error: type[Exception]
) -> None:
    model = tiny_model()
    with pytest.raises(error, match=rf"warm_tokens={tokens!r} must be"):
        integration.use_tilewise(model, warm_tokens=tokens)
    assert set(integration.status(model).values()) == {"it is not switched on"}


def test_status_says_what_runs_and_why_not() -> None:
    model = tiny_model()
    names = [f"model.layers.{i}.mlp.experts" for i in range(2)]
    assert integration.status(model) == dict.fromkeys(names, "it is not switched on")
    integration.use_tilewise(model)
    assert integration.status(model) == dict.fromkeys(names, "tilewise")
    unknown_activation(model.get_submodule(names[1]))
    found = integration.status(model)
    assert found[names[0]] == "tilewise" and "Mish" in found[names[1]]


class Offloading:
    """As accelerate's hook: weights are on meta between calls, and loaded for each."""

    offload = True

    def __init__(self, module: Any) -> None:
        self.weights = {n: p.data for n, p in module.named_parameters()}
        module._hf_hook, inner = self, module.forward

        def forward(*args: Any) -> Any:
            self.place(module, self.weights)
            output = inner(*args)
            self.place(module, {})
            return output

        module.forward = forward
        self.place(module, {})

    def place(self, module: Any, weights: Any) -> None:
        for name, parameter in list(module.named_parameters()):
            data = weights.get(name, parameter.to("meta"))
            setattr(module, name, torch.nn.Parameter(data, requires_grad=False))


def test_status_of_offloaded_weights_is_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    experts = make_experts("qwen3_moe.Qwen3MoeExperts")
    args = inputs()
    expected = own_code(experts, *args)
    Offloading(experts)
    assert integration.status(experts) == {"": "tilewise"}
    calls = runs_tilewise(monkeypatch)
    torch.testing.assert_close(experts(*args), expected)
    assert calls
    experts.act_fn = torch.nn.Mish()
    assert "Mish" in integration.status(experts)[""]
    del experts._hf_hook
    experts.act_fn = torch.nn.SiLU()
    assert integration.status(experts)[""] == "its weights are on meta"


@pytest.mark.parametrize("family", ["qwen3", "llama4"])
def test_warming_up(monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    """As the calls come: int64 ids, and weights of the router in fp32 or in the model's dtype."""
    if family == "qwen3":
        model = tiny_model().to(torch.bfloat16)
    else:
        config = transformers.Llama4TextConfig(
            vocab_size=97, hidden_size=HIDDEN, intermediate_size=INTER, intermediate_size_mlp=INTER,
            num_local_experts=EXPERTS, num_experts_per_tok=TOP_K, num_hidden_layers=2, head_dim=16,
            num_attention_heads=2, num_key_value_heads=1, interleave_moe_layer_step=1,
            bos_token_id=1, eos_token_id=2, pad_token_id=0,
        )  # fmt: skip
        model = transformers.Llama4ForCausalLM(config).to(torch.bfloat16)
    asked: list[Any] = []
    monkeypatch.setattr(integration, "warmup", lambda shape, **o: asked.append((shape, o)))
    monkeypatch.setattr(integration, "DEVICES_TO_WARM", ("cpu",))
    calls: list[Any] = []
    original = integration.fused_experts

    def spy(x: Any, weights: Any, scales: Any, ids: Any, **options: Any) -> Any:
        calls.append((weights, scales.dtype, ids.dtype, ids.shape[1], options))
        return original(x, weights, scales, ids, **options)

    monkeypatch.setattr(integration, "fused_experts", spy)
    integration.use_tilewise(model)
    assert not asked
    integration.use_tilewise(model, warm_tokens=64)
    calls.clear()
    with torch.no_grad():
        model(torch.randint(3, 97, (1, 5)))
    assert len(asked) == 2 and len(calls) == 2, "once for layers that are alike"
    for weights, scales, ids, top_k, options in calls:
        shape, known = next(a for a in asked if a[1]["topk_weights_dtype"] == scales)
        assert (shape.num_experts, shape.top_k, known["max_tokens"]) == (EXPERTS, top_k, 64)
        assert (shape.hidden_size, shape.intermediate_size) == (HIDDEN, INTER)
        assert (known["topk_ids_dtype"], known["dtype"]) == (ids, weights.dtype)
        assert known["activation"] == options["activation"]
        on_input = options.get("apply_router_weight_on_input", False)
        assert known["apply_router_weight_on_input"] == on_input
        assert known["weights"].up.stride() == weights.up.stride()


def test_warming_up_needs_to_know_how_many_a_token_chooses(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    experts = make_experts("qwen3_moe.Qwen3MoeExperts")
    with pytest.raises(ValueError, match=r"call tilewise\.warmup yourself"):
        integration._warm(experts, 64)


def test_host_still_has_what_we_rely_on() -> None:
    """So that a rename upstream fails here, not in a server."""
    for name in ("self", "hidden_states", "top_k_index", "top_k_weights"):
        assert name in inspect.signature(moe.grouped_mm_experts_forward).parameters
    options = inspect.signature(moe.use_experts_implementation).parameters
    assert {"is_concatenated", "is_transposed", "has_bias", "has_gate"} <= set(options)
    source = inspect.getsource(moe)
    assert re.search(r"experts_class\._apply_gate = _default_apply_gate", source)
