"""Configurations: what is legal, what is chosen, and what happens to a wish that cannot be met."""

from __future__ import annotations

import json
from dataclasses import astuple, replace
from typing import Any

import pytest

from tests.cases import layer_problem
from tilewise.dispatch.config import (
    FewActive,
    GroupedGemm,
    KernelConfig,
    StreamConfig,
    accumulators,
    fit,
    shared_memory,
    why_illegal,
)
from tilewise.dispatch.rules import choose_stream, next_power_of_two, rule
from tilewise.dispatch.select import choose
from tilewise.models import MODELS, MoEShape
from tilewise.moe.schedule import LayerConfig, LayerProblem, given_schedule, schedule
from tilewise.target import CATALOGUE, CHIPS, CPU, Target

TOKENS = (1, 2, 3, 8, 33, 128, 500, 2048, 8192)
KIB = 1024


def problem(
    num_tokens: int, shape: MoEShape = MODELS["qwen3-30b-a3b"], itemsize: int = 2, **changes: Any
) -> LayerProblem:
    return layer_problem(num_tokens, astuple(shape), itemsize=itemsize, **changes)


GATE_UP = GroupedGemm(4096, 512, 128, 768, 2048, num_weights=2, gathered=True)
DOWN = GroupedGemm(4096, 512, 128, 2048, 768)
H200, RTX, MI300 = (Target.from_arch(a) for a in ("sm_90", "sm_89", "gfx942"))


