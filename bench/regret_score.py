"""Scores choices of configuration on the rows of ``bench.regret`` that nothing was fitted to.

``python -m bench.regret_score FILE --extra FILE2`` fits on the rows marked "fit" of both, chooses
by every policy, and adds "chosen", "summary" and the times of fitting to the first; rows of the
second marked "design" are summed up too. The second is ``results/h200_profile.json`` if none is
named; ``--extra none`` fits on the first alone. A regret is cross-validated: the oracle is picked
on one half of the samples, both are judged on the other.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench import foreign
from bench.regret import OUT, SHAPES, UNSEEN_MODELS, Row, mean_us, quantiles, regret
from bench.results import TIMED, load
from tilewise.dispatch.config import FewActive, GroupedGemm, KernelConfig
from tilewise.dispatch.features import FEATURES, features
from tilewise.dispatch.histogram import Histogram, expected_sizes
from tilewise.dispatch.rules import rule
from tilewise.dispatch.select import bucketed, idle_us, pair, robust
from tilewise.dispatch.space import space
from tilewise.dispatch.table import StageTable
from tilewise.target import Target
from tilewise.tune import fit, measure

Policy = Callable[[Row], KernelConfig]
STATIC = "tilewise_static"
COUNTED = "tilewise_dynamic"  # Its times hold the launch that had nothing to do.
TARGET = Target.from_arch("sm_90")
EXTRA = OUT.parent / "h200_profile.json"


def gemm_of(row: Row) -> GroupedGemm:
    """The product of a row."""
    return measure.product(SHAPES[row["shape"]], row["stage"], row["T"])


def noise(row: Row) -> float:
    """The regret of the fastest by one half, judged by the other: what no policy can undercut."""
    times = row["times_us"]
    first, second = (min(times, key=lambda n: times[n][half]) for half in (0, 1))
    return (times[first][1] / times[second][1] + times[second][0] / times[first][0]) / 2 - 1


def ramp(rows: Sequence[Row], *, relative: bool) -> Policy:
    """RaMP's a + b g/SM + c g + d ln(1+g), least squares for each configuration and shape.

    On one machine g/SM and g are one column, so its waves are rounded up. A shape without rows of
    its own takes the fit over all.
    """
    wave, grid = FEATURES.index("waves"), FEATURES.index("grid")

    def design(row: Row, config: KernelConfig) -> list[float]:
        values = features(config, gemm_of(row), TARGET, Histogram.of(row["sizes"][0]))
        programs = values[grid] * 1e3
        return [1.0, values[wave], programs, math.log1p(programs)]

    solved: dict[tuple[str, str | None, str], np.ndarray] = {}
    for stage in measure.STAGES:
        for shape in (None, *SHAPES):
            of = [r for r in rows if r["stage"] == stage and shape in (None, r["shape"])]
            for name in dict.fromkeys(n for r in of for n in r["times_us"]):
                have = [r for r in of if name in r["times_us"]]
                if len(have) < 5:
                    continue
                config = KernelConfig.from_name(name)
                matrix = np.array([design(r, config) for r in have])
                times = np.array([mean_us(r, name) for r in have])
                weight = 1 / times if relative else np.ones_like(times)
                solution = np.linalg.lstsq(matrix * weight[:, None], times * weight, rcond=None)
                solved[stage, shape, name] = solution[0]

    def choose(row: Row) -> KernelConfig:
        known = any((row["stage"], row["shape"], name) in solved for name in row["times_us"])
        shape = row["shape"] if known else None
        cost = {}
        for name in row["times_us"]:
            coefficients = solved.get((row["stage"], shape, name))
            if coefficients is not None:
                config = KernelConfig.from_name(name)
                cost[config] = float(np.dot(design(row, config), coefficients))
        return min(cost, key=cost.__getitem__)

    return choose


def nearest(rows: Sequence[Row]) -> Policy:
    """What was fastest at the nearest fitted row, as an exemplar-based choice does (DA-MoE)."""
    cases = {s: fit.cases_of([r for r in rows if r["stage"] == s], gemm_of) for s in measure.STAGES}

    def choose(row: Row) -> KernelConfig:
        (here,) = fit.cases_of([row], gemm_of)

        def distance(case: fit.Case) -> float:
            return sum((a - b) ** 2 for a, b in zip(case.place, here.place, strict=True))

        ranked = sorted(cases[row["stage"]], key=distance)
        for case in ranked:
            best = min(case.times_us, key=case.times_us.__getitem__)
            if best in here.times_us:
                return best
        raise ValueError("no fitted row shares a configuration")

    return choose


def identity(row: Row) -> tuple[Any, ...]:
    """What a row measures."""
    return row["shape"], row["stage"], row["T"], row["routing"]


def in_space(row: Row) -> dict[str, Any]:
    """A row without what has left the space since it was timed."""
    gemm = gemm_of(row)
    ruled = {rule(gemm, TARGET), rule(bucketed(gemm), TARGET)}
    kept = {config.name for config in {*space(gemm, TARGET), *ruled}}
    return {**row, "times_us": {n: v for n, v in row["times_us"].items() if n in kept}}


def fitted(rows: Sequence[Row], extra: Sequence[Row]) -> list[Row]:
    """The rows that costs may be fitted to, each case once, the first one's times."""
    cases: dict[tuple[Any, ...], Row] = {}
    for row in [*rows, *map(in_space, extra)]:
        if row["split"] == "fit":
            cases.setdefault(identity(row), row)
    return list(cases.values())


