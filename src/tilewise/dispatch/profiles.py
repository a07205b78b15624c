"""Profiles that a user measured: where their files are, and which of them speak for a layer here.

`tilewise tune` writes them (tune/store.py says what is in one). They are read once per process, so
decisions stay the same while it runs: a new profile counts from the next start on.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..target import Target

VARIABLE = "TILEWISE_PROFILES"
OFF = ("0", "off")
LOG = logging.getLogger("tilewise")
PACKAGE = Path(__file__).resolve().parent.parent


def folder() -> Path | None:
    """$TILEWISE_PROFILES, else ~/.cache/tilewise/profiles; None if it is "0" or "off"."""
    named = os.environ.get(VARIABLE, "")
    if named.lower() in OFF:
        return None
    if named:
        return Path(named).expanduser()
    try:
        return Path.home() / ".cache" / "tilewise" / "profiles"
    except RuntimeError:  # A user without a home.
        return None


@functools.cache
def kernels_hash() -> str:
    """Sixteen digits of the sources of kernels, of what costs are fitted on and corrected by."""
    digest = hashlib.sha256()
    # Products are timed in launches of their own, without a copy before them.
    kernels = (PACKAGE / "moe" / "kernels").glob("*.py")
    files = sorted(file for file in kernels if file.name not in ("fused.py", "permute.py"))
    costs = [PACKAGE / "dispatch" / name for name in ("features.py", "smoothing.py")]
    for file in (*files, *costs):
        digest.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


@functools.cache
def triton_version() -> str:
    """As Triton says it, "" where there is none."""
    try:
        return str(importlib.import_module("triton").__version__)
    except ImportError:
        return ""


def key_of(shape: tuple[int, int, int, int], target: Target) -> dict[str, Any]:
    """What a profile measured here would be valid for.

    Args:
        shape: segments (experts), top_k, and the two widths (hidden, intermediate).
    """
    return {
        "kernels": kernels_hash(),
        "triton": triton_version(),
        "target": {
            "arch": target.arch,
            "num_sms": target.num_sms,
            "l2_bytes": target.l2_bytes,
        },
        "shape": list(shape),
        "dtype": "bf16",
    }


@dataclass(frozen=True, eq=False)
class Installed:
    """One file of the folder: its path, its "key" and its "table", which are JSON objects."""

    path: Path
    key: Mapping[str, Any]
    table: Mapping[str, Any]

    @property
    def stale(self) -> tuple[str, ...]:
        """Which of "kernels" and "triton" are others than here: then its times may be, too."""
        here = {"kernels": kernels_hash(), "triton": triton_version()}
        return tuple(part for part, value in here.items() if self.key[part] != value)


@functools.cache
def installed() -> tuple[Installed, ...]:
    """Every profile with a table in the folder, by name. What cannot be read is logged."""
    place = folder()
    found = []
    try:  # A home that belongs to someone else holds no profile of this user's.
        paths = sorted(place.glob("*.json")) if place is not None and place.is_dir() else []
    except OSError as error:
        LOG.warning("%s cannot be read, no profile is used: %s", place, error)
        return ()
    for path in paths:
        try:
            values = json.loads(path.read_text())
            missing = {"key", "table"} - set(values)
            if missing:
                raise ValueError(f"it has no {' and no '.join(sorted(missing))}")
            key, table = values["key"], values["table"]
            if table is None:  # Not finished.
                continue
            one = Installed(path, key, table)
            _ = one.stale, key["target"]["arch"], key["target"]["num_sms"]
            shape = key["shape"]
            if len(shape) != 4 or any(type(size) is not int for size in shape):
                raise ValueError(f"its shape is {shape}, not four whole numbers")
            if key["dtype"] != "bf16":
                raise ValueError(f"its dtype is {key['dtype']!r}, costs are fitted for 'bf16'")
        except (OSError, ValueError, KeyError, TypeError) as error:
            LOG.warning("%s is no profile, it is ignored: %r", path, error)
            continue
        found.append(one)
    return tuple(found)


def find(
    segments: int, hidden: int, intermediate: int, top_k: int, target: Target
) -> Installed | None:
    """The profile of exactly these sizes on such a machine; the nearest top_k, rather not stale."""
    fits = [
        one
        for one in installed()
        if (one.key["shape"][0], *one.key["shape"][2:]) == (segments, hidden, intermediate)
        and one.key["target"]["arch"] == target.arch
        and one.key["target"]["num_sms"] == target.num_sms
    ]
    return min(
        fits, key=lambda one: (bool(one.stale), abs(one.key["shape"][1] - top_k)), default=None
    )
