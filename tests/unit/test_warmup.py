"""Which calls warm-up compiles for: one of each variant, found without trying every size."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tilewise import MODELS, SWIGLU, KernelConfig, LayerConfig, MoEShape, Target
from tilewise.moe import warmup
from tilewise.moe.forward import overlap_of
from tilewise.moe.plan import plan_variant
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


def test_a_given_configuration_is_what_is_compiled() -> None:
    target, top_k = Target.from_arch("sm_90"), NARROW.top_k
    weights = meta_weights(NARROW, torch.bfloat16, SWIGLU)
    tile = KernelConfig(64, 64, 64, 8, 4, 3, descriptors=True)
    given = LayerConfig("grouped", tile, tile)
    # Of one configuration the plan and the overlap alone differ.
    tokens = representative_tokens(weights, top_k, 4096, False, target, given.to_json())
    assert len(tokens) < len(representative_tokens(weights, top_k, 4096, False, target)) / 2
    variants = [(plan_variant(t * top_k), overlap_of(t * top_k, target)) for t in tokens]
    assert len(set(variants)) == len(variants)
    wide = replace(tile, block_n=1024)
    with pytest.raises(ValueError, match=r"cannot run: needs .* nearest legal"):
        representative_tokens(
            weights, top_k, 4096, False, target, replace(given, down=wide).to_json()
        )


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