# ---------------------------------------------------------------- KernelConfig


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block_m": 48}, "block_m=48 must be a power of two"),
        ({"block_n": 0}, "block_n=0 must be a power of two"),
        ({"block_k": -64}, "block_k=-64 must be a power of two"),
        ({"num_warps": 3}, "num_warps=3 must be a power of two"),
        ({"num_warps": 0}, "num_warps=0 must be a power of two"),
        ({"block_m": 8}, "block_m=8 must be at least 16"),
        ({"block_n": 4}, "block_n=4 must be at least 16"),
        ({"block_k": 8}, "block_k=8 must be at least 16"),
        ({"group_m": 0}, "group_m=0 must be at least 1"),
        ({"group_m": 2**30}, "group_m=1073741824 must be at most 1024"),
        ({"num_stages": 0}, "num_stages=0 must be at least 1"),
        ({"occupancy": 0}, "occupancy=0 must be at least 1"),
        ({"split_k": 0}, "split_k=0 must be at least 1"),
        ({"tail_m": 8}, "tail_m=8 must be 0, or a power of two from 16 to below block_m=64"),
        ({"tail_m": 48}, "tail_m=48 must be 0"),
        ({"tail_m": 64}, "tail_m=64 must be 0"),
        ({"tail_m": 16, "split_k": 2}, "do not go together"),
        ({"split_k": 2, "occupancy": 65}, "occupancy=65 with split_k is at most 64"),
        ({"persistent": True, "tail_m": 16}, "neither tail_m nor split_k"),
        ({"persistent": True, "split_k": 2}, "neither tail_m nor split_k"),
        ({"descriptors": True, "store_parts": 3}, "store_parts=3 must be 0"),
        ({"descriptors": True, "store_parts": 8}, "leaves parts of 16 columns of block_n=64"),
        ({"store_parts": 1}, "store_parts=1 needs descriptors=True"),
    ],
)
def test_kernel_config_refuses(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KernelConfig(**{"block_m": 64, "block_n": 64, "block_k": 64, **changes})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((3, 64), "block_n=3 must be a power of two"),
        ((4, 96), "block_k=96 must be a power of two"),
        ((4, 64, 0), "num_warps=0 must be a power of two"),
        ((4, 64, 4, 0), "num_stages=0 must be at least 1"),
    ],
)
def test_stream_config_refuses(values: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StreamConfig(*values)
    with pytest.raises(TypeError, match=r"block_n=4.0 must be of type int"):
        StreamConfig(4.0, 512)  # type: ignore[arg-type]


def test_kernel_config_round_trip() -> None:
    config = KernelConfig(32, 128, 64, 4, 8, 5, True, True, True, 2)
    assert KernelConfig.from_dict(json.loads(config.to_json())) == config
    message = r"unknown fields \['warps'\]; a KernelConfig has \[.*'num_warps'"
    with pytest.raises(ValueError, match=message):
        KernelConfig.from_dict({"block_m": 16, "block_n": 16, "block_k": 16, "warps": 4})


def test_shared_memory_by_hand() -> None:
    # Three stages of a 64 x 64 tile of rows and two 128 x 64 tiles of weights, two bytes each.
    config = KernelConfig(64, 128, 64, num_stages=3)
    assert shared_memory(config, GATE_UP) == 3 * (4096 + 2 * 8192) * 2 + KIB
    # One stage of small steps: the fp32 tile of results is the larger one.
    small = KernelConfig(64, 128, 16, num_stages=1)
    assert shared_memory(small, GATE_UP) == 64 * 128 * 4 + KIB
    assert shared_memory(replace(small, swap_operands=True), GATE_UP) == 2 * 64 * 128 * 4 + KIB
    persistent = replace(config, persistent=True)
    assert shared_memory(persistent, GATE_UP) - shared_memory(config, GATE_UP) == 64 * 128 * 2
    assert shared_memory(persistent, DOWN) - shared_memory(config, DOWN) == 64 * 128


def test_accumulators_by_hand() -> None:
    assert accumulators(KernelConfig(64, 128, 64, num_warps=4), GATE_UP) == 128
    assert accumulators(KernelConfig(64, 128, 64, num_warps=8), DOWN) == 32


@pytest.mark.parametrize(
    ("config", "gemm", "target", "message"),
    [
        (KernelConfig(128, 128, 128, num_warps=8), GATE_UP, RTX,
         "needs 295936 B of shared memory, sm_89 has 101376 B"),
        (KernelConfig(16, 16, 16, num_warps=32), DOWN, MI300,
         "32 warps of 64 lanes exceed 1024 threads"),
        (KernelConfig(16, 16, 16, num_warps=64), DOWN, RTX,
         "64 warps of 32 lanes exceed 1024 threads"),
        (KernelConfig(128, 128, 16, num_stages=1, num_warps=4), GATE_UP, H200,
         "needs 256 accumulator registers per lane, at most 200"),
        (KernelConfig(16, 16, 16, descriptors=True), DOWN, RTX, "sm_89 has no tensor descriptors"),
        (KernelConfig(16, 16, 16, descriptors=True), replace(DOWN, descriptors_possible=False),
         H200, "strides or alignment do not suit a tensor descriptor"),
    ],
)  # fmt: skip
def test_why_illegal(config: KernelConfig, gemm: GroupedGemm, target: Target, message: str) -> None:
    reason = why_illegal(config, gemm, target)
    assert reason is not None and message in reason


def test_legal() -> None:
    assert why_illegal(KernelConfig(64, 128, 64, num_stages=4, descriptors=True), GATE_UP, H200) \
        is None  # fmt: skip
    assert why_illegal(KernelConfig(16, 16, 16, num_warps=16), DOWN, MI300) is None


# ---------------------------------------------------------------- fit


def test_fit_leaves_a_legal_config_alone() -> None:
    config = KernelConfig(64, 128, 64, 8, 4, 4, descriptors=True)
    assert fit(config, DOWN, H200) == config


def test_fit_drops_descriptors_first() -> None:
    config = KernelConfig(16, 64, 64, descriptors=True)
    assert fit(config, DOWN, RTX) == replace(config, descriptors=False)
    plain = replace(DOWN, descriptors_possible=False)
    assert fit(config, plain, H200) == replace(config, descriptors=False)


def test_fit_takes_stages_then_depth_then_width() -> None:
    wish = KernelConfig(64, 128, 128, 8, 8, 4)
    # 99 KiB: two stages of (64 + 128) x 128 x 2 B are 96 KiB, plus the 1 KiB reserved.
    assert fit(wish, DOWN, RTX) == replace(wish, num_stages=2)
    # 64 KiB: the same with steps of 64.
    assert fit(wish, DOWN, MI300) == replace(wish, num_stages=2, block_k=64)
    # fp32 doubles it all.
    fp32 = replace(DOWN, itemsize=4)
    assert fit(wish, fp32, MI300) == replace(wish, num_stages=2, block_k=32)


OVERSIZED = [
    KernelConfig(128, 256, 64, 8, 8, 4, descriptors=True, persistent=True),
    KernelConfig(256, 256, 256, 8, 32, 8),
    KernelConfig(16, 1024, 128, 8, 4, 6, swap_operands=True),
    KernelConfig(1024, 16, 512, 8, 4, 6),
]


@pytest.mark.parametrize("arch", ["sm_86", "sm_89", "sm_120", "gfx90a", "gfx942", "gfx1100"])
@pytest.mark.parametrize("gemm", [GATE_UP, DOWN, replace(GATE_UP, itemsize=4)])
@pytest.mark.parametrize("wish", OVERSIZED, ids=range(len(OVERSIZED)))
def test_fit_shrinks(wish: KernelConfig, gemm: GroupedGemm, arch: str) -> None:
    target = Target.from_arch(arch)
    assert target.shared_memory in (99 * KIB, 64 * KIB)
    assert why_illegal(wish, gemm, target) is not None
    config = fit(wish, gemm, target)
    assert why_illegal(config, gemm, target) is None
    assert shared_memory(config, gemm) <= target.shared_memory
    for name in ("block_m", "block_n", "block_k", "num_stages", "num_warps"):
        assert getattr(config, name) <= getattr(wish, name)


def test_fit_gives_up_in_words() -> None:
    nowhere = replace(RTX, shared_memory=1024)
    with pytest.raises(ValueError, match=r"no legal configuration on sm_89 near KernelConfig\(.*B"):
        fit(KernelConfig(64, 64, 64), DOWN, nowhere)


# ---------------------------------------------------------------- choose


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("target", [*CATALOGUE.values(), CPU], ids=lambda t: t.arch)
def test_choices_are_legal(target: Target, itemsize: int) -> None:
    for name, shape in MODELS.items():
        for shards in (1, 8):
            for num_tokens in TOKENS:
                for gated, descriptors in ((True, True), (False, False)):
                    made = problem(
                        num_tokens, shape.sharded(shards), itemsize, gated=gated,
                        descriptors_possible=descriptors,
                    )  # fmt: skip
                    for gemm in made.gemms():
                        config = choose(gemm, target)
                        where = (name, shards, num_tokens, gated, config)
                        assert why_illegal(config, gemm, target) is None, where


@pytest.mark.parametrize("target", CATALOGUE.values(), ids=lambda t: t.arch)
def test_choices_of_tiny_and_odd_shapes_are_legal(target: Target) -> None:
    for num_tokens in TOKENS:
        for shape in (MoEShape(1, 1, 1, 1), MoEShape(7, 2, 37, 19), MoEShape(1536, 8, 256, 128)):
            for gemm in problem(num_tokens, shape, descriptors_possible=False).gemms():
                config = choose(gemm, target)
                assert why_illegal(config, gemm, target) is None
                assert not config.descriptors


def test_hopper_takes_short_tiles_for_few_tokens_and_tall_for_many() -> None:
    few, many = (choose(problem(t).gemms()[1], H200) for t in (8, 2048))
    assert few.block_m <= 32 and many.block_m >= 64
    assert few.descriptors and many.descriptors
    # Three TF32 products do not run on warp groups: fp32 takes the portable path.
    assert not choose(problem(8, itemsize=4).gemms()[1], H200).swap_operands


def test_taller_tiles_for_more_tokens() -> None:
    for target in CATALOGUE.values():
        heights = [rule(problem(t).gemms()[1], target).block_m for t in TOKENS]
        assert heights == sorted(heights) and heights[0] < heights[-1], target.arch


@pytest.mark.parametrize("target", CATALOGUE.values(), ids=lambda t: t.arch)
def test_stream_configs(target: Target) -> None:
    for shape in MODELS.values():
        for num_tokens in (1, 2):
            for gemm in problem(num_tokens, shape).gemms():
                config = choose_stream(gemm, target)
                assert config.block_k <= next_power_of_two(gemm.k)
                assert config.num_stages == (1 if target.backend == "hip" else 3)


def test_next_power_of_two() -> None:
    assert [next_power_of_two(v) for v in (0, 1, 2, 3, 4, 5, 1000)] == [1, 1, 2, 4, 4, 8, 1024]


# ---------------------------------------------------------------- schedule


def test_problem_describes_both_products() -> None:
    gate_up, down = problem(33).gemms()
    assert gate_up == GroupedGemm(264, 33, 128, 768, 2048, 2, 2, True, True)
    assert down == GroupedGemm(264, 33, 128, 2048, 768, 1, 2, False, True)
    assert problem(33, gated=False).gemms()[0].num_weights == 1


@pytest.mark.parametrize("target", CATALOGUE.values(), ids=lambda t: t.arch)
def test_paths(target: Target) -> None:
    assert [schedule(problem(t), target).path for t in (1, 2, 3, 8192)] == [
        "decode", "decode", "grouped", "grouped",
    ]  # fmt: skip
    assert schedule(problem(1, reduce=False), target).path == "grouped"
    assert schedule(problem(1, top_k=33), target).path == "grouped"
    assert schedule(problem(1, batch_invariant=True), target).path == "grouped"


@pytest.mark.parametrize("target", CATALOGUE.values(), ids=lambda t: t.arch)
def test_batch_invariant_schedules_ignore_the_batch(target: Target) -> None:
    for shape in MODELS.values():
        for itemsize in (2, 4):
            # Where any tile gives the same bits, the batch may choose it; fp32 is not known to.
            machine = replace(target, same_bits_any_tile=itemsize == 4)
            one, *others = (
                schedule(problem(t, shape, itemsize, batch_invariant=True), machine) for t in TOKENS
            )
            assert all(other == one for other in others)
            assert one.path == "grouped"


def test_other_schedules_follow_the_batch() -> None:
    for target in CATALOGUE.values():
        assert len({schedule(problem(t), target) for t in TOKENS}) > 2
    same_bits = replace(H200, same_bits_any_tile=True)
    chosen = {schedule(problem(t, batch_invariant=True), same_bits) for t in TOKENS}
    assert len(chosen) > 2 and {c.path for c in chosen} == {"grouped"}


def test_schedules_are_legal() -> None:
    for target in CATALOGUE.values():
        for shape in MODELS.values():
            for num_tokens in TOKENS:
                made = problem(num_tokens, shape)
                chosen = schedule(made, target)
                # A caller who passes the choice back is not refused.
                assert given_schedule(chosen.to_json(), made, target) == chosen


# ---------------------------------------------------------------- LayerConfig and given_schedule

GROUPED = LayerConfig(
    "grouped",
    KernelConfig(64, 128, 64, 8, 4, 4, descriptors=True),
    KernelConfig(16, 64, 128, 1, 4, 3, swap_operands=True, persistent=True, occupancy=2),
)
DECODE = LayerConfig("decode", StreamConfig(4, 512, 4, 3), StreamConfig(8, 1024, 8))


@pytest.mark.parametrize("config", [GROUPED, DECODE], ids=["grouped", "decode"])
def test_layer_config_round_trip(config: LayerConfig) -> None:
    again = LayerConfig.from_json(config.to_json())
    assert again == config and type(again.gate_up) is type(config.gate_up)
    assert again.to_json() == config.to_json()


def test_layer_config_refuses() -> None:
    with pytest.raises(ValueError, match=r"path='fast' must be one of \['decode', 'grouped'\]"):
        LayerConfig("fast", GROUPED.gate_up, GROUPED.down)
    with pytest.raises(TypeError, match="path='decode' takes a StreamConfig: gate_up"):
        LayerConfig("decode", GROUPED.gate_up, DECODE.down)
    with pytest.raises(TypeError, match="path='grouped' takes a KernelConfig: down"):
        LayerConfig("grouped", GROUPED.gate_up, DECODE.down)
    tile = GROUPED.gate_up
    with pytest.raises(TypeError, match=r"gate_up_few=KernelConfig.* must be a FewActive or None"):
        LayerConfig("grouped", tile, tile, gate_up_few=tile)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="FewActive takes a KernelConfig and an int"):
        FewActive(tile, 3.0)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"block_m='a' must be of type int"):
        KernelConfig("a", 64, 64)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"persistent=1 must be of type bool"):
        KernelConfig(64, 64, 64, persistent=1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"LayerConfig has \['path', 'gate_up', 'down'\] too"):
        LayerConfig.from_json("{}")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"fusd": True}, ValueError, r"unknown fields \['fusd'\]; a LayerConfig has .*'fused'"),
        ({"path": "fast"}, ValueError, "path='fast' must be one of"),
        ({"path": ["grouped"]}, ValueError, r"path=\['grouped'\] must be one of"),
        ({"gate_up": {"foo": 1}}, ValueError, r"unknown fields \['foo'\]; a KernelConfig has"),
        (
            {"gate_up": {"block_m": 16}},
            ValueError,
            r"KernelConfig has \['block_n', 'block_k'\] too",
        ),
        ({"gate_up": 3}, TypeError, "a KernelConfig is a JSON object, got 3"),
        ({"down_few": {"up_to": 1}}, ValueError, r"a FewActive has \['config'\] too"),
    ],
)
def test_json_that_is_no_layer_config(
    change: dict[str, Any], error: type[Exception], message: str
) -> None:
    config = KernelConfig(16, 32, 32)
    values = json.loads(LayerConfig("grouped", config, config).to_json()) | change
    with pytest.raises(error, match=message):
        LayerConfig.from_json(json.dumps(values))
    with pytest.raises(TypeError, match=r"a LayerConfig is a JSON object, got \[\]"):
        LayerConfig.from_json("[]")


