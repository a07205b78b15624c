"""What a profile of a layer is measured on: routings by name at spread batch sizes, and traces."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..dispatch.select import FITTED_FROM, bucket
from ..models import MoEShape
from . import measure
from .routings import expert_ids, fingerprint, sizes_of

COUNTS = 7  # Batch sizes, evenly spread in octaves.
# Families at each of the seven batch sizes: 22 histograms.
FAMILIES = {
    "uniform": (0, 1, 2, 3, 4, 5, 6),
    "hot": (0, 1, 2, 3, 4, 5, 6),
    "zipf1.2": (1, 3, 5),
    "dirichlet3": (2, 4),
    "few0.25": (2, 3),
    "bimodal": (4,),
}
TRACED = 8  # Batch sizes of a trace, the most frequent one of an octave.


@dataclass(frozen=True, eq=False)
class Workload:
    """Batches of one size routed in one way.

    Attributes:
        routing: a family of `routings.expert_ids`, or "trace-" and a fingerprint.
        num_tokens: of each batch.
        recorded: int32 [num_tokens, top_k] on the CPU, of a trace; -1 for ids held elsewhere.
    """

    routing: str
    num_tokens: int
    recorded: tuple[Tensor, ...] = ()

    def routings(self, shape: MoEShape, stage: str, device: str) -> list[Tensor]:
        """As many ids [num_tokens, top_k] as keep a product's weights out of L2, on `device`."""
        generator = torch.Generator(device=device).manual_seed(self.num_tokens)

        def draw() -> Tensor:
            return expert_ids(self.routing, self.num_tokens, shape, generator)

        first = self.recorded[0].to(device) if self.recorded else draw()
        count = measure.num_sets(shape, stage, int(first[first >= 0].unique().numel()))
        if not self.recorded:
            return [first, *(draw() for _ in range(count - 1))]
        step = max(1, len(self.recorded) // count)
        ids = [one.to(device) for one in self.recorded[::step][:count]]
        while len(ids) < count:  # The same histogram on other experts, whose weights are not in L2.
            order = torch.randperm(shape.num_experts, generator=generator, device=device)
            again = ids[len(ids) % len(self.recorded)]
            renamed = order.to(torch.int32)[again.clamp(min=0).long()]
            ids.append(torch.where(again >= 0, renamed, -1).contiguous())
        return ids


def token_counts(max_tokens: int) -> list[int]:
    """Up to seven batch sizes from the fewest that costs are fitted to, to `max_tokens`.

    Raises:
        ValueError: fewer tokens than any cost is fitted to.
    """
    if max_tokens < FITTED_FROM:
        raise ValueError(
            f"max_tokens={max_tokens} must be at least {FITTED_FROM}: costs are not fitted to fewer"
        )
    ratio = max_tokens / FITTED_FROM
    counts = [bucket(round(FITTED_FROM * ratio ** (i / (COUNTS - 1)))) for i in range(COUNTS)]
    return [min(count, max_tokens) for count in counts]


def named(max_tokens: int) -> list[Workload]:
    """The synthetic workloads, those that say most first; 22 but for small `max_tokens`."""
    counts = token_counts(max_tokens)
    pairs = dict.fromkeys((name, counts[i]) for name, at in FAMILIES.items() for i in at)
    return [Workload(name, count) for name, count in pairs]


def traced(calls: Sequence[Tensor], shape: MoEShape, max_tokens: int) -> list[Workload]:
    """Workloads of recorded calls.

    Args:
        calls: ids [num_tokens, top_k] of calls of such a layer; outside of [0, E) they are skipped.

    Raises:
        ValueError: no call that the layer could have had, from 4 to `max_tokens` tokens.
    """
    by_count: dict[int, list[Tensor]] = {}
    for ids in calls:
        if ids.shape[1] == shape.top_k and FITTED_FROM <= ids.shape[0] <= max_tokens:
            ours = (ids >= 0) & (ids < shape.num_experts)
            if bool(ours.any()):
                local = torch.where(ours, ids, -1).to(torch.int32).cpu().contiguous()
                by_count.setdefault(ids.shape[0], []).append(local)
    if calls and not by_count:
        seen = sorted({(ids.shape[1], ids.shape[0]) for ids in calls})[:4]
        raise ValueError(
            f"the traces have no call with top_k={shape.top_k} and {FITTED_FROM} to {max_tokens} "
            f"tokens; they have (top_k, tokens) {seen}: record this model, or raise --max-tokens"
        )
    usual: dict[int, int] = {}  # Octave: its most frequent batch size.
    for count, group in sorted(by_count.items()):
        octave = count.bit_length()
        if octave not in usual or len(group) > len(by_count[usual[octave]]):
            usual[octave] = count
    kept = sorted(usual.values(), key=lambda count: -len(by_count[count]))[:TRACED]
    out = []
    for count in sorted(kept):
        group = by_count[count]
        sizes = [size for ids in group for size in sizes_of(ids, shape.num_experts)]
        out.append(Workload(f"trace-{fingerprint(sizes)}", count, tuple(group)))
    return out
