"""Where a tile of the grouped products lies, against counting by hand."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from tests.kernels.harness import DEVICE
from tilewise.moe.kernels.grouped import locate, tile_ends


@triton.jit
def places_kernel(
    out_ptr, sizes_ptr, num_segments, tiles_n, num_tiles,
    BLOCK_M: tl.constexpr, GROUP_M: tl.constexpr, SEGMENTS: tl.constexpr,
):  # fmt: skip
    sizes, ends = tile_ends(sizes_ptr, num_segments, tiles_n, BLOCK_M, SEGMENTS)
    tl.store(out_ptr + 5 * num_tiles, tl.max(ends, 0))
    for tile in tl.range(0, num_tiles):
        segment, offset, size, tile_m, tile_n = locate(
            sizes, ends, tile, tiles_n, GROUP_M, BLOCK_M, SEGMENTS
        )
        tl.store(out_ptr + 5 * tile, segment)
        tl.store(out_ptr + 5 * tile + 1, offset)
        tl.store(out_ptr + 5 * tile + 2, size)
        tl.store(out_ptr + 5 * tile + 3, tile_m)
        tl.store(out_ptr + 5 * tile + 4, tile_n)


def by_hand(sizes: list[int], tiles_n: int, block_m: int, group_m: int) -> list[tuple[int, ...]]:
    places = []
    for segment, size in enumerate(sizes):
        rows = range(-(-size // block_m))
        for first in rows[::group_m]:
            for tile_n in range(tiles_n):
                for tile_m in rows[first : first + group_m]:
                    places.append((segment, sum(sizes[:segment]), size, tile_m, tile_n))
    return places


@pytest.mark.parametrize("group_m", [1, 3, 8])
@pytest.mark.parametrize(
    "sizes",
    [[5], [0, 0, 33, 0, 16, 17, 0], [16] * 20, [0] * 40 + [100] + [0] * 40, [1] * 257, [47, 0, 96]],
    ids=lambda sizes: f"{len(sizes)} of {sum(sizes)}",
)
def test_tiles_of_ragged_segments(sizes: list[int], group_m: int) -> None:
    tiles_n, block_m = 3, 16
    wanted = by_hand(sizes, tiles_n, block_m, group_m)
    out = torch.full((5 * len(wanted) + 1,), -1, dtype=torch.int32, device=DEVICE)
    given = torch.tensor(sizes, dtype=torch.int32, device=DEVICE)
    segments = max(256, triton.next_power_of_2(len(sizes)))
    places_kernel[(1,)](out, given, len(sizes), tiles_n, len(wanted), block_m, group_m, segments)
    assert out[-1] == len(wanted)
    assert [tuple(place) for place in out[:-1].view(-1, 5).tolist()] == wanted


def test_rows_near_the_limit() -> None:
    """2^31 - 1024 rows in two segments, counted in 32 bits."""
    sizes, block_m = [2**30 - 512, 0, 2**30 - 512], 128
    tiles = -(-sizes[0] // block_m)
    given = torch.tensor(sizes, dtype=torch.int32, device=DEVICE)
    out = torch.full((5,), -1, dtype=torch.int32, device=DEVICE)

    one_place_kernel[(1,)](out, given, 3, 2 * tiles - 1, block_m, 256)
    assert out.tolist() == [2, sizes[0], sizes[2], tiles - 1, 0]


@triton.jit
def one_place_kernel(
    out_ptr, sizes_ptr, num_segments, tile, BLOCK_M: tl.constexpr, SEGMENTS: tl.constexpr
):
    sizes, ends = tile_ends(sizes_ptr, num_segments, 1, BLOCK_M, SEGMENTS)
    segment, offset, size, tile_m, tile_n = locate(sizes, ends, tile, 1, 8, BLOCK_M, SEGMENTS)
    tl.store(out_ptr, segment)
    tl.store(out_ptr + 1, offset)
    tl.store(out_ptr + 2, size)
    tl.store(out_ptr + 3, tile_m)
    tl.store(out_ptr + 4, tile_n)