def policies(
    rows: Sequence[Row],
) -> tuple[dict[str, Policy], Callable[[Row], float], float]:
    """Every policy fitted on these rows, what COUNTED pays, the seconds that our own fit took."""
    began = time.monotonic()
    full: dict[str, StageTable] = {}
    shipped: dict[str, StageTable] = {}
    for stage in measure.STAGES:
        cases = fit.cases_of([r for r in rows if r["stage"] == stage], gemm_of)
        ruled = [rule(case.gemm, TARGET) for case in cases]
        full[stage] = fit.fit_stage(cases, TARGET)
        shipped[stage] = fit.fit_stage(cases, TARGET, fit.portfolio(cases, keep=ruled))
    seconds = time.monotonic() - began

    def model(row: Row) -> KernelConfig:
        (case,) = fit.cases_of([row], gemm_of)
        cost = fit.predicted(full[row["stage"]], case, TARGET)
        timed = {c: v for c, v in cost.items() if c in case.times_us}
        return min(timed, key=timed.__getitem__)

    def uniform(row: Row) -> KernelConfig:
        shape = SHAPES[row["shape"]]
        histogram = expected_sizes("uniform", row["T"], shape.top_k, shape.num_experts)
        cost = full[row["stage"]].costs(gemm_of(row), TARGET, histogram)
        timed = {c: v for c, v in cost.items() if c.name in row["times_us"]}
        return min(timed, key=timed.__getitem__)

    def pair_of(row: Row) -> tuple[KernelConfig, FewActive | None]:
        return pair(shipped[row["stage"]], bucketed(gemm_of(row)), TARGET)

    def dynamic(row: Row) -> KernelConfig:
        many, few = pair_of(row)
        active = Histogram.of(row["sizes"][0]).active
        return few.config if few is not None and active <= few.up_to else many

    def idle(row: Row) -> float:
        many, few = pair_of(row)
        if few is None:
            return 0.0
        gemm = gemm_of(row)
        if dynamic(row) == many:
            return idle_us(few.config, gemm, TARGET, few.up_to)
        return idle_us(many, gemm, TARGET, gemm.num_segments)

    chosen = {
        "tilewise_model": model,
        STATIC: lambda row: robust(shipped[row["stage"]], bucketed(gemm_of(row)), TARGET),
        COUNTED: dynamic,
        "uniform_static": uniform,
        "ramp": ramp(rows, relative=False),
        "ramp_relative": ramp(rows, relative=True),
        "nearest": nearest(rows),
        "rule": lambda row: rule(gemm_of(row), TARGET),
    }
    return chosen, idle, seconds


def groups(row: Row) -> list[str]:
    """The groups that a row is summed up in."""
    if row["split"] != "held_out":
        return [row["split"]]
    unseen = row["shape"] in UNSEEN_MODELS
    return ["held out", "unseen model" if unseen else "unseen tokens and routings"]


