"""`tilewise tune`: profiles one layer on this machine's GPU, for later processes to choose by."""

from __future__ import annotations

import importlib.util
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..models import MoEShape
from .shapes import HELP, parse_shape

if TYPE_CHECKING:
    import torch
    from rich.console import Console

    from ..dispatch.config import KernelConfig
    from ..tune.profile import Report

Paths = list[Path] | None


def _files(text: str) -> Any:
    """An option that takes files that exist."""
    return typer.Option(exists=True, dir_okay=False, help=text)


def tune(
    model: Annotated[str, typer.Argument(help=HELP)],
    max_tokens: int = typer.Option(8192, min=4, help="The largest batch to time."),
    traces: Annotated[Paths, _files("Recorded routing to time too; may be repeated.")] = None,
    hints: Annotated[Paths, _files("vLLM's or SGLang's JSON: configurations to try too.")] = None,
    merge: Annotated[Paths, _files("Profiles of this layer from such machines, to add.")] = None,
    out: Annotated[
        Path | None,
        typer.Option(dir_okay=False, help="Instead of $TILEWISE_PROFILES or ~/.cache/tilewise."),
    ] = None,
    limit: float = typer.Option(
        150.0, "--time-limit", min=0.0, metavar="S", help="No measurement begins after that."
    ),
    jobs: int = typer.Option(min(16, os.cpu_count() or 1), min=1, help="Processes that compile."),
) -> None:
    """Measure a layer here, in one or two minutes, and fit what later processes choose by.

    Every measurement is saved: the same command continues what was stopped.
    """
    import torch
    from rich.console import Console

    from ..target import Target
    from ..tune import store
    from ..tune.gain import gain
    from ..tune.profile import check_possible, profile_shape

    console = Console(width=None if sys.stdout.isatty() else 110)
    began = time.monotonic()
    if importlib.util.find_spec("scipy") is None:
        raise typer.BadParameter("fitting needs scipy: pip install 'tilewise[tune]'")
    try:
        shape, target = parse_shape(model), Target.probe()
        check_possible(shape, target)
        path = out if out is not None else store.default_path(shape, target)
        if merge:
            merge_into(path, merge, store.here(shape, target))
        with progress(console) as report:
            profile = profile_shape(
                shape, target, max_tokens=max_tokens, calls=recorded(traces or [], shape),
                hints=hinted(hints or [], target.tensor_descriptors), path=path,
                seconds=max(0.0, limit - (time.monotonic() - began)), jobs=jobs, report=report,
            )  # fmt: skip
    except (ValueError, OSError) as error:
        raise typer.BadParameter(str(error)) from error
    except torch.OutOfMemoryError as error:
        raise typer.BadParameter(
            f"out of memory: {str(error).splitlines()[0]} Try a smaller --max-tokens or a shard"
        ) from error
    except KeyboardInterrupt:
        console.print(f"stopped; the same command continues from {path}", highlight=False)
        raise
    say = f"{len(profile.rows)} rows, {time.monotonic() - began:.0f} s: {path}"
    console.print(say, highlight=False, soft_wrap=True)
    for name, why in sorted(
        {name: why for row in profile.rows for name, why in row["failed"].items()}.items()
    ):
        console.print(f"[yellow]left out[/yellow] {name}: {why}", highlight=False)
    if profile.table is None:
        console.print("[yellow]Too few rows for a choice: the same command measures the rest.")
        raise typer.Exit(1)
    worth = gain(profile)
    if worth is not None:
        console.print(
            f"Over the fastest of each of {worth.cases} cases: {worth.before - 1:.1%} without this "
            f"profile, {worth.after - 1:.1%} with it.",
            highlight=False,
        )
        if worth.after > worth.before:
            console.print(f"[yellow]It gains nothing here: delete {path} to be without it.")


def recorded(paths: list[Path], shape: MoEShape) -> list[torch.Tensor]:
    """The ids of every call in the traces of layers with so many experts.

    Raises:
        ValueError: no trace, or of other layers; safetensors is missing.
    """
    if not paths:
        return []
    if importlib.util.find_spec("safetensors") is None:
        raise ValueError("reading traces needs safetensors: pip install safetensors")
    from ..integrations.record import Trace

    calls = []
    for path in paths:
        try:
            trace = Trace.load(path)
        except ValueError:
            raise
        except Exception as error:  # What safetensors raises of a file that is none.
            raise ValueError(f"{path} is no trace: {error}") from error
        ours = [call.ids for call in trace if call.num_experts == shape.num_experts]
        if not ours:
            seen = sorted({call.num_experts for call in trace})
            raise ValueError(
                f"{path} has layers of {seen} experts, not {shape.num_experts}: record this model"
            )
        calls += ours
    return calls


def hinted(paths: list[Path], descriptors: bool) -> dict[str, list[KernelConfig]]:
    """Configurations of both products from files of vLLM or SGLang."""
    from ..tune.interchange import hints, import_sglang

    found: dict[str, list[KernelConfig]] = {"gate_up": [], "down": []}
    for path in paths:  # Without a `_down` file beside it, one of SGLang is one of vLLM.
        for stage, configs in hints(import_sglang(path), descriptors).items():
            found[stage] += configs
    return found


def merge_into(path: Path, others: list[Path], key: dict[str, object]) -> None:
    """Adds rows of other files to the profile at `path`, which need not exist.

    Raises:
        ValueError: one is no profile, or of another key.
    """
    from ..tune import store

    merged = store.load(path) if path.exists() else store.Profile(key)
    for other in others:
        merged = store.merge(merged, store.load(other))
    store.save(merged, path)


@contextmanager
def progress(console: Console) -> Iterator[Report]:
    """A bar for each phase, as `profile_shape` reports them."""
    from rich.progress import Progress, TaskID

    with Progress(console=console, transient=True) as bars:
        tasks: dict[str, TaskID] = {}

        def report(phase: str, done: int, total: int) -> None:
            if phase not in tasks:
                tasks[phase] = bars.add_task(phase, total=total)
            bars.update(tasks[phase], completed=done, total=total)

        yield report
