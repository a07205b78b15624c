"""Which calls warm-up compiles for: one of each variant, found without trying every size."""

from __future__ import annotations

import pytest
import torch

from tilewise import MODELS, SWIGLU, MoEShape, Target
from tilewise.moe import warmup
from tilewise.moe.warmup import first_of_each, meta_weights, representative_tokens

NARROW = MoEShape(128, 8, 4096, 192)


@pytest.mark.parametrize("bound", [1, 2, 3, 100, 2500])
@pytest.mark.parametrize("batch_invariant", [False, True])
@pytest.mark.parametrize("arch", ["sm_90", "sm_100", "gfx942"])
@pytest.mark.parametrize("shape", [NARROW, *map(MODELS.get, ("qwen3-30b-a3b", "mixtral-8x7b"))])
def test_jumps_find_what_a_walk_finds(
    shape: MoEShape, arch: str, batch_invariant: bool, bound: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = meta_weights(shape, torch.bfloat16, SWIGLU)
    arguments = weights, shape.top_k, bound, batch_invariant, Target.from_arch(arch)
    jumped = representative_tokens(*arguments)
    monkeypatch.setattr(warmup, "first_of_each", walk)
    assert jumped == representative_tokens(*arguments)


def walk(variant, largest):
    first = {}
    for count in range(1, largest + 1):
        first.setdefault(variant(count), count)
    return sorted(first.values())


def test_neighbouring_changes_are_all_found() -> None:
    limits = (1, 2, 3, 4, 5, 70, 71, 100, 127, 128, 129, 4095, 4096, 5000)

    def variant(count: int) -> int:
        return sum(count > limit for limit in limits)

    for largest in (*range(1, 135), 4096, 4097, 6000):
        assert first_of_each(variant, largest) == walk(variant, largest)


def test_a_variant_that_comes_back_counts_once() -> None:
    def variant(count: int) -> bool:
        return 9 <= count <= 32

    assert first_of_each(variant, 100) == [1, 9]


def test_large_bounds_cost_little() -> None:
    tried = []

    def variant(count: int) -> int:
        tried.append(count)
        return min(count.bit_length(), 12)

    first_of_each(variant, 2**20 + 1)
    assert len(tried) < 300
