"""`tilewise tune-export`: a profile's choices as configuration files of vLLM or SGLang."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

HOSTS = ("vllm", "sglang")


def tune_export(
    profile: Annotated[
        Path, typer.Argument(exists=True, dir_okay=False, help="What `tilewise tune` wrote.")
    ],
    host: str = typer.Option(..., "--to", help=f"One of {', '.join(HOSTS)}."),
    out: Annotated[
        Path,
        typer.Option(file_okay=False, help="$VLLM_TUNED_CONFIG_FOLDER, $SGLANG_MOE_CONFIG_DIR."),
    ] = Path("."),
    device_name: str = typer.Option(
        "", help="Of the GPU to serve on; the profiled one's if empty."
    ),
) -> None:
    """Write a host's files for its own Triton kernel: hints, from times of Tilewise's kernels."""
    from ..tune import store
    from ..tune.interchange import export_sglang, export_vllm

    if host not in HOSTS:
        raise typer.BadParameter(f"--to {host!r}: use one of {', '.join(HOSTS)}")
    export = export_vllm if host == "vllm" else export_sglang
    try:
        written = export(store.load(profile), out, device_name)
    except (ValueError, OSError) as error:
        raise typer.BadParameter(str(error)) from error
    for path in written:
        typer.echo(f"wrote {path}")
    typer.echo(f"Hints: {host}'s own kernel was not timed. Compare before you serve with them.")
