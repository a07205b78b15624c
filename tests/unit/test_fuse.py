"""Which calls run both products in one launch, and what a caller may ask for."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.cases import layer_problem
from tilewise.dispatch.config import FewActive, KernelConfig, StreamConfig, why_illegal
from tilewise.dispatch.fuse import MEDIUM, SHORT, TALL, fuse
from tilewise.dispatch.select import choose
from tilewise.dispatch.table import shipped
from tilewise.models import MoEShape
from tilewise.moe import schedule as schedules
from tilewise.moe.explain import explain, workspace_size
from tilewise.moe.forward import problem_of
from tilewise.moe.launch import next_power_of_two
from tilewise.moe.schedule import LayerConfig, given_schedule, schedule
from tilewise.moe.workspace import buffer_sizes, num_counters
from tilewise.target import CATALOGUE, Target

H200 = CATALOGUE["sm_90"]
OLMOE = (64, 8, 2048, 1024)
DEEPSEEK = (256, 8, 7168, 2048)


@pytest.mark.parametrize(
    ("sizes", "num_tokens", "pair"),
    [
        (OLMOE, 4, None),
        (OLMOE, 5, SHORT),
        (OLMOE, 16, SHORT),
        (OLMOE, 17, None),
        (DEEPSEEK, 32, MEDIUM),
        (DEEPSEEK, 33, None),
        (OLMOE, 128, None),
        (DEEPSEEK, 128, TALL),
        (OLMOE, 300, TALL),
        (OLMOE, 320, TALL),
        (OLMOE, 321, None),
        (DEEPSEEK, 640, TALL),
        (DEEPSEEK, 641, None),
        # Too few tiles when all tokens choose alike.
        ((8, 2, 4096, 14336), 8, None),
        ((16, 1, 5120, 1024), 300, None),
        ((128, 8, 4096, 192), 8, None),
        ((1, 8, 4096, 1536), 8, None),
        # A reduction of 22.5 steps.
        ((128, 4, 2880, 2880), 8, None),
    ],
)
def test_by_size(
    sizes: tuple[int, int, int, int], num_tokens: int, pair: tuple[KernelConfig, ...] | None
) -> None:
    layer = schedule(layer_problem(num_tokens, sizes), H200)
    assert layer.fused is (pair is not None)
    if pair is not None:
        assert (layer.gate_up, layer.down) == pair
        for config, gemm in zip(pair, layer_problem(num_tokens, sizes).gemms(), strict=True):
            assert why_illegal(config, gemm, H200) is None


def test_no_cost_is_evaluated_for_a_shared_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("12 ms of host time for nothing")

    for name in ("choose", "choose_pair"):
        monkeypatch.setattr(schedules, name, refuse)
    assert schedule.__wrapped__(layer_problem(8, OLMOE), H200).fused
    with pytest.raises(AssertionError, match="for nothing"):
        schedule.__wrapped__(layer_problem(17, OLMOE), H200)


def test_only_where_measured_and_possible() -> None:
    here = layer_problem(8, OLMOE)
    assert schedule(here, H200).fused
    for other in (
        replace(here, fusable=False), replace(here, descriptors_possible=False),
        replace(here, itemsize=4), replace(here, gated=False), replace(here, batch_invariant=True),
    ):  # fmt: skip
        assert not schedule(other, H200).fused
    for arch in CATALOGUE:
        assert schedule(here, Target.from_arch(arch)).fused is (arch == "sm_90")
    assert fuse(*here.gemms(), replace(H200, shared_memory=100_000)) is not None
    assert fuse(*here.gemms(), replace(H200, shared_memory=80_000)) is None


def test_a_profile_goes_before(monkeypatch: pytest.MonkeyPatch) -> None:
    table = shipped("sm_90")
    monkeypatch.setattr("tilewise.dispatch.table.profiled", lambda *sizes: table)
    schedule.cache_clear()
    try:
        layer = schedule(layer_problem(8, OLMOE), H200)
        assert not layer.fused
        gemms = layer_problem(8, OLMOE).gemms()
        assert (layer.gate_up, layer.down) == tuple(choose(gemm, H200) for gemm in gemms)
    finally:
        schedule.cache_clear()


def test_what_can_share_a_launch() -> None:
    tile = KernelConfig(16, 64, 64, descriptors=True)
    good = LayerConfig("grouped", tile, tile, fused=True)
    assert LayerConfig.from_json(good.to_json()) == good
    assert given_schedule(good.to_json(), layer_problem(8, OLMOE), H200) == good
    for other, message in (
        (replace(tile, descriptors=False), "down must load by descriptors"),
        (replace(tile, persistent=True), "down must load by descriptors from a plain grid"),
        (replace(tile, split_k=2), "split_k=1"),
        (replace(tile, store_parts=1), "store_parts=0"),
        (replace(tile, num_warps=8), "num_warps differ: 4 and 8"),
    ):
        with pytest.raises(ValueError, match=message):
            LayerConfig("grouped", tile, other, fused=True)
    with pytest.raises(ValueError, match="leave out gate_up_few"):
        LayerConfig("grouped", tile, tile, FewActive(tile, 3), fused=True)
    with pytest.raises(TypeError, match="fused='false' must be True or False"):
        LayerConfig.from_json(good.to_json().replace('"fused": true', '"fused": "false"'))
    with pytest.raises(ValueError, match="gfx942 does not have: use fused=False"):
        given_schedule(good.to_json(), layer_problem(8, OLMOE), CATALOGUE["gfx942"])
    with pytest.raises(ValueError, match="path='decode' takes no fused: use 'grouped'"):
        LayerConfig("decode", StreamConfig(8, 64), StreamConfig(8, 64), fused=True)
    with pytest.raises(ValueError, match=r"parts of one tensor.*else use fused=False"):
        given_schedule(good.to_json(), replace(layer_problem(8, OLMOE), fusable=False), H200)


@pytest.mark.parametrize(
    ("inter", "apart", "fusable"), [(64, False, True), (64, True, False), (60, False, False)]
)
def test_which_weights_are_fusable(inter: int, apart: bool, fusable: bool) -> None:
    """Gate and up in one tensor, and activations whose rows suit a descriptor."""
    weights = torch.empty(4, 2 * 64, 128, dtype=torch.bfloat16)
    gate, up = weights[:, :inter], weights[:, inter : 2 * inter]
    if apart:
        up = torch.empty_like(gate)
    down = torch.empty(4, 128, 64, dtype=torch.bfloat16)[:, :, :inter]
    x, ids = torch.empty(3, 128, dtype=torch.bfloat16), torch.zeros(3, 2, dtype=torch.int32)
    made = problem_of(x, gate, up, down, ids, True, False)
    assert made.descriptors_possible and made.fusable is fusable
    assert problem_of(x, None, up, down, ids, True, False).fusable is (inter == 64)


def test_scratch_has_room_for_tickets() -> None:
    layer = schedule(layer_problem(8, OLMOE), H200)
    assert num_counters(layer, 64, H200) == next_power_of_two(65)
    apart = replace(layer, fused=False)
    together = buffer_sizes(layer_problem(8, OLMOE), layer, H200)
    # What is largest serves all.
    assert buffer_sizes(layer_problem(8, OLMOE), apart, H200) == together
    shape = MoEShape(*OLMOE)
    assert workspace_size(shape, 700, target=H200) >= workspace_size(shape, 600, target=H200)


def test_explain_says_so() -> None:
    text = str(explain(MoEShape(*OLMOE), 8, target=H200))
    assert "one for both products" in text and "both products in one launch" in text
    assert "one for both" not in str(explain(MoEShape(*OLMOE), 64, target=H200))
