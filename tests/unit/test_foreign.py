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
