"""How far fitted costs choose from the best on cases that were left out of the fit.

Command: ``python -m bench.cross_validate`` (minutes, no GPU). Only rows marked "fit" take part. Two
kinds of folds: one shape at a time, and one pair of routing and token count at a time. Choices are
by the cost of the actual histogram over the full space, and with a shape left out also the robust
ones among the variants that would ship, on rows marked "design" too; the oracle is cross-validated
as in `bench.regret_score`. ``--wide REACH DOUBT --narrow REACH DOUBT`` tries other corrections.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path

from rich.progress import track

from bench.regret import OUT, Row, quantiles, regret
from bench.regret_score import TARGET, fitted, gemm_of, in_space
from bench.results import TIMED, load
from tilewise.dispatch import smoothing
from tilewise.dispatch.rules import rule
from tilewise.dispatch.select import bucketed, robust
from tilewise.dispatch.smoothing import Smoothing
from tilewise.tune import fit

FOLDS: dict[str, Callable[[Row], Hashable]] = {
    "shapes": lambda row: row["shape"],
    "routings and token counts": lambda row: (row["routing"], row["T"]),
}


def losses(rows: Sequence[Row], left_out: Sequence[Row]) -> list[float]:
    """Regrets on rows left out, of choices by costs fitted to the others."""
    cases = fit.cases_of(rows, gemm_of)
    fitted_table = fit.fit_stage(cases, TARGET)
    found = []
    for row, case in zip(left_out, fit.cases_of(left_out, gemm_of), strict=True):
        costs = fit.predicted(fitted_table, case, TARGET)
        timed = [config for config in costs if config in case.times_us]
        found.append(regret(row, min(timed, key=costs.__getitem__).name))
    return found


def robust_losses(rows: Sequence[Row], left_out: Sequence[Row]) -> list[float]:
    """Regrets on rows left out, of robust choices by costs fitted to the others."""
    cases = fit.cases_of(rows, gemm_of)
    kept = fit.portfolio(cases, keep=[rule(case.gemm, TARGET) for case in cases])
    fitted_table = fit.fit_stage(cases, TARGET, kept)
    chosen = [robust(fitted_table, bucketed(gemm_of(row)), TARGET).name for row in left_out]
    return [
        regret(row, name)
        for row, name in zip(left_out, chosen, strict=True)
        if name in row["times_us"]
    ]


def main() -> None:
    """Prints the mean and the 95th percentile for both kinds of folds."""
    parser = argparse.ArgumentParser(prog="python -m bench.cross_validate")
    parser.add_argument("--extra", type=Path, default=OUT.parent / "h200_profile.json")
    for name, usual in (("--wide", smoothing.WIDE), ("--narrow", smoothing.NARROW)):
        parser.add_argument(name, nargs=2, type=float, default=list(usual))
    options = parser.parse_args()
    if min(*options.wide, *options.narrow) <= 0:
        parser.error("--wide and --narrow take a REACH and a DOUBT above 0")
    smoothing.WIDE = Smoothing(*options.wide)
    smoothing.NARROW = Smoothing(*options.narrow)
    keys = (*TIMED, "stage")
    rows = [in_space(row) for row in load(parser, OUT, keys)["rows"]]
    extra = load(parser, options.extra, keys)["rows"]
    rows, design = fitted(rows, extra), [in_space(r) for r in extra if r["split"] == "design"]
    for name, fold_of in FOLDS.items():
        found: list[float] = []
        folds = dict.fromkeys((row["stage"], fold_of(row)) for row in rows)
        for stage, fold in track(list(folds), description=name):
            of_stage = [row for row in rows if row["stage"] == stage]
            out = [row for row in of_stage if fold_of(row) == fold]
            found += losses([row for row in of_stage if fold_of(row) != fold], out)
        say(f"{name} left out", found)
    for split, scored in (("fit", rows), ("design", design)):
        found = []
        for stage, shape in dict.fromkeys((row["stage"], row["shape"]) for row in scored):
            out = [row for row in scored if (row["stage"], row["shape"]) == (stage, shape)]
            rest = [row for row in rows if row["stage"] == stage and row["shape"] != shape]
            found += robust_losses(rest, out)
        say(f'shapes left out, robust choice, rows marked "{split}"', found)


def say(what: str, found: Sequence[float]) -> None:
    """Prints a line of a mean and a percentile."""
    lost = quantiles(found)
    print(f"{what}: {lost['rows']} rows, mean {lost['mean']:.2%}, p95 {lost['p95']:.1%}")


if __name__ == "__main__":
    main()