def test_given_schedule_takes_what_can_run() -> None:
    assert given_schedule(GROUPED.to_json(), problem(33), H200) == GROUPED
    assert given_schedule(DECODE.to_json(), problem(1), H200) == DECODE


def test_given_schedule_refuses_with_a_way_out() -> None:
    large = KernelConfig(64, 128, 128, 8, 8, 4)
    config = LayerConfig("grouped", KernelConfig(16, 64, 64), large)
    with pytest.raises(ValueError) as caught:
        given_schedule(config.to_json(), problem(33), RTX)
    message = str(caught.value)
    nearest = replace(large, num_stages=2)
    assert message.startswith(f"config.down={large} cannot run: needs 197632 B of shared memory")
    assert message.endswith(f"nearest legal: {nearest}")
    retry = replace(config, down=nearest)
    assert given_schedule(retry.to_json(), problem(33), RTX) == retry


def test_given_schedule_names_the_product_and_the_machine() -> None:
    small = KernelConfig(16, 64, 64, descriptors=True)
    config = LayerConfig("grouped", small, small)
    message = "config.gate_up=.* cannot run: sm_89 has no tensor descriptors; nearest legal: "
    with pytest.raises(ValueError, match=message):
        given_schedule(config.to_json(), problem(33), RTX)


def test_given_decode_needs_reduce() -> None:
    with pytest.raises(ValueError, match="always reduces; use 'grouped' for reduce=False"):
        given_schedule(DECODE.to_json(), problem(1, reduce=False), H200)


