"""Fits the costs that come with the library from exhaustive rows of `bench.regret`.

``python -m bench.fit_table FILE... --out src/tilewise/dispatch/tables/sm_90.json``: cases that two
files share are taken from the first. Nothing is measured.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench.regret import SHAPES
from bench.results import TIMED, load
from tilewise.dispatch.config import KernelConfig
from tilewise.dispatch.rules import rule
from tilewise.dispatch.space import space
from tilewise.dispatch.table import Table
from tilewise.target import Target
from tilewise.tune import fit, measure


def merged(
    documents: Sequence[dict[str, Any]],
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The rows of all files, each case once, and the files' meta."""
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    metas = []
    for data in documents:
        metas.append(data["meta"])
        for row in data["rows"]:
            rows.setdefault((row["shape"], row["stage"], row["T"], row["routing"]), row)
    return list(rows.values()), metas


def table(rows: Sequence[dict[str, Any]], target: Target, meta: dict[str, Any]) -> Table:
    """Costs of both products for the variants that reach nearest to the best of all."""
    stages = []
    for stage in measure.STAGES:
        cases = fit.cases_of(
            [row for row in rows if row["stage"] == stage],
            lambda row: measure.product(SHAPES[row["shape"]], row["stage"], row["T"]),
        )
        ruled = [rule(case.gemm, target) for case in cases]
        cases = [
            _of_the_space(case, rules, target) for case, rules in zip(cases, ruled, strict=True)
        ]
        stages.append(fit.fit_stage(cases, target, fit.portfolio(cases, keep=ruled)))
    return Table(meta, *stages)


def _of_the_space(case: fit.Case, ruled: KernelConfig, target: Target) -> fit.Case:
    """Without what was timed once and has left the space since."""
    kept = {*space(case.gemm, target), ruled}
    return replace(case, times_us={c: us for c, us in case.times_us.items() if c in kept})


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.fit_table")
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--arch", default="sm_90")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    keys = (*TIMED, "stage")
    rows, metas = merged([load(parser, file, keys) for file in options.files])
    keys = ("hardware", "torch", "triton", "commit", "source")
    meta = {
        "arch": options.arch,
        "cases": len(rows),
        "measured": [{key: one.get(key) for key in keys} for one in metas],
        "rows_by_commit": Counter(row.get("commit", "not recorded") for row in rows),
        "files": [file.name for file in options.files],
    }
    fitted = table(rows, Target.from_arch(options.arch), meta)
    options.out.write_text(json.dumps(fitted.to_json(), separators=(",", ":")) + "\n")
    for name, stage in (("gate_up", fitted.gate_up), ("down", fitted.down)):
        print(f"{name}: {len(stage.coefficients)} variants, {len(stage.exemplars)} cases")


if __name__ == "__main__":
    main()
