"""Layers as commands take them: a model's name, a shard of it, or sizes."""

from __future__ import annotations

import re

from ..models import MoEShape, moe_shape

HELP = 'A model by name, a shard of it ("deepseek-v3-tp8", "kimi-k2-ep8"), or sizes: E,K,H,I.'


def parse_shape(text: str) -> MoEShape:
    """A model by name, a shard of it, or "E,K,H,I": experts, top_k, hidden and intermediate size.

    Raises:
        ValueError: neither.
    """
    if "," not in text:
        try:
            return moe_shape(text)
        except ValueError as error:
            raise ValueError(
                f"{error}. A shard is NAME-tpN or NAME-epN, another layer its sizes E,K,H,I, such "
                "as 128,8,2048,768"
            ) from error
    sizes = text.replace(" ", "").split(",")
    if len(sizes) != 4 or not all(re.fullmatch(r"[1-9]\d*", size) for size in sizes):
        raise ValueError(
            f"{text!r}: a layer's sizes are E,K,H,I (experts, top_k, hidden, intermediate), four "
            "positive integers, such as 128,8,2048,768"
        )
    return MoEShape(*map(int, sizes))
