"""Token counts as the commands take them."""

from __future__ import annotations

import re

import typer


def parse_tokens(text: str) -> list[int]:
    """ "1, 64" as [1, 64].

    Raises:
        typer.BadParameter: Anything else than positive integers.
    """
    if re.fullmatch(r"\d+(,\d+)*", text.replace(" ", "")):
        counts = [int(count) for count in text.split(",")]
        if min(counts) >= 1:
            return counts
    raise typer.BadParameter(
        f"--tokens {text!r}: positive integers with commas between them, such as 1,64,4096"
    )
