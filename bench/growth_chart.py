"""Six panels of a growth file: time above, memory below; tokens, experts and top-k."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.growth_axes import AXES, HIDDEN, INTER, along, fixed
from bench.results import Results, Row

NAMES = {"tilewise": "Tilewise", "vllm": "vLLM"}
LOOKS = {"tilewise": ("#0072b2", "o"), "vllm": ("#e69f00", "s")}
OTHER = ("#009e73", "D")
GREY = "#777777"
TITLES = {"tokens": "tokens in the batch", "experts": "experts", "top_k": "experts per token"}
STYLE = {
    "font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
    "grid.color": "#dddddd", "grid.linewidth": 0.6, "axes.axisbelow": True, "figure.dpi": 110,
    "savefig.bbox": "tight",
}  # fmt: skip

Value = Callable[[Row], float | None]


def draw(results: Results, folder: Path) -> Path:
    """Writes growth.png; needs matplotlib."""
    matplotlib: Any = importlib.import_module("matplotlib")
    matplotlib.use("Agg")
    plt: Any = importlib.import_module("matplotlib.pyplot")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "growth.png"
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(2, 3, figsize=(11.5, 6.6), layout="constrained")
        for column, axis in enumerate(AXES):
            points = along(axis, results.rows)
            _panel(axes[0][column], axis, points, _times(results.rows), "µs a call")
            _panel(axes[1][column], axis, points, _sizes(results.rows), "MB allocated by a call")
            axes[0][column].set_title(fixed(axis), fontsize=9.5, color="#444444")
        for row in axes:
            row[0].legend(frameon=False, fontsize=9, loc="upper left")
        figure.suptitle(_title(results.meta), x=0.01, ha="left", fontsize=11, fontweight="bold")
        figure.savefig(path)
        plt.close(figure)
    return path


def _times(rows: list[Row]) -> dict[str, tuple[Value, dict[str, Any]]]:
    lines = {_label(name): (_of(name, "us"), _look(name)) for name in _names(rows)}
    floor = {"color": GREY, "linestyle": "--", "linewidth": 1.2}
    return lines | {"floor": (lambda row: float(row["floor_us"]), floor)}


def _sizes(rows: list[Row]) -> dict[str, tuple[Value, dict[str, Any]]]:
    lines = {_label(name): (_of(name, "peak_bytes", 1e6), _look(name)) for name in _names(rows)}
    output = {"color": GREY, "linestyle": "--", "linewidth": 1.2}
    scratch = {"color": LOOKS["tilewise"][0], "linestyle": ":", "linewidth": 1.4}
    return lines | {
        "workspace_size()": (lambda row: _scaled(row.get("workspace_bytes")), scratch),
        "the output alone": (lambda row: _scaled(row.get("output_bytes")), output),
    }


def _panel(
    panel: Any,
    axis: str,
    points: list[tuple[int, Row]],
    lines: dict[str, tuple[Value, dict[str, Any]]],
    unit: str,
) -> None:
    for label, (value, look) in lines.items():
        known = [(x, y) for x, row in points if (y := value(row)) is not None]
        if known:
            panel.plot(*zip(*known, strict=True), label=label, **look)
    ticks = [x for x, _ in points]
    if axis != "top_k":
        panel.set_xscale("log", base=2)
    if axis == "tokens":
        panel.set_yscale("log")  # four orders of magnitude
        panel.yaxis.set_major_formatter(lambda value, _: f"{value:,.6g}")
    else:
        panel.set_ylim(0, panel.get_ylim()[1] * 1.05)
    size = 8 if axis == "tokens" else 9
    panel.set_xticks(ticks, [f"{x:,}" for x in ticks], fontsize=size)
    panel.minorticks_off()
    panel.set_xlabel(TITLES[axis])
    panel.set_ylabel(unit)


def _names(rows: list[Row]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row["peers"]))


def _label(name: str) -> str:
    return NAMES.get(name, name)


def _look(name: str) -> dict[str, Any]:
    colour, marker = LOOKS.get(name, OTHER)
    return {"color": colour, "marker": marker, "markersize": 4.5, "linewidth": 1.6}


def _of(name: str, key: str, scale: float = 1.0) -> Value:
    return lambda row: _scaled(row["peers"].get(name, {}).get(key), scale)


def _scaled(value: float | None, scale: float = 1e6) -> float | None:
    return None if value is None else value / scale


def _title(meta: dict[str, Any]) -> str:
    layer = f"hidden {HIDDEN}, intermediate {INTER}, bf16"
    torch, triton = str(meta.get("torch")).split("+")[0], meta.get("triton")
    where = f"one {meta.get('hardware')}, torch {torch}, Triton {triton}"
    return f"How time and memory of a layer grow\n{layer} · {where}"
