"""Token counts as the commands take them."""

from __future__ import annotations

import re

import typer

MOST = 2**24


def parse_tokens(text: str) -> list[int]:
    """ "1, 64" as [1, 64].

    Raises:
        typer.BadParameter: Anything else than positive integers.
    """
    if re.fullmatch(r"\s*\d+\s*(,\s*\d+\s*)*", text):
        counts = [int(count) for count in text.split(",")]
        if min(counts) >= 1 and max(counts) <= MOST:
            return counts
    raise typer.BadParameter(
        f"--tokens {text!r}: positive integers with commas between them, up to {MOST}, such as "
        "1,64,4096"
    )
