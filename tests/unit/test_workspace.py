"""Scratch memory: what a large call has is enough for every smaller one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import tilewise
from tilewise.dispatch.config import KernelConfig, StreamConfig, fit, why_illegal
from tilewise.models import MODELS, MoEShape
from tilewise.moe.experts import suits_rows
from tilewise.moe.explain import workspace_size
from tilewise.moe.plan import carve_counts, carve_plan, count_ints, plan_into, plan_ints
from tilewise.moe.schedule import LayerConfig, LayerProblem, given_schedule, schedule
from tilewise.moe.workspace import buffer_sizes, split_sizes
from tilewise.ragged import Ragged
from tilewise.target import CATALOGUE, CPU, Target

NARROW = MoEShape(128, 8, 4096, 192)


@pytest.mark.parametrize("arch", ["sm_90", "sm_89", "gfx942"])
@pytest.mark.parametrize("shape", [NARROW, MODELS["mixtral-8x7b"], MoEShape(64, 8, 2048, 1024)])
def test_no_smaller_call_needs_more(shape: MoEShape, arch: str) -> None:
    target = Target.from_arch(arch)
    tokens = [*range(1, 300), 511, 512, 513, 2048, 4095, 4096, 4097, 8192, 16384, 16385]
    sizes = [workspace_size(shape, count, target=target) for count in tokens]
    assert sizes == sorted(sizes)


def test_narrow_layers_share_reductions_on_hopper() -> None:
    """Otherwise the test above would hold of nothing."""
    target = CATALOGUE["sm_90"]
    problem = LayerProblem(8, 8, 128, 4096, 192, 2, True, True)
    layer = schedule(problem, target)
    counters, partials = split_sizes(problem, layer, target)
    assert counters >= 2 * target.num_sms
    config = layer.gate_up
    programs = target.num_sms * config.occupancy
    assert partials == programs * config.block_m * config.block_n * 2
    ints, _, _, sums = buffer_sizes(problem, layer, target)
    assert ints >= 4 * counters
    assert sums == 4 * partials


def test_batch_invariant_calls_share_none() -> None:
    problem = LayerProblem(8, 8, 128, 4096, 192, 2, True, True, batch_invariant=True)
    for arch in ("sm_90", "sm_100", "gfx942"):
        layer = schedule(problem, CATALOGUE[arch])
        assert layer.gate_up.split_k == layer.down.split_k == 1
    shared = schedule(replace(problem, batch_invariant=False), CATALOGUE["sm_90"])
    with pytest.raises(ValueError, match=r"config.gate_up.split_k=\d: .* takes split_k=1"):
        given_schedule(shared.to_json(), problem, CATALOGUE["sm_90"])


def test_tails_wait_for_machines_whose_bits_do_not_depend_on_the_tile() -> None:
    tails = LayerConfig("grouped", *[KernelConfig(64, 64, 32, tail_m=16)] * 2)
    problem = LayerProblem(8, 8, 128, 4096, 192, 2, True, True, batch_invariant=True)
    assert given_schedule(tails.to_json(), problem, CATALOGUE["sm_90"]) == tails
    for arch, itemsize in (("sm_80", 2), ("sm_100", 2), ("sm_90", 4)):
        with pytest.raises(ValueError, match=r"tail_m=16: .* takes tail_m=0"):
            given_schedule(tails.to_json(), replace(problem, itemsize=itemsize), CATALOGUE[arch])


def test_weights_with_padded_rows_are_reckoned_with() -> None:
    """From sizes alone no descriptor suits H=1412; with rows 1416 apart one does."""
    shape, target = MoEShape(128, 8, 1412, 192), CATALOGUE["sm_90"]
    problem = LayerProblem(8, 8, 128, 1412, 192, 2, True, True)
    needed = sum(buffer_sizes(problem, schedule(problem, target), target))
    assert needed <= workspace_size(shape, 8, target=target)


def test_amd_shares_no_reduction() -> None:
    gemm, target = LayerProblem(8, 8, 128, 4096, 192, 2, True, True).gemms()[0], CATALOGUE["gfx942"]
    wish = KernelConfig(16, 64, 32, split_k=4)
    assert "never tested" in str(why_illegal(wish, gemm, target))
    assert fit(wish, gemm, target).split_k == 1


@pytest.mark.parametrize("num_experts", [1, 7, 130])
@pytest.mark.parametrize("num_ids", [1, 2050, 4096, 4099, 9001, 40003])
def test_parts_of_a_plan_are_aligned_and_apart(num_ids: int, num_experts: int) -> None:
    """What follows the plan is aligned too: counters of shared reductions, whatever the sizes."""
    size = plan_ints(num_ids, num_experts)
    buffer = torch.zeros(size, dtype=torch.int32)
    ragged = carve_plan(buffer, num_ids, num_experts)
    counts = carve_counts(buffer, num_ids, num_experts)
    assert len(counts) == count_ints(num_ids, num_experts)
    assert size % 4 == 0
    for part in (ragged.sizes, ragged.offsets, ragged.gather, ragged.scatter, counts):
        assert part.storage_offset() % 4 == 0
        part += 1
    assert buffer.max() == 1


def test_more_assignments_than_kernels_count_are_refused() -> None:
    ids = torch.empty((2**30, 2), dtype=torch.int32, device="meta")
    ints = torch.empty(1, dtype=torch.int32, device="meta")
    with pytest.raises(ValueError, match=r"2147483648 elements, one call takes up to 2147482624"):
        plan_into(Ragged(ints, ints, ints, ints), ints, ids, 8, None)


def test_more_rows_than_a_ragged_descriptor_holds_go_by_pointers() -> None:
    assert suits_rows(torch.empty(2**30, 8, dtype=torch.bfloat16, device="meta"))
    assert not suits_rows(torch.empty(2**30 + 1, 8, dtype=torch.bfloat16, device="meta"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": 0}, "max_tokens=0 must be at least 1"),
        ({"max_tokens": 1.5}, "max_tokens=1.5 must be an integer"),
        ({"dtype": "bf16"}, "dtype='bf16' must be torch.bfloat16"),
        ({"dtype": torch.float8_e4m3fn}, "must be torch.bfloat16"),
        ({"activation": "swiglu"}, "must be a tilewise.Activation"),
        ({"config": "grouped"}, "config='grouped' must be a tilewise.LayerConfig"),
        ({"max_tokens": "64"}, "max_tokens='64' must be an integer"),
        ({"topk_ids_dtype": torch.int16}, "=torch.int16 must be torch.int32 or torch.int64"),
        ({"topk_weights_dtype": torch.float64}, "topk_weights_dtype=torch.float64 must be .*32$"),
        ({"topk_weights_dtype": "fp32"}, "topk_weights_dtype='fp32' must be .*, got a str"),
        ({"expert_map": torch.zeros(2)}, "expert_map=tensor.* must be True or False"),
        ({"reduce": "sum"}, "reduce='sum' must be True or False"),
        ({"device": "nowhere"}, "device='nowhere' is no device of torch: use \"cuda\""),
    ],
    ids=str,
)
def test_warmup_refuses(options: dict[str, Any], message: str) -> None:
    wrong_value = "device" in options or isinstance(*options.values(), (int, torch.dtype))
    with pytest.raises(ValueError if wrong_value else TypeError, match=message):
        tilewise.warmup(NARROW, **options)


def test_warmup_refuses_names_and_machines_that_are_not_there() -> None:
    for shapes in ("olmoe-1b-7b", ["olmoe-1b-7b"]):
        with pytest.raises(TypeError, match=r"got 'olmoe-1b-7b': .*moe_shape\('olmoe-1b-7b'\)"):
            tilewise.warmup(shapes)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"takes MoEShapes, got 3: tilewise.moe_shape\(name\)"):
        tilewise.warmup(3)  # type: ignore[arg-type]
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match=r"device='cuda': torch .* finds no GPU here"):
            tilewise.warmup(NARROW, device="cuda")


@pytest.mark.parametrize("spoil", ["short", "dtype", "misaligned", "strided"])
def test_workspaces_are_checked_on_a_cpu_too(spoil: str) -> None:
    shape = MoEShape(8, 2, 64, 32)
    weights = tilewise.ExpertWeights.from_gate_up(torch.randn(8, 64, 64), torch.randn(8, 64, 32))
    x, ids = torch.randn(5, 64), torch.zeros(5, 2, dtype=torch.int32)
    size = tilewise.workspace_size(shape, 5, dtype=torch.float32)
    good = torch.empty(2 * size + 16, dtype=torch.uint8)
    good = good[-good.data_ptr() % 16 :]
    out, gates = torch.empty_like(x), torch.rand(5, 2)
    tilewise.fused_experts(x, weights, gates, ids, out=out, workspace=good)
    bad = {
        "short": good[: size // 2], "dtype": good[: size // 4 * 4].view(torch.int8),
        "misaligned": good[1:], "strided": good[::2],
    }[spoil]  # fmt: skip
    with pytest.raises(ValueError, match="workspace"):
        tilewise.fused_experts(x, weights, gates, ids, out=out, workspace=bad)


GROUPED = LayerConfig("grouped", *[KernelConfig(16, 32, 32, split_k=2, occupancy=2)] * 2)
DECODE = LayerConfig("decode", *[StreamConfig(16, 32)] * 2)


@pytest.mark.parametrize(
    ("config", "num_tokens"), [(DECODE, 5), (GROUPED, 1)], ids=["less", "more"]
)
def test_a_given_configuration_sizes_workspaces_on_a_cpu_too(
    config: LayerConfig, num_tokens: int
) -> None:
    """A configuration that needs less than the chosen one gets by with less, and the reverse."""
    shape = MoEShape(8, 2, 64, 32)
    weights = tilewise.ExpertWeights.from_gate_up(torch.randn(8, 64, 64), torch.randn(8, 64, 32))
    x, ids = torch.randn(num_tokens, 64), torch.zeros(num_tokens, 2, dtype=torch.int32)
    out, gates = torch.empty_like(x), torch.rand(num_tokens, 2)
    options = {"dtype": torch.float32, "target": CPU}
    size = workspace_size(shape, num_tokens, config=config, **options)  # type: ignore[arg-type]
    chosen = workspace_size(shape, num_tokens, **options)  # type: ignore[arg-type]
    assert (size < chosen) is (config is DECODE)
    workspace = torch.empty(size, dtype=torch.uint8)

    def run(workspace: torch.Tensor) -> None:
        tilewise.fused_experts(x, weights, gates, ids, out=out, workspace=workspace, config=config)

    run(workspace)
    with pytest.raises(ValueError, match=f"workspace has {size - 1} bytes, .* needs {size}"):
        run(workspace[:-1])