# ---------------------------------------------------------------- targets


def test_catalogue() -> None:
    for arch, target in CATALOGUE.items():
        assert Target.from_arch(arch) is target and target.arch == arch
        assert target.capability == (int(arch[3:]) if arch.startswith("sm_") else 0)
        assert target.backend == ("cuda" if arch.startswith("sm_") else "hip")
        assert target.tensor_descriptors is (target.capability >= 90)
        assert target.warpgroup_mma is (target.capability == 90)
    with pytest.raises(ValueError, match=r"'sm_35'; known: sm_80 \(a100, .*gfx1201"):
        Target.from_arch("sm_35")


@pytest.mark.parametrize(
    ("given", "arch"),
    [
        ("h100", "sm_90"), ("H200", "sm_90"), ("sm90", "sm_90"), ("sm_90a", "sm_90"),
        ("SM-100f", "sm_100"), ("a100", "sm_80"), ("b200", "sm_100"), ("l40s", "sm_89"),
        ("RTX 4090", "sm_89"), ("mi300x", "gfx942"), ("mi325x", "gfx942"), ("mi250", "gfx90a"),
        ("mi355x", "gfx950"), ("gfx942:sramecc+:xnack-", "gfx942"),
    ],
)  # fmt: skip
def test_chips_by_name(given: str, arch: str) -> None:
    assert Target.from_arch(given) is CATALOGUE[arch]


