"""Scratch memory: what a large call has is enough for every smaller one."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tilewise.dispatch.config import KernelConfig, fit, why_illegal
from tilewise.models import MODELS, MoEShape
from tilewise.moe.explain import workspace_size
from tilewise.moe.schedule import LayerConfig, LayerProblem, given_schedule, schedule
from tilewise.moe.workspace import buffer_sizes, split_sizes
from tilewise.target import CATALOGUE, Target

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
    assert partials == target.num_sms * config.block_m * config.block_n * 2
    ints, _, _, sums = buffer_sizes(problem, layer, target)
    assert ints >= 4 * counters
    assert sums == 4 * partials


def test_batch_invariant_calls_share_none() -> None:
    problem = LayerProblem(8, 8, 128, 4096, 192, 2, True, True, batch_invariant=True)
    for arch in ("sm_90", "sm_100", "gfx942"):
        layer = schedule(problem, CATALOGUE[arch])
        assert layer.gate_up.split_k == layer.down.split_k == 1
    shared = schedule(replace(problem, batch_invariant=False), CATALOGUE["sm_90"])
    with pytest.raises(ValueError, match=r"config.gate_up.split_k=4: .* takes split_k=1"):
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
