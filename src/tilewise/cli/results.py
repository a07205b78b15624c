"""Results files, ours or the repository's: read, or refused with the reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import typer


def read_results(path: Path) -> dict[str, Any]:
    """{"meta": ..., "rows": ...} of times by cell and peer.

    Raises:
        typer.BadParameter: No such file, no JSON, or the JSON of something else.
    """
    try:
        results = json.loads(path.read_text())
    except OSError as error:
        raise typer.BadParameter(f"--from {path}: {error.strerror}") from error
    except ValueError as error:
        raise typer.BadParameter(f"--from {path} is not JSON: {error}") from error
    match results:
        case {"meta": {"hardware": str(), "torch": str(), "triton": str()}, "rows": [_, *_]}:
            if all(map(_is_cell, results["rows"])):
                return dict(results)
    raise typer.BadParameter(
        f"--from {path} holds no times of layers; `tilewise bench --out FILE` and `python -m bench "
        "--out FILE` write files that do"
    )


def _is_cell(row: Any) -> bool:
    """Whether tables and charts can be made of it."""
    match row:
        case {
            "shape": str(), "routing": str(), "T": int(), "topk": int(), "H": int(), "I": int(),
            "active": int() | float(), "floor_us": int() | float(), "peers": {**peers},
        }:  # fmt: skip
            return row["floor_us"] > 0 and all(map(_is_entry, peers.values()))
    return False


def _is_entry(entry: Any) -> bool:
    """A peer's time, or its error."""
    match entry:
        case {"us": int() | float() as us}:
            return us > 0
        case {"error": str()}:
            return True
    return False
