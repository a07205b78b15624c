"""A foreign kernel's choice on made-up rows: no GPU, no vLLM."""

from __future__ import annotations

import random

import pytest
import torch

pytest.importorskip("scipy")

from bench import foreign
from bench.regret import SHAPES
from tilewise.dispatch.config import KernelConfig
from tilewise.dispatch.histogram import Histogram
from tilewise.target import Target
from tilewise.tune.routings import expert_ids, sizes_of

H200 = Target.from_arch("sm_90")


def test_sixty_configurations_in_vllms_words() -> None:
    configs = foreign.configurations()
    assert len({config.name for config in configs}) == 60
    assert foreign.as_vllm(KernelConfig(64, 128, 32, 16, 8, 4)) == {
        "BLOCK_SIZE_M": 64, "BLOCK_SIZE_N": 128, "BLOCK_SIZE_K": 32, "GROUP_SIZE_M": 16,
        "num_warps": 8, "num_stages": 4,
    }  # fmt: skip


def test_costs_find_the_best_where_times_follow_the_grid() -> None:
    dice = random.Random(0)
    configs = foreign.configurations()[::4]
    rows = []
    for name, tokens, routing, split in foreign.cells():
        shape = SHAPES[name]
        ids = expert_ids(routing, tokens, shape, torch.Generator().manual_seed(tokens))
        sizes = sizes_of(ids, shape.num_experts)
        times = {}
        for config in configs:
            values = foreign.described(config, shape, tokens, Histogram.of(sizes), H200)
            us = 5 + 0.2 * config.block_m**0.3 * values[1] + values[5]
            times[config.name] = [us * dice.uniform(0.998, 1.002) for _ in range(2)]
        rows.append({"shape": name, "T": tokens, "routing": routing, "split": split,
                     "sizes": [sizes], "times_us": times, "vllm": configs[0].name})  # fmt: skip
    found = foreign.score(rows, H200)
    held_out = {policy: by["held_out"] for policy, by in found["regret"].items()}
    assert held_out["by histogram"]["mean"] < 0.01 < held_out["vllm"]["mean"]
    assert held_out["by histogram"]["rows"] == 18
    assert all(gain >= 0.99 for gain in found["speed_over_vllm_choice"]["by histogram"].values())


def test_costs_see_fitted_rows_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def costs(rows: list, target: Target) -> None:
        seen.extend(rows)
        raise ZeroDivisionError

    monkeypatch.setattr(foreign, "Costs", costs)
    with pytest.raises(ZeroDivisionError):
        foreign.score([{"split": "fit"}, {"split": "held_out"}], H200)
    assert seen == [{"split": "fit"}]


def test_cross_validation_holds_out_whole_folds_of_fitted_rows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = foreign.configurations()[0]
    rows = [
        {"shape": shape, "T": tokens, "routing": routing, "split": split, "sizes": [[1]],
         "times_us": {config.name: [1.0, 1.0]}}
        for shape, tokens, routing, split in foreign.cells()
    ]  # fmt: skip
    fits = []

    class Costs:
        def __init__(self, fitted: list, target: Target) -> None:
            fits.append(fitted)

        def of(self, *case: object) -> dict[KernelConfig, float]:
            return {config: 1.0}

    monkeypatch.setattr(foreign, "Costs", Costs)
    found = foreign.cross_validate(rows, H200)
    assert {name: by["rows"] for name, by in found.items()} == dict.fromkeys(foreign.FOLDS, 36)
    assert len(fits) == 3 + 12 + 4 + 3 + 36
    assert all(row["split"] == "fit" for fitted in fits for row in fitted)
    assert [{row["shape"] for row in fitted} for fitted in fits[:3]] == [
        set(foreign.FITTED) - {shape} for shape in foreign.FITTED
    ]


@pytest.mark.parametrize(
    ("name", "programs"),
    [
        ("16x64x128 g1 w4 s4", 3), ("16x128x64 g16 w8 s3", 4), ("32x128x64 g16 w8 s3", 3),
        ("64x64x64 g1 w4 s4", 3), ("64x128x64 g16 w4 s3", 3), ("128x128x64 g1 w4 s4", 1),
        ("128x128x64 g16 w8 s3", 2), ("128x128x64 g1 w8 s4", 1), ("128x256x64 g16 w8 s3", 1),
    ],
)  # fmt: skip
def test_programs_of_a_multiprocessor_as_compiled(name: str, programs: int) -> None:
    assert foreign.programs_per_sm(KernelConfig.from_name(name), H200) == programs


def test_weights_are_read_again_by_groups_that_run_apart() -> None:
    wide, long = foreign.products(SHAPES["mixtral-8x7b"], 512)
    sizes = Histogram.of([512, 512, 0, 1])
    alone, grouped = KernelConfig(64, 128, 64, 1), KernelConfig(64, 128, 64, 16)
    assert foreign.weight_reads(alone, wide, H200, sizes) == 8 + 8 + 1
    assert foreign.weight_reads(grouped, wide, H200, sizes) == 3
    assert foreign.weight_reads(alone, long, H200, sizes) == 3  # All groups run at once.
    in_l2 = foreign.products(SHAPES["qwen3-30b-a3b"], 512)[0]
    assert foreign.weight_reads(alone, in_l2, H200, sizes) == 3


def test_few_rows_stay_near_the_costs_that_configurations_share() -> None:
    common, row = (2.0, 3.0), (1.0, 1.0)
    assert foreign.near(common, [row], [5.0], [1.0]) == pytest.approx(common)
    apart = foreign.near(common, [row], [8.0], [1.0])
    assert 5.0 < sum(apart) < 8.0 and min(apart) >= 2.0
    rows = [(1.0, float(n)) for n in range(4)] * 50
    found = foreign.near(common, rows, [5 + 7 * n for _, n in rows], [1.0] * len(rows))
    assert found == pytest.approx((5.0, 7.0), rel=0.05)
