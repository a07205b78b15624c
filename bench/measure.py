"""Runs the cells: weights once per shape, all peers of a cell in one paired measurement."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench import machine, protocol
from bench.accuracy import TOLERANCE, Reference, make_reference
from bench.peers import base
from bench.peers.base import Layer, Peer
from bench.protocol import ROUTINGS, SHAPES, TOKENS, Captured, Inputs
from bench.results import Cell, Results, Row

PROVENANCE = ("commit", "source", "hardware", "driver", "torch", "triton")


@dataclass(frozen=True)
class Options:
    """What to measure and how long."""

    shapes: tuple[str, ...] = tuple(SHAPES)
    tokens: tuple[int, ...] = TOKENS
    routings: tuple[str, ...] = ROUTINGS
    peers: tuple[str, ...] = base.DEFAULT
    rounds: int = 3
    target_ms: float = 12.0
    max_replays: int = 40
    time_limit: float = math.inf
    device: str = "cuda"


class CudaFailure(RuntimeError):
    """A peer broke the CUDA context; the results so far are saved."""


def pending(options: Options, results: Results, peers: Mapping[str, Peer]) -> list[Cell]:
    """Returns the cells asked for that are not measured with all these peers."""
    cells = (
        (shape, tokens, routing)
        for shape in options.shapes
        for tokens in options.tokens
        for routing in options.routings
    )
    return [cell for cell in cells if not results.is_done(cell, peers)]


def describe_run(
    options: Options, results: Results, peers: Mapping[str, Peer], missing: Mapping[str, str]
) -> None:
    """Fills the meta of the results: hardware, versions, ceilings, peers, what is missing.

    Raises:
        ValueError: The file holds rows of other hardware or versions.
    """
    here = machine.describe()
    for key in ("hardware", "torch", "triton"):
        if results.rows and results.meta.get(key) != here[key]:
            was = results.meta.get(key)
            raise ValueError(f"{results.path} was measured with {key} {was!r}; write another file")
    if "copy_GBs" not in results.meta:
        here |= machine.ceilings()
    results.meta |= here | {
        "rounds": options.rounds,
        "target_ms": options.target_ms,
        "max_replays": options.max_replays,
        "peers": {name: peer.version for name, peer in peers.items()},
        "notes": {name: peer.notes for name, peer in peers.items() if peer.notes},
        "missing": dict(missing),
    }
    results.save()


def measure(options: Options, results: Results, peers: Mapping[str, Peer]) -> Iterator[Row]:
    """Measures the pending cells, saves after each, and yields its row.

    Stops before the next cell once the time limit has passed.

    Raises:
        CudaFailure: A peer broke the CUDA context; a new run resumes behind its cell.
    """
    deadline = time.monotonic() + options.time_limit
    cells = pending(options, results, peers)
    for name in options.shapes:
        of_shape = [cell for cell in cells if cell[0] == name]
        if not of_shape or time.monotonic() > deadline:
            continue
        w13, w2 = protocol.make_weights(SHAPES[name], device=options.device)
        layers, errors = prepare(peers, w13, w2)
        for cell in of_shape:
            if time.monotonic() > deadline:
                break
            row, broken_by = _measure_cell(cell, options, layers, errors, w13, w2)
            row |= {key: results.meta.get(key) for key in PROVENANCE}
            results.put(row)
            results.meta["noise"] = noise(results.rows)
            results.save()
            yield row
            if broken_by:
                raise CudaFailure(f"{broken_by} broke the CUDA context at {cell}")
            _release(options.device)
        del w13, w2, layers
        _release(options.device)


def prepare(
    peers: Mapping[str, Peer], w13: Tensor, w2: Tensor
) -> tuple[dict[str, Layer], dict[str, str]]:
    """Lays out the weights for each peer; a peer timed again shares its layer.

    Returns:
        The layers, and the error of each peer that could not take the weights.
    """
    layers: dict[str, Layer] = {}
    errors: dict[str, str] = {}
    for name, peer in peers.items():
        first = next((done for done in layers if base.original(done) == base.original(name)), None)
        try:
            layers[name] = layers[first] if first else peer.prepare(w13, w2)
        except Exception as error:
            errors[name] = base.describe_error(error)
    return layers, errors


def noise(rows: list[Row]) -> dict[str, dict[str, float]]:
    """Returns how far a peer lands from itself, |ratio - 1| over all cells, by peer timed again."""
    out = {}
    for again in sorted({name for row in rows for name in row["peers"] if base.AGAIN in name}):
        ratios = sorted(
            abs(row["peers"][again]["us"] / row["peers"][base.original(again)]["us"] - 1)
            for row in rows
            if all("us" in row["peers"].get(n, {}) for n in (again, base.original(again)))
        )
        if ratios:
            out[base.original(again)] = {
                "median": statistics.median(ratios),
                "p95": ratios[math.ceil(0.95 * len(ratios)) - 1],
                "max": ratios[-1],
            }
    return out


def _measure_cell(
    cell: Cell,
    options: Options,
    layers: Mapping[str, Layer],
    errors: Mapping[str, str],
    w13: Tensor,
    w2: Tensor,
) -> tuple[Row, str | None]:
    name, num_tokens, routing = cell
    shape = SHAPES[name]
    sets, active = protocol.build_sets(routing, num_tokens, shape, device=options.device)
    floor, floor2 = protocol.floors_us(num_tokens, shape, active)
    reference = make_reference(*sets[0], w13, w2)
    entries: dict[str, dict[str, Any]] = {peer: {"error": text} for peer, text in errors.items()}
    captured: dict[str, Captured] = {}
    broken_by: str | None = None
    for peer, layer in layers.items():
        try:
            captured[peer], entries[peer] = _capture(layer, sets, reference)
        except Exception as error:
            entries[peer] = {"error": base.describe_error(error)}
            if not _cuda_works(options.device):
                broken_by = peer
                break
    try:
        times = {} if broken_by else _time(captured, options)
    except Exception as error:
        times = {}
        text = f"while timing: {base.describe_error(error)}"
        entries |= {peer: {"error": text} for peer in captured}
        broken_by = None if _cuda_works(options.device) else " or ".join(captured)
    if broken_by:
        text = f"not measured: {broken_by} broke the CUDA context"
        entries = {peer: {"error": text} for peer in layers} | _errors(entries)
    limit = protocol.limit_us(num_tokens, shape, active)
    for peer, rounds in times.items():
        entries[peer] = _judge(entries[peer], rounds, limit, reference.err_bf16)
    row = {
        **{"shape": name, "E": shape.num_experts, "topk": shape.top_k},
        **{"H": shape.hidden_size, "I": shape.intermediate_size, "T": num_tokens},
        **{"routing": routing, "active": active, "sets": len(sets)},
        **{"floor_us": floor, "floor2_us": floor2, "err_bf16_torch": reference.err_bf16},
        "peers": entries,
    }
    return row, broken_by


def _capture(
    layer: Layer, sets: list[Inputs], reference: Reference
) -> tuple[Captured, dict[str, Any]]:
    captured = protocol.capture([partial(layer, *inputs) for inputs in sets])
    return captured, {"err": reference.error(captured.outputs[0])}


def _errors(entries: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {peer: entry for peer, entry in entries.items() if "error" in entry}


def _time(captured: dict[str, Captured], options: Options) -> dict[str, list[float]]:
    return protocol.paired_us(
        captured,
        rounds=options.rounds,
        target_ms=options.target_ms,
        max_replays=options.max_replays,
    )


def _judge(
    entry: dict[str, Any], rounds: list[float], limit: float, err_bf16: float
) -> dict[str, Any]:
    """Completes an entry: times, and flags for what no correct layer would show."""
    us = statistics.median(rounds)
    flags = []
    if us < limit:
        flags.append(f"wrong: faster than the nominal limit of {limit:.1f} us")
    if not entry["err"] <= TOLERANCE * err_bf16:
        flags.append(f"error above {TOLERANCE} times that of plain bf16")
    err = entry["err"] if math.isfinite(entry["err"]) else None
    return {"us": us, "us_rounds": rounds, "err": err} | ({"flags": flags} if flags else {})


def _release(device: str) -> None:
    """Gives back what the graphs of a cell held, before the next cell asks for more."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def _cuda_works(device: str) -> bool:
    if device != "cuda":
        return True
    try:
        torch.cuda.synchronize()
        torch.ones(1, device="cuda").item()
    except Exception:
        return False
    return True
