"""The axes of `bench.growth`: which layers, and which row of a file stands where."""

from __future__ import annotations

from collections.abc import Sequence

from bench.protocol import Shape
from bench.results import Row, cell_of

HIDDEN, INTER = 2048, 768  # Qwen3-30B-A3B's
TOKENS, EXPERTS, TOP_K = 1024, 128, 8  # where the other two axes stand
AXES: dict[str, tuple[int, ...]] = {
    "tokens": tuple(4**i for i in range(8)),  # 1 to 16,384
    "experts": (8, 16, 32, 64, 128, 256, 512),
    "top_k": (1, 2, 4, 6, 8, 10),
}


def all_cells() -> list[tuple[int, int, int]]:
    """Returns every (tokens, experts, top-k) once, axis by axis."""
    at = {"tokens": TOKENS, "experts": EXPERTS, "top_k": TOP_K}
    cells = [at | {axis: value} for axis, values in AXES.items() for value in values]
    return list(dict.fromkeys((c["tokens"], c["experts"], c["top_k"]) for c in cells))


def name_of(experts: int, top_k: int) -> str:
    """Returns what the rows call a layer."""
    return f"e{experts}-k{top_k}"


def shape_of(experts: int, top_k: int) -> Shape:
    """Returns the layer's sizes."""
    return Shape(experts, top_k, HIDDEN, INTER)


def along(axis: str, rows: Sequence[Row]) -> list[tuple[int, Row]]:
    """Returns an axis' values with their rows, in order; what is not measured is left out."""
    measured = {cell_of(row)[:2]: row for row in rows}
    at = {"tokens": TOKENS, "experts": EXPERTS, "top_k": TOP_K}
    found = []
    for value in AXES[axis]:
        cell = at | {axis: value}
        row = measured.get((name_of(cell["experts"], cell["top_k"]), cell["tokens"]))
        if row is not None:
            found.append((value, row))
    return found


def fixed(axis: str) -> str:
    """Says where the other two axes stand."""
    others = {"tokens": f"{TOKENS:,} tokens", "experts": f"{EXPERTS} experts", "top_k": "top 8"}
    return ", ".join(text for name, text in others.items() if name != axis)
