"""Scoring a choice of configuration, and regions, on rows whose answer is known."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bench import regret_score
from bench.regret import SHAPES, UNSEEN_MODELS, cells, regret
from bench.regret_score import beside
from tilewise.dispatch.config import GroupedGemm, KernelConfig
from tilewise.dispatch.features import features
from tilewise.dispatch.histogram import Histogram, expected_sizes
from tilewise.dispatch.regions import regions
from tilewise.target import Target
from tilewise.tune import fit, measure

H200 = Target.from_arch("sm_90")
SHORT = KernelConfig(16, 64, 128, num_stages=4, descriptors=True)
PROFILE = Path(regret_score.__file__).parent / "results" / "h200_profile.json"
TALL = KernelConfig(128, 128, 64, num_warps=8, num_stages=4, descriptors=True)


def make_row(shape: str, tokens: int, family: str, split: str) -> dict:
    """A row whose times follow a known cost of waves, programs and bytes."""
    s = SHAPES[shape]
    histogram = expected_sizes(family, tokens, s.top_k, s.num_experts)
    gemm = measure.product(s, "down", tokens)
    times = {}
    for config, step in ((SHORT, 0.2), (TALL, 0.9)):
        values = features(config, gemm, H200, histogram)
        times[config.name] = [4 + step * values[1] + values[5]] * 2
    return {"shape": shape, "stage": "down", "T": tokens, "routing": family, "split": split,
            "sizes": [list(histogram.sizes)], "times_us": times}  # fmt: skip


def test_rows_are_at_most_200_and_named_once() -> None:
    rows = list(cells(list(SHAPES)))
    assert len(rows) == len(set(rows)) <= 200
    assert {row.split for row in rows} == {"fit", "held_out"}


def test_a_cost_that_is_in_the_model_is_found() -> None:
    pytest.importorskip("scipy")
    rows = [
        make_row(shape, tokens, family, "fit")
        for shape in ("olmoe-1b-7b", "qwen3-30b-a3b")
        for tokens in (8, 64, 512, 4096)
        for family in ("uniform", "hot")
    ]
    table = fit.fit_stage(fit.cases_of(rows, regret_score.gemm_of), H200)
    for tokens in (24, 300, 1500):
        (case,) = fit.cases_of(
            [make_row("glm-4.5-air", tokens, "zipf", "held_out")], regret_score.gemm_of
        )
        for config, us in fit.predicted(table, case, H200).items():
            assert us == pytest.approx(case.times_us[config], rel=0.1)


def test_regret_is_judged_on_the_other_half() -> None:
    row = {"times_us": {"a": [10.0, 12.0], "b": [11.0, 11.0]}}
    # Picked by the first half "a" is 12 where "b" is 11; by the second "b" is 11 where "a" is 10.
    assert regret(row, "b") == pytest.approx((11 / 12 - 1 + 0) / 2)
    assert regret_score.noise(row) == pytest.approx((12 / 11 + 11 / 10) / 2 - 1)


def test_one_for_all_routings_by_hand() -> None:
    def row(routing: str, **times: list[float]) -> dict[str, Any]:
        return {"shape": "s", "stage": "down", "T": 8, "routing": routing, "times_us": times}

    uniform = row("uniform", a=[10.0, 10.0], b=[13.0, 13.0], c=[11.0, 11.0])
    hot = row("hot", a=[20.0, 20.0], b=[10.0, 10.0], c=[11.0, 11.0])
    # "a" loses 0 and 100%, "b" 30% and 0, "c" 10% twice: on either half.
    assert regret_score.one_for_all([uniform, hot]) == pytest.approx([0.1, 0.1])
    assert regret_score.one_for_all([uniform]) == []
    # A choice is judged over the same cases, and left out where it was not timed.
    for name, lost in (("b", [0.15, 0.15]), ("d", [])):
        config = SimpleNamespace(name=name)
        found = regret_score.one_for_all([uniform, hot], lambda row, one=config: one)
        assert found == pytest.approx(lost)
    # Picked by the first half, judged by the second, where "c" is slow.
    hot["times_us"]["c"] = [11.0, 15.0]
    first, second = regret_score.one_for_all([uniform, hot])
    assert first == pytest.approx((0.1 + 0.5) / 2) and second == pytest.approx((0.3 + 0.0) / 2)


def test_a_portfolio_keeps_what_it_must_and_reaches_the_best() -> None:
    gemm = GroupedGemm(64, 64, 8, 64, 64)
    third = KernelConfig(32, 64, 64)
    one = Histogram.of([8] * 8)
    cases = [
        fit.Case(gemm, (one,), {SHORT: 1.0, TALL: 2.0, third: 1.9}),
        fit.Case(gemm, (one,), {SHORT: 3.0, TALL: 1.0, third: 2.9}),
    ]
    assert fit.portfolio(cases, 2) == [TALL, SHORT] or fit.portfolio(cases, 2) == [SHORT, TALL]
    assert fit.portfolio(cases, 2, keep=[third])[0] == third


def test_regions_by_hand() -> None:
    few = GroupedGemm(64, 8, 128, 2048, 2048)
    found = regions(few, H200, Histogram.of([1] * 8))
    assert found["swap"].helps and not found["tall"].helps and not found["persistent"].helps
    # 8 x 16 tiles of 132 multiprocessors' worth: 132 / 256.
    assert found["split_k"].ratio == pytest.approx(132 / 256)
    many = GroupedGemm(65536, 8192, 64, 8192, 4096)
    found = regions(many, H200, Histogram.of([1024] * 64))
    assert found["tall"].helps and found["persistent"].helps and not found["tail"].helps
    slab = 8192 * 4096 * 2 / (0.9 * H200.l2_bytes)
    assert found["swizzle"].ratio == pytest.approx(slab)
    assert regions(many, H200, Histogram.of([130] * 64))["tail"].helps


def test_further_cases_are_never_scored() -> None:
    scored = {(c.shape, c.stage, c.T, c.routing) for c in cells(SHAPES) if c.split == "held_out"}
    more = list(cells(SHAPES, more=True))
    assert more and all(c.split in ("fit", "design") and c.shape not in UNSEEN_MODELS for c in more)
    assert not scored & {(c.shape, c.stage, c.T, c.routing) for c in more}
    design = next(c for c in more if c.split == "design")
    row = make_row(design.shape, design.T, "hot", "design")
    assert regret_score.groups(row) == ["design"]
    assert regret_score.fitted([row], [row]) == []


def test_what_was_measured_beside(tmp_path: Path) -> None:
    assert set(beside(tmp_path).values()) == {None}
    row = {"shape": "phi-3.5-moe", "seconds": 54.0, "cases": 44, "shipped": 1.03}
    row |= {"profiled": 1.02, "shipped_over_profiled": 1.01}
    fitted = row | {"shape": "glm-4.5-air"}
    (tmp_path / "h200_tune.json").write_text(json.dumps({"rows": [row, fitted]}))
    costs = [{"select_us": us} for us in (1.0, 2.0, 9.0)]
    (tmp_path / "h200_select_cost.json").write_text(json.dumps({"rows": costs}))
    found = beside(tmp_path)
    assert found["profiling_s"] == {"phi-3.5-moe": 54.0, "glm-4.5-air": 54.0}
    assert [one["shape"] for one in found["unseen_shapes"]] == ["phi-3.5-moe"]
    assert found["select_us"]["median"] == 2.0 and found["select_us"]["max"] == 9.0


def test_nothing_is_fitted_to_what_is_scored(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        make_row("mixtral-8x7b", tokens, family, split)
        for tokens, family, split in (
            (8, "uniform", "fit"), (128, "uniform", "fit"), (24, "zipf", "held_out"),
        )
    ]  # fmt: skip
    again = rows[0] | {"times_us": {}}
    extra = [again, make_row("mixtral-8x7b", 64, "hot", "fit"), rows[2] | {"T": 48}]
    kept = regret_score.fitted(rows, extra)
    assert [(row["T"], row["split"]) for row in kept] == [(8, "fit"), (128, "fit"), (64, "fit")]
    assert kept[0]["times_us"]  # The first one's: each case counts once.
    seen = []
    monkeypatch.setattr(regret_score, "policies", lambda given: seen.extend(given) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        regret_score.score({"rows": rows}, extra)
    assert [row["T"] for row in seen] == [8, 128, 64]


def test_what_left_the_space_is_not_scored() -> None:
    row = make_row("mixtral-8x7b", 8, "uniform", "fit")
    gone = "128x64x64 g8 w8 s2 D"
    row["times_us"][gone] = [0.1, 0.1]
    left = regret_score.in_space(row)["times_us"]
    assert gone not in left and SHORT.name in left and gone in row["times_us"]


def test_what_is_documented_is_scored_without_options(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows to fit on are those of the profile, unless they are switched off by name."""
    seen = []
    rows = {"rows": [{"file": "profile"}]}
    monkeypatch.setattr(
        regret_score, "load", lambda parser, path, keys: rows if path == PROFILE else {"rows": []}
    )
    monkeypatch.setattr(regret_score, "score", lambda data, extra: seen.append(extra) or 1 / 0)
    for arguments in ([], ["--extra", str(PROFILE)], ["--extra", "none"]):
        monkeypatch.setattr(sys, "argv", ["regret_score", *arguments])
        with pytest.raises(ZeroDivisionError):
            regret_score.main()
    assert seen == [rows["rows"], rows["rows"], []]
