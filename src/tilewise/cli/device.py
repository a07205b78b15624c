"""Which device a command runs on, and what to say of one that is not there."""

from __future__ import annotations

import torch
import typer


def checked_device(wanted: str) -> str:
    """The device asked for, or the GPU if there is one.

    Raises:
        typer.BadParameter: Not "cpu" or "cuda" or "cuda:N" of this machine.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not wanted:
        return "cuda" if count else "cpu"
    known = ["cpu", *(["cuda"] if count else []), *(f"cuda:{i}" for i in range(count))]
    if wanted not in known:
        why = "" if count else f"; torch {torch.__version__} finds no GPU here"
        raise typer.BadParameter(f"--device {wanted!r}: use one of {', '.join(known)}{why}")
    return wanted
