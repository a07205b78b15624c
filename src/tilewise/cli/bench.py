"""`tilewise bench`: one layer against what else is installed here, and charts of the times.

A cell is (model, tokens, routing). Each implementation runs the same inputs by CUDA graph replay:
2 to 8 input sets in one graph, so that a replay's weights do not fit in cache, and rounds in which
all take turns. Files have the rows of the repository's bench/results/, and `--from` draws either.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import math
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from ..models import MoEShape
from ..moe.layer import fused_experts
from ..moe.warmup import warmup
from ..moe.weights import ExpertWeights
from ..target import Target
from .device import checked_device
from .limit import OutOfTime, time_limit
from .results import read_results
from .shapes import HELP, parse_shape
from .tokens import parse_tokens

ROUTINGS = ("uniform", "zipf", "hot")
REPLAY_BYTES = 200e6  # Active weights of one replay: well past any L2.
TOKENS, QUICK_TOKENS = "1,8,64,512,4096", "1,64,4096"
ROUNDS, QUICK_ROUNDS = 3, 1
QUICK_SECONDS = 58.0  # Two more to print in.
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
# On a CPU every layer shrinks to this, whatever its name: a check that the command works.
TINY = MoEShape(16, 4, 256, 128)
TINY_TOKENS = 32

Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
Layer = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
Row = dict[str, Any]


def bench(
    models: Annotated[
        list[str] | None, typer.Argument(help=f"{HELP} Several may be given.")
    ] = None,
    tokens: str | None = typer.Option(
        None, show_default=TOKENS, help="Token counts: integers, with commas."
    ),
    routings: str = typer.Option("uniform", help=f"Of {', '.join(ROUTINGS)}."),
    dtype: str = typer.Option("bf16", help='"bf16" or "fp16".'),
    peers: str = typer.Option("", help="Of vllm, torch, transformers; all that import if empty."),
    rounds: int | None = typer.Option(
        None, min=1, show_default=str(ROUNDS), help="Rounds in which all take turns."
    ),
    quick: bool = typer.Option(
        False,
        "--quick",
        help=f"At most 60 s: {QUICK_TOKENS} tokens, one round, where these are not given; says "
        "what it left out.",
    ),
    out: Annotated[
        Path | None, typer.Option(dir_okay=False, writable=True, help="Write the results as JSON.")
    ] = None,
    charts: Annotated[
        Path | None,
        typer.Option(
            file_okay=False,
            writable=True,
            help="Write speedup.png and roofline.png to this folder.",
        ),
    ] = None,
    from_file: Annotated[
        Path | None, typer.Option("--from", help="Measure nothing: read this results file.")
    ] = None,
    device: str = typer.Option("", help='"cpu" or "cuda:N"; the GPU if there is one.'),
) -> None:
    """Time the MoE layer of named models, beside other libraries if they are installed."""
    console = Console(width=None if sys.stdout.isatty() else 140)
    reduced: list[str] = []
    if out is not None:
        _make_folder("--out", out.parent)
    if charts is not None:
        _matplotlib()
        _make_folder("--charts", charts)
    if from_file is not None:
        if models:
            raise typer.BadParameter(
                f"--from {from_file} shows all of its file: leave out {' '.join(models)}"
            )
        results = read_results(from_file)
    else:
        device = checked_device(device)
        if device == "cpu":
            console.print(
                "[yellow]No GPU: a tiny layer in plain torch runs in place of each model. These "
                "times mean nothing; they show that the command works."
            )
        seconds = math.inf
        if quick:
            seconds = QUICK_SECONDS - time.process_time()  # What the imports have taken.
            if tokens is None:
                tokens, kept = QUICK_TOKENS, _listed(QUICK_TOKENS)
                out_of = [count for count in _listed(TOKENS) if count not in kept]
                reduced.append(f"{', '.join(out_of)} tokens")
            if rounds is None:
                rounds = QUICK_ROUNDS
                reduced.append(f"{ROUNDS - QUICK_ROUNDS} of {ROUNDS} rounds")
        tokens, rounds = TOKENS if tokens is None else tokens, rounds or ROUNDS
        cells = _cells(models or ["qwen3-30b-a3b"], tokens, routings, device == "cpu")
        many = [str(n) for n in parse_tokens(tokens) if n > TINY_TOKENS and device == "cpu"]
        if many:
            console.print(f"[yellow]On a CPU {', '.join(many)} tokens run as {TINY_TOKENS}.")
        if dtype not in DTYPES:
            raise typer.BadParameter(f"{dtype!r} is not one of {', '.join(DTYPES)}")
        results = measure(console, cells, DTYPES[dtype], peers, rounds, device, seconds)
    rows = results["rows"]
    console.print(table(rows))
    if device == "cpu":
        console.print("[yellow]CPU numbers mean nothing about this library.")
    if out is not None:
        out.write_text(json.dumps(results, indent=1) + "\n")
        console.print(f"wrote {out}", highlight=False)
    if charts is not None and rows:
        for path in draw(results, charts):
            console.print(f"wrote {path}", highlight=False)
    if reduced:
        console.print(f"[yellow]--quick left out: {'; '.join(reduced)}", highlight=False)


def _make_folder(option: str, folder: Path) -> None:
    """Before anything is measured: the results of hours should find a place."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise typer.BadParameter(f"{option}: cannot make {folder}: {error.strerror}") from error


