"""Tiny random models of nine families: logits against the model's own experts, code that ran."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5.10")

from tests.integrations.test_transformers import runs_tilewise, scaled  # noqa: E402
from tilewise.integrations import record  # noqa: E402
from tilewise.integrations import transformers as integration  # noqa: E402

EXPERTS, TOP_K, LAYERS = 6, 2, 2
# Hidden and intermediate size: one that kernels must mask, one that they need not.
SIZES = {"ragged": (40, 24), "multiples_of_16": (64, 32)}

LOCAL = {"num_local_experts": EXPERTS}
NUM = {"num_experts": EXPERTS}
ROUTED = {
    "n_routed_experts": EXPERTS, "n_shared_experts": 1, "n_group": 3, "topk_group": 2,
    "first_k_dense_replace": 0, "routed_scaling_factor": 1.5,
}  # fmt: skip
LATENT = {
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8,
    "v_head_dim": 16, "num_key_value_heads": 2,
}  # fmt: skip

# Family -> options, and what its config calls the experts' size.
FAMILIES: dict[str, tuple[dict[str, Any], str]] = {
    "Mixtral": (LOCAL, "intermediate_size"),
    "Qwen2Moe": (NUM | {"shared_expert_intermediate_size": 24}, "moe_intermediate_size"),
    "Qwen3Moe": (NUM | {"head_dim": 16}, "moe_intermediate_size"),
    "Olmoe": (NUM, "intermediate_size"),
    # Its other method fails in 5.10, in the router, which is the model's own.
    "DeepseekV2": (
        ROUTED | LATENT | {"topk_method": "greedy"},
        "moe_intermediate_size",
    ),
    "DeepseekV3": (ROUTED | LATENT, "moe_intermediate_size"),
    "GptOss": (LOCAL | {"head_dim": 16}, "intermediate_size"),
    "Llama4": (
        LOCAL | {"head_dim": 16, "interleave_moe_layer_step": 1, "intermediate_size_mlp": 24},
        "intermediate_size",
    ),
    "Glm4Moe": (ROUTED | {"head_dim": 16}, "moe_intermediate_size"),
}


def tiny(family: str, size: str = "ragged", layers: int = LAYERS) -> Any:
    """A model whose gates clamp, where they do, about a third of their values."""
    config_name = f"{family}TextConfig" if family == "Llama4" else f"{family}Config"
    make = getattr(transformers, config_name, None)
    if make is None:
        pytest.skip(f"this transformers has no {config_name}")
    options, inter = FAMILIES[family]
    hidden_size, intermediate_size = SIZES[size]
    common = {
        "vocab_size": 97, "hidden_size": hidden_size, "num_hidden_layers": layers,
        "num_attention_heads": 2, "num_key_value_heads": 1, "num_experts_per_tok": TOP_K,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, inter: intermediate_size,
    }  # fmt: skip
    model = getattr(transformers, f"{family}ForCausalLM")._from_config(make(**common | options))
    for module in model.modules():
        if hasattr(module, "limit") and hasattr(module, "alpha"):
            module.limit = 0.5
    model.set_experts_implementation("eager")
    return scaled(model).eval()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_logits(
    monkeypatch: pytest.MonkeyPatch, device: str, family: str, size: str, dtype: torch.dtype
) -> None:
    # In bf16 a second router would see rounded values and choose others among near equals.
    layers = LAYERS if dtype is torch.float32 else 1
    model = tiny(family, size, layers).to(device, dtype)
    inputs = [torch.randint(97, shape, device=device) for shape in ((2, 9), (1, 1))]
    with torch.no_grad():
        expected = [model(ids).logits for ids in inputs]
    integration.use_tilewise(model)
    assert set(integration.status(model).values()) == {"tilewise"}
    calls = runs_tilewise(monkeypatch)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        actual = [model(ids).logits for ids in inputs]
    assert len(calls) == layers * len(inputs), "every layer is ours"
    for ours, theirs in zip(actual, expected, strict=True):
        if dtype is torch.float32:
            tolerance = 1e-4 if device == "cpu" else 1e-3
            torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
        else:
            assert (ours - theirs).float().norm() <= 2e-2 * theirs.float().norm()


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_matter(monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    """The comparison above can fail: experts that are off by 1% show in the logits."""
    model = integration.use_tilewise(tiny(family))
    ids = torch.randint(97, (2, 9))
    with torch.no_grad():
        expected = model(ids).logits
        original = integration.fused_experts
        monkeypatch.setattr(integration, "fused_experts", lambda *a, **k: original(*a, **k) * 1.01)
        assert not torch.allclose(model(ids).logits, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("family", ["Mixtral", "GptOss", "Llama4"])
@pytest.mark.parametrize("ours", [True, False], ids=["tilewise", "eager"])
def test_recording(tmp_path: Path, device: str, family: str, ours: bool) -> None:
    model = tiny(family).to(device)
    if ours:
        integration.use_tilewise(model)
    prompts = torch.randint(3, 97, (2, 5), device=device)
    model.generation_config.eos_token_id = None
    mask = torch.ones_like(prompts)
    with record.recording(model) as trace:
        model.generate(prompts, attention_mask=mask, max_new_tokens=3, do_sample=False)
    with torch.no_grad():
        model(prompts)  # Not recorded.
    assert [call.num_tokens for call in trace] == [10, 10, 2, 2, 2, 2]
    names = [call.layer for call in trace]
    assert names == names[:LAYERS] * 3 and len(set(names)) == LAYERS
    assert all(name in dict(model.named_modules()) for name in names)
    for call in trace:
        assert (call.num_experts, call.top_k, call.ids.device.type) == (EXPERTS, TOP_K, device)
        assert int(call.ids.min()) >= 0 and int(call.ids.max()) < EXPERTS
        assert bool((call.ids[:, 0] != call.ids[:, 1]).all())
    trace.save(tmp_path / "trace.safetensors")
    loaded = record.Trace.load(tmp_path / "trace.safetensors")
    assert len(loaded) == len(trace) == 6
    for a, b in zip(loaded, trace, strict=True):
        assert (a.layer, a.num_experts, a.num_tokens) == (b.layer, b.num_experts, b.num_tokens)
        assert a.ids.dtype == torch.int32 and torch.equal(a.ids, b.ids.cpu())


def test_both_implementations_record_the_same() -> None:
    for family in ("Qwen3Moe", "Llama4"):
        model, ids = tiny(family), torch.randint(97, (1, 7))
        with torch.no_grad(), record.recording(model) as theirs:
            model(ids)
        integration.use_tilewise(model)
        with torch.no_grad(), record.recording(model) as ours:
            model(ids)
        for a, b in zip(ours, theirs, strict=True):
            assert a.layer == b.layer and torch.equal(a.ids, b.ids)


def test_recorded_ids_are_copies_made_without_a_sync(device: str) -> None:
    class Experts(torch.nn.Module):
        """As transformers marks the ones that it dispatches."""

        is_concatenated, num_experts = True, EXPERTS

        def _apply_gate(self) -> None: ...

        def forward(self, x: torch.Tensor, router_indices: torch.Tensor) -> torch.Tensor:
            router_indices.zero_()
            return x

    x = torch.randn(3, 8, device=device)
    ids = torch.randint(1, EXPERTS, (3, TOP_K), dtype=torch.int32, device=device)
    before, experts = ids.tolist(), Experts()
    with record.recording(experts) as trace:
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("error")
        try:
            experts(x, router_indices=ids)
        finally:
            if device == "cuda":
                torch.cuda.set_sync_debug_mode("default")
    assert trace.calls[0].ids.tolist() == before
    assert not experts._forward_pre_hooks


def test_recording_bounds_what_it_keeps_on_a_device(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved: list[int] = []
    recorder = record._Recorder(device_bytes=100)
    ids = torch.zeros((2, 4), dtype=torch.int32, device=device if device == "cuda" else "meta")

    def to_host(tensor: torch.Tensor) -> torch.Tensor:
        moved.append(len(recorder))
        return torch.zeros(tensor.shape, dtype=tensor.dtype)

    monkeypatch.setattr(torch.Tensor, "cpu", to_host)
    for _ in range(9):  # 32 bytes each: the fourth and the eighth are too many.
        recorder.add(record.Call("experts", EXPERTS, ids))
    assert moved == [4] * 4 + [8] * 4
    assert [call.ids.device.type for call in recorder] == ["cpu"] * 8 + [ids.device.type]


def test_recording_nothing_is_an_error() -> None:
    model, ids = integration.use_tilewise(tiny("Qwen3Moe")), torch.randint(97, (1, 7))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        compiled(ids)
    with (
        torch.no_grad(),
        pytest.raises(RuntimeError, match="compiled before"),
        record.recording(model),
    ):
        compiled(ids)
    with pytest.raises(RuntimeError, match="did not run it"), record.recording(model):
        pass
    with pytest.raises(KeyError), record.recording(model):  # The block's own error comes through.
        raise KeyError


def test_recording_needs_experts(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no experts"), record.recording(torch.nn.Linear(2, 2)):
        pass
    from safetensors.torch import save_file

    save_file({"0": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="no trace"):
        record.Trace.load(tmp_path / "other.safetensors")
    record.Trace().save(tmp_path / "empty.safetensors")
    assert len(record.Trace.load(tmp_path / "empty.safetensors")) == 0
