"""Tile bounds against every way to spread rows, and the catalogue of shapes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tilewise import MODELS, MoEShape, moe_shape
from tilewise.models import ALIASES
from tilewise.ragged import Ragged, max_tiles


def spreads(rows: int, segments: int) -> Iterator[tuple[int, ...]]:
    if segments == 1:
        yield (rows,)
        return
    for first in range(rows + 1):
        for rest in spreads(rows - first, segments - 1):
            yield (first, *rest)


@pytest.mark.parametrize("block", [1, 2, 3, 4])
@pytest.mark.parametrize("segments", [1, 2, 3, 4])
def test_max_tiles_is_the_worst_case(segments: int, block: int) -> None:
    for rows in range(10):
        worst = max(sum(-(-n // block) for n in s) for s in spreads(rows, segments))
        assert max_tiles(rows, segments, block) == worst, (rows, segments, block)


def test_max_tiles_by_hand() -> None:
    # 127 experts with one row each, and 4096 - 127 = 3969 rows in 63 tiles of 64.
    assert max_tiles(4096, 128, 64) == 127 + 63
    assert max_tiles(16, 128, 64) == 16
    assert max_tiles(0, 128, 64) == 0


def test_ragged_reports_its_bounds() -> None:
    ints = torch.zeros(10, dtype=torch.int32)
    ragged = Ragged(ints[:3], ints[:4], ints, ints)
    assert (ragged.num_segments, ragged.max_rows) == (3, 10)
    assert ragged.max_tiles(4) == 4  # Two single rows, and eight in two tiles.


def test_moe_shape() -> None:
    assert moe_shape("mixtral-8x7b") == MoEShape(8, 2, 4096, 14336)
    assert moe_shape("mixtral-8x7b@tp8") == MoEShape(8, 2, 4096, 1792)
    assert moe_shape("qwen3-30b-a3b").sharded(3) == MoEShape(128, 8, 2048, 256)
    for name, shape in MODELS.items():
        assert moe_shape(name) is shape
        assert moe_shape(f"{name}@tp1") == shape


def test_shapes_by_other_names() -> None:
    assert moe_shape("Qwen/Qwen3-30B-A3B@tp2") == MODELS["qwen3-30b-a3b"].sharded(2)


def test_shards_by_name() -> None:
    """One device's part of any model: of its intermediate size, of its experts, of both."""
    assert moe_shape("qwen3-235b-a22b-tp8") == MoEShape(128, 8, 4096, 192)
    assert moe_shape("kimi-k2-ep8") == moe_shape("Kimi-K2@ep8") == MoEShape(48, 8, 7168, 2048)
    assert moe_shape("kimi-k2-ep8-tp2") == moe_shape("kimi-k2-tp2-ep8")
    assert moe_shape("kimi-k2-ep8-tp2") == MoEShape(48, 8, 7168, 1024)
    for name, shape in MODELS.items():
        assert moe_shape(f"{name}-tp2") == moe_shape(f"{name}@tp2") == shape.sharded(2)
        assert moe_shape(f"{name}-ep2") == shape.sharded(expert_parallel=2)
        assert moe_shape(f"{name}-tp1-ep1") == shape


def test_short_names() -> None:
    for short, name in ALIASES.items():
        assert short not in MODELS and moe_shape(short) is MODELS[name]
        assert moe_shape(f"{short}-tp8") == MODELS[name].sharded(8)


@pytest.mark.parametrize(
    "suffix",
    ["@tp", "@xx", "@tptp2", "@tp0", "@", "-tp", "-ep", "-tp0", "-ep-2", "-tp2x", "-tp2-tp4",
     "-tp2.5", "-tp2@", "-tp\u0662"],
)  # fmt: skip
def test_suffixes_that_are_no_shard(suffix: str) -> None:
    with pytest.raises(ValueError, match="suffix of a shard is -tpN or -epN"):
        moe_shape(f"mixtral-8x7b{suffix}")


def test_shards_that_do_not_divide() -> None:
    for name, words in {
        "mixtral-8x7b-tp5": "14336 does not divide by 5: .* a divisor of it, 1, 2, 4, 7, 8, .*64",
        "kimi-k2-ep5": "num_experts=384 does not divide by 5: .* 1, 2, 3, 4, 6, 8, .* or 48",
        "mixtral-8x7b-ep8": "8 over 8 devices leaves each fewer than top_k=2: use 1, 2 or 4",
    }.items():
        with pytest.raises(ValueError, match=f"{name!r}: .*{words}"):
            moe_shape(name)


def test_names_that_are_near_or_none() -> None:
    for name, words in {
        "qwen3-30b-a3": "'qwen3-30b-a3b'",
        "qwen3-235b-a2b-tp8": "'qwen3-235b-a22b-tp8'",
        "llama4": "'llama4-scout' or 'llama4-maverick'",
        "qwen3-30b-a3b-instruct-2507": "'qwen3-30b-a3b'",
    }.items():
        with pytest.raises(ValueError, match=rf"did you mean {words}.*\?\); known: mixtral"):
            moe_shape(name)
    for name in ("", "-tp2", "@tp2"):
        with pytest.raises(ValueError, match="unknown model ''; known: mixtral"):
            moe_shape(name)
    with pytest.raises(TypeError, match="a model's name is a string, got 3"):
        moe_shape(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"are sizes .*: use MoEShape\(64, 6, 2048, 1408\)"):
        moe_shape("64,6, 2048,1408")


def test_shapes_refuse() -> None:
    with pytest.raises(ValueError, match=r"unknown model 'gpt-2'; known: mixtral-8x7b, .*kimi-k2"):
        moe_shape("gpt-2")
    with pytest.raises(ValueError, match="intermediate_size=14336 does not divide by 5"):
        moe_shape("mixtral-8x7b@tp5")
    with pytest.raises(ValueError, match="does not divide by 0"):
        MODELS["mixtral-8x7b"].sharded(0)
    with pytest.raises(ValueError, match="top_k=3 exceeds num_experts=2"):
        MoEShape(2, 3, 8, 8)
    with pytest.raises(ValueError, match=r"every size must be at least 1, got MoEShape\(.*=0"):
        MoEShape(8, 2, 0, 8)


@pytest.mark.parametrize("size", [8.0, "8", None])
def test_sizes_are_integers(size: object) -> None:
    with pytest.raises(TypeError, match=r"hidden_size=.* must be an integer"):
        MoEShape(8, 2, size, 16)  # type: ignore[arg-type]