def score(data: dict[str, Any], extra: Sequence[Row] = ()) -> dict[str, Any]:
    """Adds to each row what every policy chose, and returns the summary."""
    rows = [in_space(row) for row in data["rows"]]
    chosen_by, idle, seconds = policies(fitted(rows, extra))
    regrets: dict[str, dict[str, list[float]]] = {}
    gains: dict[str, list[float]] = {}
    slower = []
    for raw, row in zip(data["rows"], rows, strict=True):
        row["chosen"] = raw["chosen"] = {}
        for policy, choose in chosen_by.items():
            name = choose(row).name
            if name not in row["times_us"]:
                continue
            paid = idle(row) if policy == COUNTED else 0.0
            took_us = round(mean_us(row, name) + paid, 2)
            row["chosen"][policy] = {"config": name, "us_net": took_us}
            for group in groups(row):
                value = regret(row, name) + paid / mean_us(row, name)
                regrets.setdefault(policy, {}).setdefault(group, []).append(value)
        took = {policy: one["us_net"] for policy, one in row["chosen"].items()}
        band = "T<=32" if row["T"] <= 32 else "T<=512" if row["T"] <= 512 else "T>512"
        for key in (row["routing"], band, "all"):
            if row["split"] == "held_out" and set(took) >= {STATIC, COUNTED}:
                gain = took["uniform_static"] / took["tilewise_model"]
                gains.setdefault(f"model over uniform static, {key}", []).append(gain)
                gain = took[STATIC] / took["tilewise_model"]
                gains.setdefault(f"model over robust static, {key}", []).append(gain)
                gain = took[STATIC] / took[COUNTED]
                gains.setdefault(f"dynamic over robust static, {key}", []).append(gain)
        if {"rule", STATIC} <= set(took) and took[STATIC] > 1.01 * took["rule"]:
            slower.append(
                {key: row[key] for key in ("shape", "stage", "T", "routing", "split")}
                | {"over_rule": round(took[STATIC] / took["rule"], 3)}
            )
    for row in (in_space(row) for row in extra if row["split"] == "design"):
        for policy, choose in chosen_by.items():
            name = choose(row).name
            if policy != COUNTED and name in row["times_us"]:
                regrets[policy].setdefault("design", []).append(regret(row, name))
    data["refit_s"] = round(seconds, 2)
    data |= beside(OUT.parent)
    data["noise_floor"] = {
        group: quantiles([noise(r) for r in rows if group in groups(r)])
        for group in ("fit", "held out")
    }
    timed = {identity(row): row for row in [*map(in_space, extra), *rows]}
    data["one_for_all"] = quantiles(one_for_all(list(timed.values())))
    shipped = one_for_all(list(timed.values()), chosen_by[STATIC])
    data["one_for_all_static"] = quantiles(shipped)
    data["configs_per_stage"] = {
        stage: max(len(r["times_us"]) for r in rows if r["stage"] == stage)
        for stage in measure.STAGES
    }
    return {
        "regret": {
            policy: {group: quantiles(values) for group, values in by.items()}
            for policy, by in regrets.items()
        },
        "gain": {key: round(statistics.geometric_mean(v), 4) for key, v in sorted(gains.items())},
        "static_slower_than_rule": sorted(slower, key=lambda one: -one["over_rule"]),
    }


def relative(row: Row, pick: int, half: int) -> dict[str, float]:
    """Times by one half over that of the configuration which another half finds fastest."""
    times = row["times_us"]
    best = min(times, key=lambda name: times[name][pick])
    return {name: halves[half] / times[best][half] for name, halves in times.items()}