@pytest.mark.parametrize("given", ["", "h", "sm_90x", "gfx90", "sm_", "a", None, 90])
def test_no_chip_is_guessed(given: str) -> None:
    with pytest.raises(ValueError, match=r"unknown architecture .*h100.*mi300x"):
        Target.from_arch(given)


def test_every_architecture_has_chips_and_no_chip_has_two() -> None:
    assert list(CHIPS) == list(CATALOGUE)
    names = [name for chips in CHIPS.values() for name in chips]
    assert all(names) and len(names) == len(set(names))


def test_probe_without_an_accelerator() -> None:
    assert Target.probe("cpu") is CPU
    assert Target.from_arch("cpu") is CPU and Target.from_arch("CPU") is CPU


def test_rules_of_many_rows_an_expert() -> None:
    target = CATALOGUE["sm_90"]

    def products(experts: int, top_k: int, hidden: int, inter: int, tokens: int) -> list[str]:
        here = layer_problem(tokens, (experts, top_k, hidden, inter))
        return [rule(gemm, target).name for gemm in here.gemms()]

    # Long reductions keep tall tiles with short ones; short ones run twice on a multiprocessor.
    assert products(128, 8, 4096, 1536, 8192)[0] == "128x128x64 g8 w8 s4 D t64"
    assert products(128, 8, 2048, 768, 8192)[0] == "128x64x64 g8 w4 s3 DP o2 p1"
    assert products(128, 8, 4096, 192, 8192)[0] == "128x64x64 g8 w4 s3 DP o2 p1"
    # 320 columns are five tiles of 64, or three of 128 that are 384 wide.
    assert products(160, 8, 6144, 320, 2048)[0] == "128x64x64 g8 w8 s3 D t64"
    assert products(64, 8, 4096, 328, 2048)[0] == "128x128x64 g8 w8 s4 D t64"  # 384 either way.
    # 160 rows an expert are three tiles of 64 or two of 128; 192 rows may be four.
    assert products(256, 8, 7168, 2048, 5120)[1] == "64x256x64 g8 w4 s4 DP p2"
    assert products(256, 8, 7168, 2048, 6144)[1] == "128x256x64 g8 w8 s4 DP p2"
    # Where columns leave a part of a tile, a tall one and a short one.
    assert products(128, 4, 2880, 2880, 5120)[1] == "128x256x64 g8 w8 s4 D t64"
    assert products(128, 4, 2880, 2880, 6144)[1] == "128x256x64 g8 w8 s4 DP p2"
