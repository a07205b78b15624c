"""The file of a profile: what it is valid for, the raw times, and the table fitted to them.

{"key": {"kernels", "triton", "target": {"arch", "num_sms", "l2_bytes"}, "shape": [E, K, H, I],
         "dtype"},
 "meta": {"device", ...},
 "rows": [{"stage", "T", "routing", "sizes": [[...]], "times_us": {name: [odd, even]},
           "failed": {name: why}}],
 "table": Table.to_json(), or null while too few rows are there}
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..dispatch import profiles
from ..dispatch.table import Table
from ..models import MoEShape
from ..target import Target
from .fit import Case, cases_of, fit_stage
from .measure import STAGES, product

FEWEST_CASES = 6  # Of each product, for a table.

Row = dict[str, Any]


@dataclass
class Profile:
    """One layer on one kind of machine.

    Attributes:
        key: as `here` makes it.
        rows: raw times, one row for each product and workload.
        table: None while fewer than `FEWEST_CASES` of a product are timed.
        meta: what else is known of the machine: "device" is its name by the driver.
    """

    key: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    table: Table | None = None
    meta: dict[str, Any] = field(default_factory=dict)

    @property
    def shape(self) -> MoEShape:
        return MoEShape(*self.key["shape"])

    @property
    def target(self) -> Target:
        """The machine as the key has it; the rates are nominal."""
        facts = self.key["target"]
        known = Target.from_arch(facts["arch"])
        return replace(known, num_sms=facts["num_sms"], l2_bytes=facts["l2_bytes"])


def here(shape: MoEShape, target: Target) -> dict[str, Any]:
    """The key of a profile that would be measured now."""
    sizes = (shape.num_experts, shape.top_k, shape.hidden_size, shape.intermediate_size)
    return profiles.key_of(sizes, target)


def is_stale(file_key: Mapping[str, Any], here: Mapping[str, Any]) -> tuple[str, ...]:
    """The parts of the keys that differ: "kernels", "triton", "target", ...; () if none does."""
    return tuple(part for part in here if file_key.get(part) != here[part])


def default_path(shape: MoEShape, target: Target) -> Path:
    """Where a profile is found by later processes.

    Raises:
        ValueError: profiles are switched off.
    """
    folder = profiles.folder()
    if folder is None:
        raise ValueError(
            f"{profiles.VARIABLE}={os.environ.get(profiles.VARIABLE, '')!r} switches profiles off: "
            "name a file (--out), or set it to a folder"
        )
    sizes = "-".join(map(str, vars(shape).values()))
    return folder / f"{target.arch}-{target.num_sms}-{sizes}.json"


def _table(values: Any) -> Table | None:
    try:
        return Table.from_json(values)
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def load(path: Path) -> Profile:
    """Reads a profile; a table that another version fitted counts as none, as rows remain.

    Raises:
        OSError: no such file.
        ValueError: a file that is no profile.
    """
    try:
        values = json.loads(path.read_text())
        table, rows = values["table"], values["rows"]
        profile = Profile(
            dict(values["key"]),
            [dict(row) for row in rows],
            None if table is None else _table(table),
            dict(values.get("meta", {})),
        )
        _ = profile.shape, profile.target
        _ = [(identity(row), row["sizes"], row["times_us"]) for row in rows]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is no profile: {error!r}; `tilewise tune` writes one, under another name if "
            "this file is something else"
        ) from error
    return profile


def save(profile: Profile, path: Path) -> None:
    """Writes the file in one step: a reader sees the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    values = {
        "key": profile.key,
        "meta": profile.meta,
        "rows": profile.rows,
        "table": None if profile.table is None else profile.table.to_json(),
    }
    text = json.dumps(values, separators=(",", ":"))
    text = re.sub(r'(\{"stage":)', r"\n\1", text)  # A row a line, for diffs.
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        part.write_text(text + "\n")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def identity(row: Mapping[str, Any]) -> tuple[str, int, str]:
    """What a row measures: product, tokens, routing."""
    return row["stage"], row["T"], row["routing"]


def cases(profile: Profile, stage: str, halves: slice = slice(None)) -> list[Case]:
    """The rows of one product, to fit or to score."""
    rows = [row for row in profile.rows if row["stage"] == stage]
    return cases_of(rows, lambda row: product(profile.shape, stage, row["T"]), halves)


def fitted(profile: Profile, target: Target, halves: slice = slice(None)) -> Table | None:
    """The table of a profile's rows, None if they are too few.

    Args:
        halves: which halves of the samples count.
    """
    of_stage = {stage: cases(profile, stage, halves) for stage in STAGES}
    if min(map(len, of_stage.values())) < FEWEST_CASES:
        return None
    meta = {"arch": target.arch, "cases": len(profile.rows), **profile.meta}
    return Table(meta, *(fit_stage(of_stage[stage], target) for stage in STAGES))


def merge(first: Profile, second: Profile) -> Profile:
    """The rows of both, the second's where both have one, and a table fitted to them.

    Raises:
        ValueError: profiles of different keys.
    """
    differ = is_stale(second.key, first.key)
    if differ:
        both = "; ".join(f"{part}: {first.key[part]}, {second.key.get(part)}" for part in differ)
        raise ValueError(f"only profiles of one key merge, these differ in {both}")
    rows = {identity(row): row for row in (*first.rows, *second.rows)}
    merged = Profile(first.key, list(rows.values()), None, {**second.meta, **first.meta})
    merged.table = fitted(merged, merged.target)
    return merged


def done(row: Row, names: Sequence[str]) -> bool:
    """Whether a row says of every named configuration how fast it is, or why it is not there."""
    return all(name in row["times_us"] or name in row.get("failed", ()) for name in names)
