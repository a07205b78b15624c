"""Which calls copy their rows in expert order first, and what a caller may ask for."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.cases import layer_problem
from tilewise.dispatch import select
from tilewise.dispatch.config import GroupedGemm, KernelConfig, StreamConfig, why_illegal
from tilewise.dispatch.permute import PERMUTED, permuted
from tilewise.models import MoEShape
from tilewise.moe import schedule as schedules
from tilewise.moe.explain import explain
from tilewise.moe.schedule import LayerConfig, given_schedule, schedule
from tilewise.target import CATALOGUE, Target

H200 = CATALOGUE["sm_90"]
MIXTRAL = (8, 2, 4096, 14336)


@pytest.mark.parametrize(
    ("sizes", "num_tokens", "copies"),
    [
        (MIXTRAL, 2047, False),  # Fewer than 512 rows an expert, who then has a short tile.
        (MIXTRAL, 2048, True),
        (MIXTRAL, 8192, True),
        ((16, 2, 4096, 6400), 4096, True),
        ((128, 8, 4096, 1536), 8192, False),  # The copy would take 3 to 6%.
        ((8, 2, 4096, 4096), 8192, False),
        # One expert of a shard: the bound on its rows is the batch, not what routing sends there.
        ((1, 2, 4096, 14336), 1024, False),
        ((1, 4, 6144, 10752), 128, False),
    ],
)
def test_by_size(sizes: tuple[int, int, int, int], num_tokens: int, copies: bool) -> None:
    layer = schedule(layer_problem(num_tokens, sizes), H200)
    assert layer.permuted is copies and not layer.fused
    if copies:
        gate_up, _ = layer_problem(num_tokens, sizes).gemms()
        assert layer.gate_up == PERMUTED
        assert why_illegal(PERMUTED, replace(gate_up, gathered=False), H200) is None


def test_gate_up_is_not_chosen_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """What copies its rows has its configuration: costs are evaluated for down alone."""
    chosen: list[bool] = []

    def choose(gemm: GroupedGemm, target: Target) -> KernelConfig:
        chosen.append(gemm.gathered)
        return select.choose(gemm, target)

    monkeypatch.setattr(schedules, "choose", choose)
    monkeypatch.setattr(schedules, "choose_pair", None)
    assert schedule.__wrapped__(layer_problem(8192, MIXTRAL), H200).permuted
    assert chosen == [False]


def test_only_where_measured_and_possible() -> None:
    here = layer_problem(8192, MIXTRAL)
    assert schedule(here, H200).permuted
    for other in (
        replace(here, descriptors_possible=False), replace(here, itemsize=4),
        replace(here, gated=False), replace(here, batch_invariant=True),
    ):  # fmt: skip
        assert not schedule(other, H200).permuted
    for arch in CATALOGUE:
        assert schedule(here, CATALOGUE[arch]).permuted is (arch == "sm_90")
    assert permuted(here.gemms()[0], replace(H200, shared_memory=100_000)) is None


def test_what_a_caller_may_ask_for() -> None:
    tile = KernelConfig(64, 64, 64, 8, 4, 3, descriptors=True)
    config = LayerConfig("grouped", tile, tile, permuted=True)
    assert LayerConfig.from_json(config.to_json()) == config
    assert given_schedule(config.to_json(), layer_problem(8, MIXTRAL), H200) == config
    with pytest.raises(ValueError, match="gathers its rows itself: use permuted=False"):
        replace(config, fused=True)
    with pytest.raises(TypeError, match="permuted=1 must be True or False"):
        replace(config, permuted=1)
    stream = StreamConfig(16, 64)
    with pytest.raises(ValueError, match="path='decode' takes no fused and no permuted"):
        LayerConfig("decode", stream, stream, fused=True, permuted=True)


def test_explain_counts_the_copy() -> None:
    shape, tile = MoEShape(*MIXTRAL), KernelConfig(64, 64, 64, 8, 4, 3, descriptors=True)
    config = LayerConfig("grouped", tile, tile)

    def told(layer: LayerConfig | None) -> tuple[int, str]:
        found = explain(shape, 4096, dtype=torch.bfloat16, config=layer, target=H200)
        return found.activation_bytes, str(found)

    gathered, copied = told(config), told(replace(config, permuted=True))
    assert copied[0] - gathered[0] == 2 * (4096 * 2) * 4096 * 2  # Written and read.
    assert "rows        copied in expert order first" in copied[1]
    assert "copied" not in gathered[1]
    assert "(gate+up: closed form for rows copied in expert order; down: " in told(None)[1]