def one_for_all(rows: Sequence[Row], policy: Policy | None = None) -> list[float]:
    """Regrets of one configuration for all routings of a product and token count.

    In cases timed with two routings and more. Without a policy the best one, picked by the times
    themselves on one half of the samples and judged on the other, which no choice without the
    histogram can undercut. A policy that looks at the histogram chooses by the first routing's.
    """
    cases: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        cases.setdefault((row["shape"], row["stage"], row["T"]), []).append(row)
    found = []
    for of_case in cases.values():
        if len(of_case) < 2:
            continue
        shared = set.intersection(*(set(row["times_us"]) for row in of_case))
        wanted = shared if policy is None else {policy(of_case[0]).name} & shared
        for pick, judge in ((0, 1), (1, 0)) if wanted else ():
            # Of each routing the times over the fastest one's, by either half.
            over = [[relative(row, pick, half) for row in of_case] for half in (pick, judge)]
            totals = {name: sum(one[name] for one in over[0]) for name in wanted}
            # By name where two tie: a set's order differs from process to process.
            chosen = min(sorted(totals), key=totals.__getitem__)
            found.append(statistics.fmean(one[chosen] for one in over[1]) - 1)
    return found


def beside(folder: Path) -> dict[str, Any]:
    """What `bench.tune_cost`, `bench.select_cost` and `bench.foreign` measured; None for a gap."""

    def rows(name: str) -> list[dict[str, Any]]:
        path = folder / name
        return json.loads(path.read_text())["rows"] if path.exists() else []

    tuned, selected, foreign_rows = map(
        rows, ("h200_tune.json", "h200_select_cost.json", "h200_foreign.json")
    )
    keys = ("shape", "cases", "shipped", "profiled", "shipped_over_profiled")
    return {
        "profiling_s": {row["shape"]: row["seconds"] for row in tuned} or None,
        "unseen_shapes": [
            {key: row[key] for key in keys} for row in tuned if row["shape"] not in SHAPES
        ]
        or None,
        "select_us": quantiles([row["select_us"] for row in selected]) if selected else None,
        "foreign": foreign.score(foreign_rows, TARGET) if foreign_rows else None,
    }


def print_worst(rows: Sequence[Row], policy: str = STATIC, count: int = 5) -> None:
    """The rows held out that a policy loses most on, and what the full space loses there."""
    ranked = []
    for row in map(in_space, rows):
        chosen = {name: one["config"] for name, one in row["chosen"].items()}
        if row["split"] == "held_out" and {policy, "tilewise_model"} <= set(chosen):
            ranked.append((regret(row, chosen[policy]), regret(row, chosen["tilewise_model"]), row))
    print(f"worst held out, {policy} (tilewise_model):")
    for lost, model, row in sorted(ranked, key=lambda one: -one[0])[:count]:
        where = " ".join(str(row[key]) for key in ("shape", "stage", "T", "routing"))
        print(f"  {where}: {lost:.1%} ({model:.1%})")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.regret_score")
    parser.add_argument("file", type=Path, nargs="?", default=OUT)
    parser.add_argument(
        "--extra",
        type=lambda text: None if text == "none" else Path(text),
        default=EXTRA,
        help="more rows to fit on, not scored; none: no more (default: %(default)s)",
    )
    parser.add_argument("--out", type=Path, help="where to write the file with its scores")
    options = parser.parse_args()
    keys = (*TIMED, "stage")
    data = load(parser, options.file, keys)
    extra = load(parser, options.extra, keys)["rows"] if options.extra else []
    data["summary"] = score(data, extra)
    if options.out is not None:
        options.out.write_text(json.dumps(data, separators=(",", ":")))
    print("| policy | rows | mean | median | p95 | p99 | max |\n|---|---|---|---|---|---|---|")
    for policy, by in data["summary"]["regret"].items():
        for group, q in by.items():
            cells = " | ".join(f"{q[k]:.2%}" for k in ("mean", "median", "p95", "p99", "max"))
            print(f"| {policy} | {group}, {q['rows']} | {cells} |")
    for key, value in data["summary"]["gain"].items():
        print(f"{key}: {value:.3f}")
    print(f"the best one for all routings of a case: {data['one_for_all']}")
    print(f"{STATIC} for all routings of a case: {data['one_for_all_static']}")
    print(f"noise floor {data['noise_floor']}, refit {data['refit_s']} s")
    print_worst(data["rows"])
    slower = data["summary"]["static_slower_than_rule"]
    held_out = sum(one["split"] == "held_out" for one in slower)
    print(f"static slower than the rule by over 1%: {len(slower)}, {held_out} of them held out")


if __name__ == "__main__":
    main()