def _listed(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _cells(
    models: Sequence[str], tokens: str, routings: str, tiny: bool
) -> list[tuple[str, MoEShape, int, str]]:
    counts = parse_tokens(tokens)
    try:
        shapes = {name: parse_shape(name) for name in models}
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    kinds = _listed(routings)
    unknown = [kind for kind in kinds if kind not in ROUTINGS]
    if unknown or not kinds:
        raise typer.BadParameter(f"--routings {routings!r}: use some of {', '.join(ROUTINGS)}")
    if tiny:
        counts = sorted({min(count, TINY_TOKENS) for count in counts})
        shapes = {f"{name} (tiny)": TINY for name in shapes}
    return [
        (name, shape, count, kind)
        for name, shape in shapes.items()
        for count in counts
        for kind in kinds
    ]


# ---------------------------------------------------------------- peers


def _ours(gate_up: torch.Tensor, down: torch.Tensor) -> Layer:
    weights = ExpertWeights.from_gate_up(gate_up, down)
    return lambda x, ids, w: fused_experts(x, weights, w, ids)


def _torch(gate_up: torch.Tensor, down: torch.Tensor) -> Layer:
    """torch's grouped product between plain operations, as one would write it."""
    grouped_mm = torch.nn.functional.grouped_mm
    gate_up, down, experts = gate_up.mT, down.mT, down.shape[0]
    index = torch.arange(experts, device=down.device, dtype=torch.int32)

    def layer(x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        top_k = ids.shape[1]
        sorted_ids, order = torch.sort(ids.flatten(), stable=True)
        ends = torch.searchsorted(sorted_ids, index, right=True).to(torch.int32)
        both = grouped_mm(x[order // top_k], gate_up, offs=ends)
        gate, up = both.chunk(2, -1)
        rows = grouped_mm(torch.nn.functional.silu(gate) * up, down, offs=ends)
        slots = torch.empty_like(rows)
        slots[order] = rows
        return (slots.view(*ids.shape, -1).float() * weights[:, :, None]).sum(1).to(x.dtype)

    return layer


def _vllm(gate_up: torch.Tensor, down: torch.Tensor) -> Layer:
    module = importlib.import_module("vllm.model_executor.layers.fused_moe")
    return lambda x, ids, w: module.fused_experts(x, gate_up, down, w, ids)


def _transformers(gate_up: torch.Tensor, down: torch.Tensor) -> Layer:
    """The experts of transformers with its own grouped product."""
    transformers = importlib.import_module("transformers")
    modeling = importlib.import_module("transformers.models.qwen3_moe.modeling_qwen3_moe")
    experts, hidden, inter = down.shape
    config = transformers.Qwen3MoeConfig(
        num_experts=experts, hidden_size=hidden, moe_intermediate_size=inter
    )
    config._experts_implementation = "grouped_mm"
    with torch.device("meta"):
        module = modeling.Qwen3MoeExperts(config)
    module.gate_up_proj = torch.nn.Parameter(gate_up, requires_grad=False)
    module.down_proj = torch.nn.Parameter(down, requires_grad=False)
    return lambda x, ids, w: module(x, ids.long(), w.to(x.dtype))


PEERS: dict[str, Callable[[torch.Tensor, torch.Tensor], Layer]] = {
    "tilewise": _ours,
    "vllm": _vllm,
    "torch": _torch,
    "transformers": _transformers,
}


def _chosen(peers: str) -> dict[str, Callable[[torch.Tensor, torch.Tensor], Layer]]:
    """Ours first, then the peers that were asked for, or all whose package can be imported.

    Raises:
        typer.BadParameter: A peer that was asked for is not known, or not installed.
    """
    names = _listed(peers)
    unknown = [name for name in names if name not in PEERS]
    if unknown:
        raise typer.BadParameter(f"unknown peers {unknown}; known: {', '.join(PEERS)}")
    found: dict[str, Callable[[torch.Tensor, torch.Tensor], Layer]] = {"tilewise": _ours}
    for name, make in PEERS.items():
        if names and name not in names:
            continue
        try:
            importlib.import_module(name)
        except ImportError as error:
            if name in names:
                raise typer.BadParameter(
                    f"--peers {name}: it cannot be imported here, {_first_line(error)}; install "
                    "it, or leave it out"
                ) from error
            continue
        found[name] = make
    return found


# ---------------------------------------------------------------- inputs


def make_routing(
    kind: str, tokens: int, shape: MoEShape, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Distinct int32 ids [tokens, top_k], and fp32 weights that sum to 1.

    "uniform"; "zipf", p(expert) ~ rank^-1.2 in a random order; "hot", the same experts for all.
    """
    device, experts = generator.device, shape.num_experts
    p = None
    if kind == "zipf":
        rank = torch.arange(1, experts + 1, device=device, dtype=torch.float32)
        p = rank.pow(-1.2)[torch.randperm(experts, generator=generator, device=device)]
        p = p / p.sum()
    rows = 1 if kind == "hot" else tokens
    score = torch.rand(rows, experts, generator=generator, device=device).expand(tokens, experts)
    if p is not None:
        # The largest k of Gumbel noise plus log p are k distinct draws from p.
        score = p.log() - (-score.clamp(1e-9, 1 - 1e-7).log()).log()
    ids = score.topk(shape.top_k, dim=-1).indices.to(torch.int32).contiguous()
    logits = torch.randn(tokens, shape.top_k, generator=generator, device=device)
    return ids, logits.softmax(-1)


def make_inputs(
    kind: str, tokens: int, shape: MoEShape, dtype: torch.dtype, device: str
) -> tuple[list[Inputs], float]:
    """2 to 8 input sets (x, ids, weights), and the mean number of active experts."""
    generator = torch.Generator(device=device).manual_seed(0)
    sets: list[Inputs] = []
    wanted = 2
    while len(sets) < wanted:
        ids, weights = make_routing(kind, tokens, shape, generator)
        x = torch.randn(tokens, shape.hidden_size, generator=generator, device=device)
        sets.append((x.to(dtype), ids, weights))
        active = ids.unique().numel() * 3 * shape.hidden_size * shape.intermediate_size * 2
        wanted = max(wanted, min(8, math.ceil(REPLAY_BYTES / active)))
    return sets, statistics.mean(ids.unique().numel() for _, ids, _ in sets)


def make_weights(
    shape: MoEShape, dtype: torch.dtype, device: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """[E, 2I, H], gate rows first, and [E, H, I], of unit gain."""
    e, h, i = shape.num_experts, shape.hidden_size, shape.intermediate_size
    gate_up = torch.empty(e, 2 * i, h, dtype=dtype, device=device)
    down = torch.empty(e, h, i, dtype=dtype, device=device)
    generator = torch.Generator(device=device).manual_seed(0)
    for expert in range(e):
        gate_up[expert].normal_(0, h**-0.5, generator=generator)
        down[expert].normal_(0, i**-0.5, generator=generator)
    return gate_up, down


# ---------------------------------------------------------------- timing


class Graph:
    """A CUDA graph of one layer over all input sets; the outputs stay apart, so nothing hides."""

    def __init__(self, layer: Layer, sets: Sequence[Inputs]) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for inputs in sets:
                layer(*inputs)
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=stream):
            self.outputs = [layer(*inputs) for inputs in sets]
        for output in self.outputs:
            output.fill_(float("nan"))  # A row that nobody writes is seen.
        self.graph.replay()
        torch.cuda.synchronize()

    def microseconds(self) -> float:
        """Median time of one call over replays of about 12 ms together."""
        once = self._times(1)[0]
        replays = int(min(40, max(5, 12.0 / max(once, 1e-3))))
        return statistics.median(self._times(replays)) * 1e3 / len(self.outputs)

    def _times(self, replays: int) -> list[float]:
        events = [
            (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
            for _ in range(replays)
        ]
        for start, end in events:
            start.record()
            self.graph.replay()
            end.record()
        torch.cuda.synchronize()
        return [float(start.elapsed_time(end)) for start, end in events]


class Calls:
    """The same on a CPU, by the wall clock."""

    def __init__(self, layer: Layer, sets: Sequence[Inputs]) -> None:
        self.layer, self.sets = layer, sets
        self.outputs = [layer(*inputs) for inputs in sets]

    def microseconds(self) -> float:
        start = time.perf_counter()
        for inputs in self.sets:
            self.layer(*inputs)
        return (time.perf_counter() - start) * 1e6 / len(self.sets)


def floor_us(row: Row, target: Target) -> float:
    """The larger of compulsory bytes and FLOPs over the machine's nominal rates."""
    return max(
        compulsory_bytes(row) / target.memory_gbs / 1e3, flops(row) / target.bf16_tflops / 1e6
    )


def compulsory_bytes(row: Row) -> float:
    """Weights of the active experts, input and output, once, in 16 bits."""
    weights = row["active"] * 3 * row["H"] * row["I"] * 2
    return float(weights + 2 * row["T"] * row["H"] * 2)


def flops(row: Row) -> float:
    return float(6 * row["T"] * row["topk"] * row["H"] * row["I"])


@torch.inference_mode()
def measure(
    console: Console,
    cells: Sequence[tuple[str, MoEShape, int, str]],
    dtype: torch.dtype,
    peers: str,
    rounds: int,
    device: str,
    seconds: float = math.inf,
) -> dict[str, Any]:
    """Runs every cell for at most so long; returns {"meta": ..., "rows": ...} as bench/results/."""
    import triton

    from .. import __version__

    target = Target.probe(device)
    rows: list[Row] = []
    failed: dict[str, str] = {}
    with contextlib.suppress(OutOfTime), time_limit(seconds):
        for row in _rows(console, cells, dtype, peers, rounds, device, failed):
            rows.append(row)
    for peer, reason in failed.items():
        console.print(f"[yellow]{peer}: {reason}", highlight=False)
    left = [f"{name} {tokens} {routing}" for name, _, tokens, routing in cells[len(rows) :]]
    if left:
        console.print(f"[yellow]left out, the time is over: {', '.join(left)}", highlight=False)
    cpu = target.backend == "cpu"
    meta = {
        "hardware": f"{platform.machine()} CPU" if cpu else torch.cuda.get_device_name(device),
        "arch": target.arch, "torch": torch.__version__, "triton": triton.__version__,
        "tilewise": __version__, "dtype": str(dtype).removeprefix("torch."), "rounds": rounds,
        "floors": f"nominal: {target.memory_gbs:g} GB/s, {target.bf16_tflops:g} TFLOP/s",
        "meaningless": cpu,
    }  # fmt: skip
    return {"meta": meta | ({"left_out": left} if left else {}), "rows": rows}


def _rows(
    console: Console,
    cells: Sequence[tuple[str, MoEShape, int, str]],
    dtype: torch.dtype,
    peers: str,
    rounds: int,
    device: str,
    failed: dict[str, str],
) -> Iterator[Row]:
    """Measures the cells one by one; `failed` gets the reason of each peer that did not run."""
    target, makers = Target.probe(device), _chosen(peers)
    layers: dict[str, Layer] = {}
    at: tuple[str, MoEShape] | None = None
    for name, shape, tokens, routing in _progress(console, cells):
        if at != (name, shape):
            layers.clear()  # The last model's weights go before the next one's come.
            gate_up, down = make_weights(shape, dtype, device)
            warmup(shape, max_tokens=max(cell[2] for cell in cells), dtype=dtype, routing=False)
            for peer, make in makers.items():
                try:
                    layers[peer] = make(gate_up, down)
                except Exception as error:  # A peer that cannot run is no reason to stop.
                    failed[peer] = _first_line(error)
            del gate_up, down
            at = (name, shape)
        sets, active = make_inputs(routing, tokens, shape, dtype, device)
        row: Row = {
            "shape": name, "E": shape.num_experts, "topk": shape.top_k, "H": shape.hidden_size,
            "I": shape.intermediate_size, "T": tokens, "routing": routing, "active": active,
            "sets": len(sets), "peers": {},
        }  # fmt: skip
        row["floor_us"] = floor_us(row, target)
        timed: dict[str, Graph | Calls] = {}
        for peer, layer in layers.items():
            try:
                timed[peer] = (Calls if target.backend == "cpu" else Graph)(layer, sets)
                row["peers"][peer] = {"us_rounds": []}
                _check_same(timed["tilewise"].outputs, timed[peer].outputs)
            except Exception as error:
                timed.pop(peer, None)
                row["peers"][peer] = {"error": _first_line(error)}
                failed[peer] = _first_line(error)
        for _ in range(rounds):
            for peer, calls in timed.items():
                row["peers"][peer]["us_rounds"].append(calls.microseconds())
        for peer in timed:
            row["peers"][peer]["us"] = statistics.median(row["peers"][peer]["us_rounds"])
        yield row


def _progress(
    console: Console, cells: Sequence[tuple[str, MoEShape, int, str]]
) -> Iterator[tuple[str, MoEShape, int, str]]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=len(cells))
        for cell in cells:
            progress.update(task, description=f"{cell[0]}, {cell[2]} tokens, {cell[3]}")
            yield cell
            progress.advance(task)


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"[:200]


def _check_same(ours: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor]) -> None:
    """A time counts only if the result is right: two roundings apart at most."""
    for a, b in zip(ours, theirs, strict=True):
        error = float((a.float() - b.float()).norm() / a.float().norm().clamp(min=1e-30))
        if not error < 2e-2:
            raise ValueError(f"its result differs by {error:.1e}")


# ---------------------------------------------------------------- tables and charts


def names_of(rows: Iterable[Row]) -> list[str]:
    """Everything that was timed, ours first; without what was timed again for the noise."""
    found = dict.fromkeys(
        name
        for row in rows
        for name, entry in row["peers"].items()
        if "us" in entry and not name.endswith("_again")
    )
    return sorted(found, key=lambda name: name != "tilewise")


def geomean(values: Sequence[float]) -> float:
    return math.exp(statistics.fmean(map(math.log, values))) if values else math.nan


def table(rows: Sequence[Row]) -> Table:
    """Every cell of a short file; geometric means by model and token count of a long one."""
    names = names_of(rows)
    short = len(rows) <= 40
    result = Table(title="" if short else "Geometric means over routings", title_justify="left")
    for column in ("model", "tokens", *(["routing"] if short else []), "floor us", *names):
        left = column in ("model", "routing")
        result.add_column(column, justify="left" if left else "right", overflow="fold")
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        key = (row["shape"], row["T"], row["routing"]) if short else (row["shape"], row["T"])
        groups.setdefault(key, []).append(row)
    for key, group in groups.items():
        times = {
            name: geomean([row["peers"][name]["us"] for row in group if _timed(row, name)])
            for name in names
        }
        best = min((us for us in times.values() if not math.isnan(us)), default=math.nan)
        cells = []
        for us in times.values():
            text = "" if math.isnan(us) else f"{us:,.1f}"
            cells.append(f"[bold green]{text}" if us == best else text)
        floor = geomean([row["floor_us"] for row in group])
        result.add_row(*map(str, key), f"{floor:,.1f}", *cells)
    return result


def _timed(row: Row, name: str) -> bool:
    return "us" in row["peers"].get(name, {})


LABELS = {
    "tilewise": "Tilewise",
    "vllm": "vLLM",
    "vllm_dflt": "vLLM, untuned",
    "sonic": "sonic-moe",
    "torch_gmm": "torch grouped_mm",
    "torch": "torch grouped_mm",
}
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00")
MARKERS = ("s", "D", "^", "v", "P", "X")


def _matplotlib() -> Any:
    try:
        return importlib.import_module("matplotlib")
    except ModuleNotFoundError as error:
        raise typer.BadParameter("--charts needs matplotlib: pip install matplotlib") from error


def draw(results: dict[str, Any], folder: Path) -> list[Path]:
    """speedup.png and roofline.png of a results file; needs matplotlib."""
    if not any(_timed(row, "tilewise") for row in results["rows"]):
        raise typer.BadParameter("--charts needs times of Tilewise, and there are none")
    _matplotlib().use("Agg")
    plt: Any = importlib.import_module("matplotlib.pyplot")
    style = {
        "font.size": 10, "axes.spines.top": False, "axes.spines.right": False,
        "axes.grid": True, "grid.color": "#dddddd", "grid.linewidth": 0.6, "axes.axisbelow": True,
        "figure.dpi": 110, "savefig.bbox": "tight",
    }  # fmt: skip
    paths = []
    with plt.rc_context(style):
        for name, chart in (("speedup", _speedup), ("roofline", _roofline)):
            figure = chart(plt, results)
            paths.append(folder / f"{name}.png")
            figure.savefig(paths[-1])
            plt.close(figure)
    return paths


def _where(meta: dict[str, Any]) -> str:
    machine = f"one {meta['hardware']}" if not meta.get("meaningless") else "a CPU: means nothing"
    versions = f"torch {str(meta['torch']).split('+')[0]}, Triton {meta['triton']}"
    return f"{machine}, {meta.get('dtype', 'bf16').replace('bfloat16', 'bf16')}, {versions}"


def _speedup(plt: Any, results: dict[str, Any]) -> Any:
    """Each peer's time over ours, by token count; below 1 the peer is faster."""
    rows = results["rows"]
    tokens = sorted({row["T"] for row in rows})
    figure, axes = plt.subplots(figsize=(7.2, 4.2))
    axes.axhline(1.0, color="#222222", linewidth=1.2)
    # As wide apart as their logarithms, each group's points side by side.
    place = {count: index for index, count in enumerate(tokens)}
    rivals = [name for name in names_of(rows) if name != "tilewise"]
    lowest, highest = 1.0, 1.0
    for number, name in enumerate(rivals):
        shift = (number - (len(rivals) - 1) / 2) * 0.14
        xs, middles, lows, highs = [], [], [], []
        for count in tokens:
            ratios = [
                row["peers"][name]["us"] / row["peers"]["tilewise"]["us"]
                for row in rows
                if row["T"] == count and _timed(row, name) and _timed(row, "tilewise")
            ]
            if ratios:
                xs.append(place[count] + shift)
                middles.append(geomean(ratios))
                lows.append(min(ratios))
                highs.append(max(ratios))
        lowest, highest = min([lowest, *lows]), max([highest, *highs])
        colour = COLOURS[number % len(COLOURS)]
        axes.vlines(xs, lows, highs, color=colour, linewidth=2.0, alpha=0.35)
        axes.plot(
            xs, middles, color=colour, marker=MARKERS[number % len(MARKERS)], markersize=5.5,
            linewidth=1.4, label=LABELS.get(name, name),
        )  # fmt: skip
    axes.set_yscale("log")
    possible = (0.1, 0.25, 0.5, 0.75, 1, 1.5, 2, 3, 4, 6, 8, 12, 16, 32, 64)
    ticks = [tick for tick in possible if lowest / 1.2 <= tick <= highest * 1.1]
    axes.set_ylim(lowest / 1.12, highest * 1.12)
    axes.set_yticks(ticks, [f"{t:g}x" for t in ticks])
    axes.minorticks_off()
    axes.set_xticks(range(len(tokens)), [f"{count:,}" for count in tokens])
    axes.set_xlabel("tokens in the batch")
    axes.set_ylabel("time over Tilewise's time")
    figure.suptitle(
        "How much longer the others take (below 1x: the other is faster)", x=0.02, ha="left",
        fontsize=11.5, fontweight="bold",
    )  # fmt: skip
    axes.set_title(
        f"geometric mean and range of {len(rows)} cells · {_where(results['meta'])}",
        loc="left", fontsize=8.5, color="#555555",
    )  # fmt: skip
    if rivals:
        axes.legend(frameon=False, fontsize=9, loc="upper right")
    return figure


def _roofline(plt: Any, results: dict[str, Any]) -> Any:
    """Our rate against FLOPs per compulsory byte, under the rates that the floors assume."""
    rows = [row for row in results["rows"] if _timed(row, "tilewise")]
    # A floor is bytes over one rate or FLOPs over the other: the largest quotients are the rates.
    bandwidth = max(compulsory_bytes(row) / row["floor_us"] / 1e6 for row in rows)  # TB/s
    peak = max(flops(row) / row["floor_us"] / 1e6 for row in rows)  # TFLOP/s
    figure, axes = plt.subplots(figsize=(7.2, 4.4))
    intensity = [flops(row) / compulsory_bytes(row) for row in rows]
    low, high = min(intensity) / 1.6, max(max(intensity), peak / bandwidth) * 1.6
    ridge = peak / bandwidth
    axes.plot([low, ridge, high], [low * bandwidth, peak, peak], color="#222222", linewidth=1.4)
    counts = sorted({row["T"] for row in rows})
    colours = plt.get_cmap("viridis")
    for number, count in enumerate(counts):
        chosen = [row for row in rows if row["T"] == count]
        axes.scatter(
            [flops(row) / compulsory_bytes(row) for row in chosen],
            [flops(row) / row["peers"]["tilewise"]["us"] / 1e6 for row in chosen],
            s=22, color=colours(0.92 * number / max(1, len(counts) - 1)), edgecolor="white",
            linewidth=0.4, label=f"{count:,}", zorder=3,
        )  # fmt: skip
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.text(high, peak * 1.06, f"{peak:,.0f} TFLOP/s", ha="right", va="bottom", fontsize=8.5)
    middle = math.sqrt(low * ridge)
    axes.text(
        middle / 1.5, middle * bandwidth * 1.25, f"{bandwidth * 1e3:,.0f} GB/s", fontsize=8.5,
        ha="right", va="bottom",
    )  # fmt: skip
    axes.set_xlabel("FLOPs per compulsory byte (active weights, input, output)")
    axes.set_ylabel("TFLOP/s of the whole layer")
    figure.suptitle(
        "Tilewise against the roofline", x=0.02, ha="left", fontsize=11.5, fontweight="bold"
    )
    axes.set_title(
        f"{len(rows)} cells, a point each · {_where(results['meta'])}",
        loc="left", fontsize=8.5, color="#555555",
    )  # fmt: skip
    axes.legend(title="tokens", frameon=False, fontsize=8.5, title_fontsize=8.5, loc="lower right")
    return figure
