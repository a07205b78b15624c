"""Costs by hand, and what a choice made from them must keep."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from tilewise.dispatch.config import GroupedGemm, KernelConfig, why_illegal
from tilewise.dispatch.features import FEATURES, features, programs_per_sm
from tilewise.dispatch.histogram import FAMILIES, Histogram, expected_sizes
from tilewise.dispatch.rules import rule
from tilewise.dispatch.select import (
    FEWEST,
    bucket,
    buckets,
    choose,
    family_costs,
    fewest,
    margin,
    robust,
)
from tilewise.dispatch.smoothing import WIDE, Corrections, Surface, exemplars
from tilewise.dispatch.space import space
from tilewise.dispatch.table import StageTable, shipped, stage_table
from tilewise.models import MODELS
from tilewise.target import CATALOGUE, Target

H200 = Target.from_arch("sm_90")
DOWN = GroupedGemm(1024, 128, 128, 2048, 768)
GATE_UP = GroupedGemm(1024, 128, 128, 768, 2048, 2, 2, True)


def test_names_round_trip() -> None:
    for gemm in (DOWN, GATE_UP):
        names = [config.name for config in space(gemm, H200)]
        assert len(set(names)) == len(names)
        assert [KernelConfig.from_name(name) for name in names] == space(gemm, H200)
    with pytest.raises(ValueError, match="'64x64' is no configuration's name; one is"):
        KernelConfig.from_name("64x64")


@pytest.mark.parametrize("gemm", [DOWN, GATE_UP], ids=["down", "gate_up"])
def test_the_space_is_wide_and_legal(gemm: GroupedGemm) -> None:
    configs = space(gemm, H200)
    assert len(configs) >= 134
    assert all(why_illegal(config, gemm, H200) is None for config in configs)
    assert space(gemm, Target.from_arch("sm_89")) == []
    assert space(replace(gemm, itemsize=4), H200) == []


def test_tiles_of_a_histogram() -> None:
    histogram = Histogram.of([0, 130, 16, 17, 64])
    assert (histogram.rows, histogram.active, histogram.largest) == (227, 4, 130)
    assert histogram.tiles(64) == (3 + 1 + 1 + 1, 0)
    assert histogram.tiles(64, 16) == (2 + 0 + 1 + 1, 1 + 1)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("tokens", "top_k", "experts"), [(8, 8, 128), (300, 2, 8), (4096, 8, 256)])
def test_expected_sizes_hold_the_rows(family: str, tokens: int, top_k: int, experts: int) -> None:
    histogram = expected_sizes(family, tokens, top_k, experts)
    assert histogram.rows == pytest.approx(tokens * top_k, rel=0.1)
    assert histogram.largest <= tokens
    if family == "hot":
        assert histogram.sizes == (tokens,) * top_k
    if (family, tokens) == ("bimodal", 4096):  # 7/8 of the tokens, and their share of the rest.
        assert sum(size > 3500 for size in histogram.sizes) == top_k
        assert sorted(histogram.sizes)[0] < 32
    # Uniform draws of 8 tokens reach 1 - (1 - 8/128)^8 = 40% of the experts.
    if (family, tokens) == ("uniform", 8):
        assert histogram.active == pytest.approx(0.4 * experts, abs=3)


def test_features_by_hand() -> None:
    config = KernelConfig(64, 128, 64, num_stages=4, descriptors=True)
    histogram = Histogram.of([100, 64, 1])
    values = dict(zip(FEATURES, features(config, DOWN, H200, histogram), strict=True))
    tiles = (2 + 1 + 1) * 16
    assert values["grid"] == tiles / 1e3
    assert values["wave_steps"] == 12 and values["waves"] == 1
    assert values["sm_programs"] == 1
    assert values["weights"] == pytest.approx(3 * 2048 * 768 * 2 / 4.8e6)
    assert values["output"] == pytest.approx(165 * 2048 * 2 / 4.8e6)
    assert values["flow_steps"] == 12  # Less than one wave takes as long as one.
    operations = 4 * 64 * 2048 * 768 * 2
    assert operations / 989e6 < values["weights"] and values["excess"] == 0
    shared = replace(config, split_k=4, occupancy=2)
    values = dict(zip(FEATURES, features(shared, DOWN, H200, histogram), strict=True))
    assert values["grid"] == tiles * 4 / 1e3 and values["sm_steps"] == 2 * 3
    many = Histogram.of([1024] * 3)
    values = dict(zip(FEATURES, features(config, DOWN, H200, many), strict=True))
    per_sm = programs_per_sm(config, DOWN, H200)
    assert values["flow_steps"] == pytest.approx(3 * 16 * 16 / (132 * per_sm) * 12)
    took = 3 * 1024 * 2048 * 768 * 2 / 989e6
    assert values["excess"] == pytest.approx(took - values["weights"])


def test_exemplars_speak_nearby_and_not_afar() -> None:
    config = KernelConfig(64, 128, 64, descriptors=True)
    bare = StageTable({config: (10.0, *[0.0] * (len(FEATURES) - 1))}, ())
    here = expected_sizes("uniform", 128, 8, 128)
    place = tuple(
        math.log2(v) for v in (here.largest, here.rows / here.active, here.active, 2048, 768)
    )
    # One exemplar weighs 1 against a doubt of 1, then the rest of it 1 against 0.1; 1.5 octaves
    # away 0.607 and 0.101.
    there = 10 * 2 ** (1 / 2 + 1 / 2 / 1.1)
    for distance, wanted in ((0.0, there), (1.5, 10 * 2**0.628), (12.0, 10.0)):
        (exemplar,) = exemplars([(place[0] + distance, *place[1:])], [(math.log(2),)])
        table = replace(bare, exemplars=(exemplar,))
        assert table.costs(DOWN, H200, here)[config] == pytest.approx(wanted, rel=1e-2)


def test_what_was_not_timed_corrects_nothing() -> None:
    first, second = exemplars([(0.0,), (0.0,)], [(1.0, None), (None, -1.0)])
    assert first.rest[1] is None and second.rest[0] is None
    wide = Surface([(0.0,), (0.0,)], [first.residual, second.residual]).at((0.0,), WIDE)
    assert wide == pytest.approx([0.5, -0.5])
    assert Corrections(()).at((0.0,)) == []


def test_a_table_survives_its_file() -> None:
    table = shipped("sm_90")
    assert table is not None and shipped("sm_89") is None
    again = StageTable.from_json(table.down.to_json())
    assert again == table.down
    assert stage_table(DOWN, H200) is table.down
    assert stage_table(GATE_UP, H200) is table.gate_up
    for other in (replace(DOWN, itemsize=4), replace(DOWN, descriptors_possible=False),
                  replace(GATE_UP, num_weights=1)):  # fmt: skip
        assert stage_table(other, H200) is None
    assert stage_table(DOWN, CATALOGUE["sm_100"]) is None


def test_buckets() -> None:
    assert buckets(40) == [1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32, 40]
    for tokens in range(1, 5000):
        top = bucket(tokens)
        assert tokens <= top <= 1.25 * tokens + 1 and bucket(top) == top


def test_a_bucket_counts_by_both_ends() -> None:
    tops = buckets(20000)
    assert [fewest(top) for top in tops] == [1, *(top + 1 for top in tops[:-1])]
    gemm = GroupedGemm(2 * 768, 768, 8, 4096, 14336)
    table = shipped("sm_90").down
    mean = family_costs(table, gemm, H200)["hot"]
    ends = [
        table.costs(replace(gemm, max_rows=2 * t, max_segment_rows=t), H200, hot)
        for t in (641, 768)
        for hot in [expected_sizes("hot", t, 2, 8)]
    ]
    for config, us in mean.items():
        assert us == pytest.approx((ends[0][config] + ends[1][config]) / 2)


def test_one_choice_for_a_bucket() -> None:
    for shape in (MODELS["qwen3-30b-a3b"], MODELS["mixtral-8x7b"]):
        for low, high in ((257, 320), (1025, 1280), (33, 40)):
            a, b = (
                choose(
                    GroupedGemm(t * shape.top_k, t, shape.num_experts, shape.hidden_size,
                                shape.intermediate_size), H200
                )
                for t in (low, high)
            )  # fmt: skip
            assert a == b


def test_the_rule_stands_where_nothing_was_fitted() -> None:
    few = replace(GATE_UP, max_rows=8 * (FEWEST - 1), max_segment_rows=FEWEST - 1)
    assert choose(few, H200) == rule(few, H200)
    for arch in ("sm_80", "sm_100", "gfx942"):
        target = CATALOGUE[arch]
        assert choose(DOWN, target) == rule(DOWN, target)


def test_a_choice_where_costs_know_less() -> None:
    """A rule that was not fitted stands for its twin with other stages; below 4 tokens it stays."""
    wide = MODELS["mixtral-8x7b"]

    def gate_up(tokens: int) -> GroupedGemm:
        return GroupedGemm(
            tokens * wide.top_k, tokens, wide.num_experts, wide.intermediate_size,
            wide.hidden_size, 2, 2, True,
        )  # fmt: skip

    table = stage_table(gate_up(8), H200)
    assert table is not None
    ruled = rule(gate_up(8), H200)
    twin = replace(ruled, num_stages=4)
    assert ruled not in table.coefficients and twin in table.coefficients
    cheap = (1.0, *[0.0] * (len(FEATURES) - 1))
    dear = (2.0, *cheap[1:])
    other = replace(twin, block_n=32)
    assert robust(StageTable({twin: cheap, other: dear}, ()), gate_up(8), H200) == ruled
    assert robust(StageTable({twin: dear, other: cheap}, ()), gate_up(8), H200) == other
    strange = StageTable({replace(other, block_k=64): cheap}, ())
    assert robust(strange, gate_up(8), H200) == replace(other, block_k=64)
    assert robust(strange, gate_up(3), H200) == rule(gate_up(3), H200)
    # Extrapolated costs must promise more than 10%.
    slightly = StageTable({twin: (1.08, *cheap[1:]), other: cheap}, ())
    assert robust(slightly, gate_up(3), H200) == rule(gate_up(3), H200)
    assert robust(slightly, gate_up(4), H200) == other


def test_what_a_fitted_choice_must_promise() -> None:
    """2%, and 5% from the bucket of 1,024 tokens on, where a product alone says less of a layer."""

    def gate_up(tokens: int) -> GroupedGemm:
        return GroupedGemm(8 * tokens, tokens, 128, 768, 2048, 2, 2, True)

    assert [margin(tokens) for tokens in (3, 4, 1023, 1024)] == [0.1, 0.02, 0.02, 0.05]
    for tokens, replaced in ((512, True), (2048, False)):
        ruled = rule(gate_up(tokens), H200)
        other = replace(ruled, block_k=32)
        rest = [0.0] * (len(FEATURES) - 1)
        table = StageTable({ruled: (1.04, *rest), other: (1.0, *rest)}, ())
        assert robust(table, gate_up(tokens), H200) == (other if replaced else ruled)


@pytest.mark.parametrize(
    ("where", "what"),
    [
        ("place", [1.0, 2.0, 3.0, 4.0]),
        ("place", [1.0, 2.0, 3.0, 4.0, float("nan")]),
        ("residual", [1e4]),
        ("residual", [float("nan")]),
        ("residual", ["fast"]),
        ("rest", []),
    ],
)
def test_a_malformed_table_is_refused(where: str, what: list) -> None:
    exemplar = {"place": [1.0] * 5, "residual": [0.1], "rest": [None]}
    name = "64x64x64 g8 w4 s4 D"
    good = {"coefficients": {name: [1.0] * len(FEATURES)}, "exemplars": [exemplar]}
    assert StageTable.from_json(good).exemplars
    with pytest.raises(ValueError, match="exemplar"):
        StageTable.from_json(good | {"exemplars": [exemplar | {where: what}]})
    with pytest.raises(ValueError, match="coefficient"):
        StageTable.from_json(good | {"coefficients": {name: [math.inf]}})


def test_rules_for_three_tokens() -> None:
    """Each was faster in whole layers; above 3 tokens costs decide."""
    narrow = GroupedGemm(24, 3, 128, 192, 4096, 2, 2, True)
    assert (
        rule(narrow, H200).split_k,
        rule(replace(narrow, max_segment_rows=4), H200).split_k,
    ) == (8, 4)
    for k, tile in ((14336, (64, 256)), (4096, (64, 128)), (768, (128, 64)), (192, (64, 64))):
        found = rule(GroupedGemm(24, 3, 128, 4096, k), H200)
        assert (found.block_n, found.block_k) == tile and found.swap_operands


def test_spilling_walks_are_not_in_the_space() -> None:
    """With Triton 3.9 pairs of 128 rows and 64 columns in 4 warps spill without store_parts."""
    walks = [c for c in space(GATE_UP, H200) if c.persistent and c.block_m == 128]
    assert walks and all(c.store_parts for c in walks if c.num_warps == 4)
