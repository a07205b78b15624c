"""Ragged work: segments of uneven size. Experts and tokens today; postings and documents later."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # Decisions count tiles without torch.
    import torch


def max_tiles(num_rows: int, num_segments: int, block: int) -> int:
    """The most tiles of `block` rows that `num_rows` rows can need over `num_segments` segments.

    Host arithmetic only. The worst case puts one row in every segment but the last, which takes the
    rest: so `num_rows` when rows are fewer than segments.
    """
    if num_rows <= num_segments:
        return num_rows
    return num_segments - 1 + -(-(num_rows - num_segments + 1) // block)


@dataclass(frozen=True, eq=False)
class Ragged:
    """Rows grouped into consecutive segments, all on the device.

    Example, five assignments to three experts, `ids = [2, 0, 2, -1, 0]`:
        sizes   = [2, 0, 2]
        offsets = [0, 2, 2, 4]
        gather  = [1, 4, 0, 2, *]     row -> assignment, in order within a segment
        scatter = [2, 0, 3, -1, 1]    assignment -> row, -1 where it belongs to no segment

    Attributes:
        sizes: int32 [num_segments], rows of each segment.
        offsets: int32 [num_segments + 1], first row of each segment; the last is the row count.
        gather: int32 [num_rows bound], the source of each row; past `offsets[-1]` unspecified.
        scatter: int32 [num_rows bound], the inverse of `gather`; -1 for a skipped source.
    """

    sizes: torch.Tensor
    offsets: torch.Tensor
    gather: torch.Tensor
    scatter: torch.Tensor

    @property
    def num_segments(self) -> int:
        return self.sizes.shape[0]

    @property
    def max_rows(self) -> int:
        """Host-side bound on the number of rows."""
        return self.gather.shape[0]

    def max_tiles(self, block: int) -> int:
        """Host-side bound on the number of `block`-row tiles over all segments."""
        return max_tiles(self.max_rows, self.num_segments, block)
