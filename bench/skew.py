"""Extreme skew: most rows on one expert, measured by the benchmark's own protocol.

``python -m bench.skew`` measures; ``python -m bench.skew report FILE`` prints the speed against
each peer, the cells lost, and how skewed each routing was.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor

from bench import machine, protocol, report
from bench.protocol import SHAPES, Inputs
from bench.report import Table
from bench.results import Results, Row, read_named
from bench.unseen import described, make_options, make_parser, run, warm_all

SKEWED = ("olmoe-1b-7b", "qwen3-30b-a3b", "deepseek-v3")  # 64, 128 and 256 experts
TOKENS = (128, 512, 2048, 8192)
ROUTINGS = ("zipf2", "half", "one")
PEERS = ("tilewise", "vllm", "triton_kernels", "sonic", "tritonmoe")
TARGET_MS = 12.0
OUT = Path(__file__).parent / "results" / "h200_bf16_skew.json"

MakeRouting = Callable[[str, int, int, int, torch.Generator], tuple[Tensor, Tensor]]


def main(arguments: Sequence[str]) -> None:
    """Runs the command line."""
    if arguments[:1] == ["report"]:
        print_report(arguments[1:])
        return
    prog = "python -m bench.skew"
    parser = make_parser(prog, OUT, SKEWED, TOKENS, ROUTINGS, PEERS, TARGET_MS)
    chosen = parser.parse_args(arguments)
    options = make_options(chosen)
    machine.require_gpu()
    with skewed():
        if chosen.warm_only:
            warm_all([options])
            return
        for row in run([options], chosen, "bench.skew"):
            print(described(row), flush=True)
        add_histograms(Results(chosen.out), options.device)
    for table in tables(Results(chosen.out).rows):
        print(table.markdown(), end="\n\n")


def print_report(arguments: Sequence[str]) -> None:
    """Prints every table of a results file as Markdown."""
    results = read_named("python -m bench.skew report", arguments, OUT, ROUTINGS)
    report.show(tables(results.rows), report.remarks(results))


def make_routing(
    kind: str, num_tokens: int, num_experts: int, top_k: int, gen: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Draws a skewed routing on the generator's device, as `protocol.make_routing` does.

    Args:
        kind: ``zipf2``, p(expert) ~ rank^-2 over a random expert order; ``half``, one expert is
            the first choice of half of the tokens; or ``one``, of all. Whatever ``half`` and
            ``one`` leave open is uniform.

    Returns:
        ``topk_ids`` int32 [num_tokens, top_k], distinct per token, the first choice first, and
        ``topk_weights`` fp32 of the same shape, rows summing to 1.
    """
    device = gen.device
    u = torch.rand(num_tokens, num_experts, generator=gen, device=device)
    if kind == "zipf2":
        rank = torch.arange(1, num_experts + 1, device=device, dtype=torch.float32)
        p = rank.pow(-2.0)[torch.randperm(num_experts, generator=gen, device=device)]
        # Gumbel top-k draws distinct experts with the Zipf probabilities.
        score = torch.log(p / p.sum()) - torch.log(-torch.log(u.clamp_(1e-9, 1 - 1e-7)))
    elif kind in ("half", "one"):
        forced = num_tokens // 2 if kind == "half" else num_tokens
        order = torch.randperm(num_tokens, generator=gen, device=device)
        expert = torch.randint(num_experts, (), generator=gen, device=device)
        score = u
        score[order[:forced], expert] = 2.0  # above every uniform draw: the first choice
    else:
        raise ValueError(f"unknown routing {kind!r}; known: {', '.join(ROUTINGS)}")
    ids = score.topk(top_k, dim=-1).indices.to(torch.int32).contiguous()
    logits = torch.randn(num_tokens, top_k, generator=gen, device=device)
    return ids, torch.softmax(logits, -1)


@contextmanager
def skewed() -> Iterator[None]:
    """Lets the benchmark draw these routings by name, here only."""
    original: MakeRouting = protocol.make_routing

    def either(
        kind: str, num_tokens: int, num_experts: int, top_k: int, gen: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        draw = make_routing if kind in ROUTINGS else original
        return draw(kind, num_tokens, num_experts, top_k, gen)

    protocol.make_routing = either
    try:
        yield
    finally:
        protocol.make_routing = original


def histogram(sets: Sequence[Inputs], num_experts: int) -> dict[str, float]:
    """Returns how skewed the input sets are, each number the mean over the sets.

    Returns:
        ``active``, the experts with any row; ``largest_of_rows``, the largest expert's share of
        all rows; ``largest_of_tokens``, the share of the tokens that chose it, whose largest
        possible value is 1; and ``first_of_tokens``, the largest share of the tokens that have the
        same first choice.
    """
    facts = []
    for _, ids, _ in sets:
        every = torch.bincount(ids.flatten().long(), minlength=num_experts)
        first = torch.bincount(ids[:, 0].long(), minlength=num_experts)
        largest = int(every.max())
        facts.append(
            {
                "active": float((every > 0).sum()),
                "largest_of_rows": largest / ids.numel(),
                "largest_of_tokens": largest / ids.shape[0],
                "first_of_tokens": int(first.max()) / ids.shape[0],
            }
        )
    return {key: fmean(each[key] for each in facts) for key in facts[0]}


def add_histograms(results: Results, device: str) -> None:
    """Draws the measured input sets again and writes their histograms to the rows without one."""
    for row in results.rows:
        if "histogram" not in row:
            shape = SHAPES[row["shape"]]
            sets, active = protocol.build_sets(row["routing"], row["T"], shape, device=device)
            facts = histogram(sets, shape.num_experts)
            if active != row["active"]:
                raise RuntimeError(f"{row['shape']} T={row['T']}: other inputs than were measured")
            row["histogram"] = facts
    results.save()


def tables(rows: Sequence[Row]) -> list[Table]:
    """Returns every table: speed over all cells and by routing, losses, histograms."""
    out = [report.over_floor(rows), report.against_peers(rows)]
    for routing in (kind for kind in ROUTINGS if any(row["routing"] == kind for row in rows)):
        table = report.against_peers([row for row in rows if row["routing"] == routing])
        out.append(replace(table, title=f"{table.title}: {routing}"))
    return [*out, report.losses(rows), histograms(rows)]


def histograms(rows: Sequence[Row]) -> Table:
    """How skewed the rows of each cell were."""
    body = []
    for row in rows:
        facts = row.get("histogram")
        shares = ("first_of_tokens", "largest_of_tokens", "largest_of_rows")
        numbers = [f"{facts[key]:.1%}" for key in shares] if facts else ["-"] * 3
        name = [row["shape"], str(row["E"]), f"T={row['T']}", row["routing"]]
        body.append([*name, f"{row['active']:.1f}", *numbers])
    header = ["shape", "experts", "T", "routing", "active experts"]
    header += ["tokens with the same first choice", "tokens on the largest expert"]
    title = "Routings measured, means over the input sets"
    return Table(title, [*header, "rows on the largest expert"], body)


if __name__ == "__main__":
    main(sys.argv[1:])
