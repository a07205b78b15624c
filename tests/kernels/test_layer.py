"""The kernels against the specification: in the interpreter without a GPU, natively with one."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests import cases
from tests.kernels.harness import DEVICE, INTERPRETED, run_layer
from tilewise.dispatch.config import FewActive, KernelConfig, StreamConfig
from tilewise.moe import forward, plan
from tilewise.moe.forward import problem_of
from tilewise.moe.schedule import LayerConfig
from tilewise.moe.workspace import buffer_sizes, carve, num_counters
from tilewise.target import Target

GROUPED = LayerConfig("grouped", KernelConfig(16, 32, 32, 2), KernelConfig(16, 64, 16, 1))
DECODE = LayerConfig("decode", StreamConfig(32, 32), StreamConfig(32, 16, 4, 2))

# Every field of a configuration that changes the kernel's text, on a case with awkward sizes.
VARIANTS = {
    "tall": KernelConfig(64, 16, 16, 1),
    "wide": KernelConfig(16, 64, 64, 8, 8, 2),
    "swapped": KernelConfig(16, 64, 16, 2, swap_operands=True),
    "persistent": KernelConfig(16, 16, 16, 1, persistent=True),
    "persistent_swapped": KernelConfig(32, 16, 16, 3, swap_operands=True, persistent=True),
    "descriptors": KernelConfig(16, 32, 32, 2, descriptors=True),
    "descriptors_swapped": KernelConfig(16, 64, 16, 2, swap_operands=True, descriptors=True),
    "descriptors_persistent": KernelConfig(16, 32, 16, 2, descriptors=True, persistent=True),
    "stored_by_descriptor": KernelConfig(
        32, 64, 16, 2, descriptors=True, persistent=True, store_parts=4
    ),
    "tail_stored_by_descriptor": KernelConfig(
        64, 32, 16, 2, descriptors=True, tail_m=16, store_parts=1
    ),
    "tail": KernelConfig(64, 32, 16, 2, tail_m=16),
    "tail_descriptors": KernelConfig(32, 64, 16, 1, descriptors=True, tail_m=16),
    # Programs enough to share tiles on one multiprocessor too, which is what a CPU counts as.
    "split": KernelConfig(16, 64, 16, 2, split_k=3, occupancy=64),
    "split_descriptors": KernelConfig(16, 32, 16, 2, descriptors=True, split_k=8, occupancy=64),
    "split_swapped": KernelConfig(
        16, 64, 16, 2, swap_operands=True, descriptors=True, split_k=4, occupancy=64
    ),
}


def check(case: cases.Case, dtype: torch.dtype, config: LayerConfig | None, **extra: Any) -> None:
    inputs = cases.make_inputs(case, dtype, DEVICE)
    with cases.poisoned_empty():
        out = run_layer(case, inputs, config, **extra)
    # The interpreter cuts fp32 off to bf16 instead of rounding: twice the error of each rounding.
    truncates = INTERPRETED and dtype is torch.bfloat16
    cases.assert_close_to_reference(out, case, inputs, factor=3.0 if truncates else 1.5)


@pytest.mark.parametrize("case", cases.CASES, ids=lambda c: c.name)
def test_chosen_configuration(case: cases.Case) -> None:
    for dtype in (torch.bfloat16,) if DEVICE == "cpu" else cases.DTYPES:
        check(case, dtype, None)


# Planning a thousand experts takes the interpreter half a minute: once is enough.
FEW_EXPERTS = [c for c in cases.CASES if not INTERPRETED or c.num_experts < 1000]


@pytest.mark.parametrize("case", FEW_EXPERTS, ids=lambda c: c.name)
def test_grouped_path(case: cases.Case) -> None:
    check(case, torch.float32, GROUPED)


@pytest.mark.parametrize(
    "case",
    [c for c in cases.CASES if c.reduce and c.num_tokens * c.top_k <= 40],
    ids=lambda c: c.name,
)
def test_decode_path(case: cases.Case) -> None:
    check(case, torch.float16, DECODE)


@pytest.mark.parametrize("name", list(VARIANTS))
@pytest.mark.parametrize("sizes", [(48, 32), (40, 72)], ids=str)
def test_variants(name: str, sizes: tuple[int, int]) -> None:
    case = cases.Case("variant", 29, 5, 2, *sizes, bias=True, routing="zipf")
    config = VARIANTS[name]
    for dtype in (torch.bfloat16, torch.float32):
        check(case, dtype, LayerConfig("grouped", config, config))


@pytest.mark.parametrize("case", FEW_EXPERTS, ids=lambda c: c.name)
def test_rows_in_expert_order(case: cases.Case) -> None:
    """Copied first, loaded by pointers: with router weights on the input, maps, ids to skip."""
    check(case, torch.float32, replace(GROUPED, permuted=True))


def check_same_bits(case: cases.Case, config: LayerConfig, other: LayerConfig) -> None:
    """Of two ways to run the same tiles, the first twice on one workspace."""
    assert LayerConfig.from_json(config.to_json()) == config
    inputs = cases.make_inputs(case, torch.float16, DEVICE)
    size = run_layer(case, inputs, config, size_only=True)
    workspace = torch.full((size + 4096,), 255, dtype=torch.uint8, device=DEVICE)
    wanted = run_layer(case, inputs, other)
    for _ in range(2):
        assert torch.equal(run_layer(case, inputs, config, workspace=workspace), wanted)
    cases.assert_close_to_reference(wanted, case, inputs)


@pytest.mark.parametrize(
    ("routing", "on_input"),
    [(r, False) for r in ("zipf", "hot", "one_expert", "sentinels", "all_sentinels")]
    + [("zipf", True), ("sentinels", True)],
)
def test_rows_in_expert_order_by_descriptor(routing: str, on_input: bool) -> None:
    """The same bits as of gathered rows."""
    case = cases.Case(
        "permuted", 45, 6, 2, 96, 64, bias=True, routing=routing,
        apply_router_weight_on_input=on_input,
    )  # fmt: skip
    walks = KernelConfig(16, 32, 32, 2, descriptors=True, persistent=True, store_parts=2)
    config = LayerConfig("grouped", walks, walks, permuted=True)
    check_same_bits(case, config, replace(config, permuted=False))


@pytest.mark.parametrize("expert_map", [None, "half"])
@pytest.mark.parametrize("routing", ["uniform", "hot", "one_expert", "all_sentinels"])
def test_the_sizes_choose_between_two_configurations(routing: str, expert_map: str | None) -> None:
    """Both are launched and one works, whichever it is: plain, persistent, sharing reductions."""
    case = cases.Case("few", 29, 6, 2, 96, 64, bias=True, routing=routing, expert_map=expert_map)
    config = LayerConfig(
        "grouped", VARIANTS["swapped"], VARIANTS["persistent"],
        FewActive(VARIANTS["tall"], 2), FewActive(VARIANTS["split_swapped"], 2),
    )  # fmt: skip
    assert LayerConfig.from_json(config.to_json()) == config
    check(case, torch.float32, config)
    check(case, torch.float32, replace(config, permuted=True))


FUSED = {
    "plain": (KernelConfig(16, 32, 32, 2), KernelConfig(16, 64, 16, 1)),
    "swapped": (
        KernelConfig(16, 32, 16, 2, swap_operands=True),
        KernelConfig(32, 32, 32, 2, swap_operands=True),
    ),
    "tails": (KernelConfig(64, 32, 16, 1, tail_m=16), KernelConfig(32, 64, 16, 2, tail_m=16)),
    "taller_down": (KernelConfig(16, 64, 32, 4), KernelConfig(64, 16, 16, 4, tail_m=32)),
}


def fused(name: str) -> LayerConfig:
    gate_up, down = (replace(config, descriptors=True, occupancy=3) for config in FUSED[name])
    return LayerConfig("grouped", gate_up, down, fused=True)


@pytest.mark.parametrize("case", FEW_EXPERTS, ids=lambda c: c.name)
def test_both_products_in_one_launch(case: cases.Case) -> None:
    inputs = cases.make_inputs(case, torch.float32, DEVICE)
    w = inputs.weights
    problem = problem_of(inputs.hidden_states, w.gate, w.up, w.down, inputs.topk_ids, True, False)
    if problem.fusable:
        check(case, torch.float32, fused("plain"))
    elif case.num_tokens:
        with pytest.raises(ValueError, match=r"use fused=False|do not suit a tensor descriptor"):
            check(case, torch.float32, fused("plain"))


@pytest.mark.parametrize("name", list(FUSED))
@pytest.mark.parametrize("routing", ["zipf", "hot", "one_expert", "all_sentinels"])
def test_one_launch_with_every_kind_of_tile(name: str, routing: str) -> None:
    """The same bits as by two launches of the same tiles: in any order."""
    case = cases.Case("fused", 75, 6, 2, 96, 64, bias=True, routing=routing)
    config = fused(name)
    check_same_bits(case, config, replace(config, fused=False))


def test_one_launch_after_a_plan_in_two_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other kernel that sets tickets to zero; every tile is drawn once."""
    num_tokens = 2100
    if INTERPRETED:
        num_tokens = 29
        monkeypatch.setattr(plan, "SCAN_ASSIGNMENTS", 16)
        monkeypatch.setattr(plan, "chunk_of", lambda num_assignments: 32)
    case = cases.Case("fused_long", num_tokens, 3, 2, 96, 64, routing="zipf")
    config, target = fused("tails"), Target.probe(DEVICE)
    inputs = cases.make_inputs(case, torch.float32, DEVICE)
    w = inputs.weights
    problem = problem_of(inputs.hidden_states, w.gate, w.up, w.down, inputs.topk_ids, True, False)
    sizes = buffer_sizes(problem, config, target)
    workspace = torch.full((sum(sizes),), 255, dtype=torch.uint8, device=DEVICE)
    out = run_layer(case, inputs, config, workspace=workspace)
    cases.assert_close_to_reference(out, case, inputs)
    first = plan.plan_ints(2 * num_tokens, 3)
    counters = carve(workspace, sizes, torch.float32)[0][
        first : first + num_counters(config, 3, target)
    ]
    rows = inputs.topk_ids.flatten().bincount(minlength=3)
    assert counters[1:4].tolist() == ((rows + 63) // 64 * 2).tolist()  # 64 columns are two tiles.
    tiles = int(counters[1:4].sum()) + int(((rows + 31) // 32 * 2).sum())  # 96: one and a half.
    assert 0 < int(counters[0]) - tiles <= 3 * target.num_sms  # Each program leaves by one in vain.


@pytest.mark.skipif(not INTERPRETED, reason="a program that never comes would hang a GPU")
@pytest.mark.parametrize("held", [0, 5], ids=["first_tile", "last_tile"])
def test_down_waits_for_every_tile_of_its_expert(
    held: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One gate+up tile belongs to a program that is slow: nothing of its expert is read before."""
    case = cases.Case("held", 60, 3, 2, 96, 64, routing="uniform")
    config, inputs = fused("plain"), cases.make_inputs(case, torch.float16, DEVICE)
    wanted, launched = run_layer(case, inputs, config), forward.fused_gemms_into
    seen: dict[str, bool] = {}

    def holding(out: torch.Tensor, act: torch.Tensor, *args: Any, **options: Any) -> None:
        ragged, counters = args[4], args[7]
        assert 32 < ragged.sizes[0] <= 48  # Three row tiles of two columns each.
        launched(out, act, *args, **options)
        good = act.clone()
        out.fill_(torch.nan)
        act.fill_(torch.nan)
        counters.zero_()
        # All tiles before the held one, and it, are drawn; those before have been stored.
        counters[0], counters[1] = held + 1, held
        first = int(ragged.sizes[0])
        thread = threading.Thread(target=launched, args=(out, act, *args), kwargs=options)
        thread.start()
        thread.join(5)
        seen["waits"] = thread.is_alive()
        act[:first] = good[:first]
        counters[1] += 1
        thread.join(60)
        seen["ended"] = not thread.is_alive()

    monkeypatch.setattr(forward, "fused_gemms_into", holding)
    out = run_layer(case, inputs, config)
    assert seen == {"waits": True, "ended": True}
    assert torch.equal(out, wanted)


@pytest.mark.parametrize("name", list(VARIANTS))
def test_variants_with_segments_of_several_tiles(name: str) -> None:
    """Rows past a segment's first tile, groups of row tiles, last tiles nearly empty."""
    case = cases.Case("long", 150, 3, 1, 40, 24, routing="zipf")
    check(case, torch.float32, LayerConfig("grouped", *[VARIANTS[name]] * 2))


@pytest.mark.parametrize("name", ["split_descriptors", "split_swapped"])
def test_shared_reductions_after_a_plan_in_two_launches(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other kernel that sets the counters of arrived programs to zero, on poisoned memory."""
    num_tokens = 2100
    if INTERPRETED:  # As long a plan as the interpreter can wait for.
        num_tokens = 29
        monkeypatch.setattr(plan, "SCAN_ASSIGNMENTS", 16)
        monkeypatch.setattr(plan, "chunk_of", lambda num_assignments: 32)
    case = cases.Case("shared_long", num_tokens, 3, 2, 96, 64, routing="zipf")
    config, rows = LayerConfig("grouped", *[VARIANTS[name]] * 2), 2 * num_tokens
    inputs = cases.make_inputs(case, torch.float32, DEVICE)
    w, target = inputs.weights, Target.probe(DEVICE)
    problem = problem_of(inputs.hidden_states, w.gate, w.up, w.down, inputs.topk_ids, True, False)
    sizes = buffer_sizes(problem, config, target)
    workspace = torch.full((sum(sizes),), 255, dtype=torch.uint8, device=DEVICE)
    outs = [run_layer(case, inputs, config, workspace=workspace).clone() for _ in range(2)]
    cases.assert_close_to_reference(outs[0], case, inputs)
    assert torch.equal(*outs)
    # Programs did arrive, in both products.
    assert plan.count_ints(rows, case.num_experts)
    counters = carve(workspace, sizes, torch.float32)[0][plan.plan_ints(rows, case.num_experts) :]
    arrived = counters[: num_counters(config, case.num_experts, target)].view(2, -1)
    assert (arrived.amax(1) > 1).all() and arrived.min() >= 0


@pytest.mark.parametrize(
    "name", ["tall", "tail", "tail_descriptors", "stored_by_descriptor", "split_swapped"]
)
def test_nan_of_one_token_stays_in_its_row(name: str) -> None:
    """The other rows of its tiles keep their bits."""
    case = cases.Case("nan_rows", 40, 3, 2, 48, 32, routing="zipf")
    config = LayerConfig("grouped", *[VARIANTS[name]] * 2)
    inputs = cases.make_inputs(case, torch.float32, DEVICE)
    clean = run_layer(case, inputs, config)
    others = torch.arange(40, device=DEVICE) != 17
    for value in (torch.nan, torch.inf):
        inputs.hidden_states[17, 5] = value
        out = run_layer(case, inputs, config)
        assert not torch.isfinite(out[17]).any()
        assert torch.equal(out[others], clean[others])


def test_batch_invariance() -> None:
    """A token alone has the bits that it has among 33 others."""
    case = cases.Case("batch", 34, 7, 2)
    inputs = cases.make_inputs(case, torch.bfloat16, DEVICE)
    together = run_layer(case, inputs, None, batch_invariant=True)
    for token in (0, 33):
        rows = slice(token, token + 1)
        alone = cases.Inputs(
            inputs.hidden_states[rows], inputs.weights, inputs.topk_weights[rows],
            inputs.topk_ids[rows], None,
        )  # fmt: skip
        one = run_layer(cases.Case("one", 1, 7, 2), alone, None, batch_invariant=True)
        assert torch.equal(one[0], together[token])


def test_same_bits_twice() -> None:
    case = cases.Case("twice", 40, 7, 3, routing="zipf")
    inputs = cases.make_inputs(case, torch.bfloat16, DEVICE)
    assert torch.equal(run_layer(case, inputs, None), run_layer(case, inputs, None))


def test_skipped_slots_do_not_leak_nan() -> None:
    """A slot that is skipped contributes exactly 0, though its router weight and token hold NaN."""
    case = cases.Case("nan", 4, 7, 2, routing="sentinels")
    inputs = cases.make_inputs(case, torch.float32, DEVICE)
    inputs.topk_ids[0] = -1
    inputs.topk_weights[0] = torch.nan
    inputs.hidden_states[0] = torch.nan
    for config in (GROUPED, DECODE, None):
        out = run_layer(case, inputs, config)
        assert torch.equal(out[0], torch.zeros_like(out[0]))
        assert torch.isfinite(out).all()


def test_caller_owned_workspace() -> None:
    """A poisoned workspace of exactly the promised size is enough, and one byte less is refused."""
    case = cases.Case("workspace", 9, 7, 2)
    inputs = cases.make_inputs(case, torch.float16, DEVICE)
    size = run_layer(case, inputs, None, size_only=True)
    workspace = torch.full((size,), 255, dtype=torch.uint8, device=DEVICE)
    out = run_layer(case, inputs, None, workspace=workspace)
    cases.assert_close_to_reference(out, case, inputs)
    with pytest.raises(ValueError, match="workspace_size"):
        run_layer(case, inputs, None, workspace=workspace[:-1])


def test_out_rows_may_be_strided() -> None:
    case = cases.Case("out", 5, 7, 2)
    inputs = cases.make_inputs(case, torch.float32, DEVICE)
    wide = torch.full((5, 2 * case.hidden_size), 3.0, device=DEVICE)
    out = run_layer(case, inputs, GROUPED, out=wide[:, : case.hidden_size])
    cases.assert_close_to_reference(out, case, inputs)
    assert (wide[:, case.hidden_size :] == 3.0).all()


def test_map_past_the_last_expert_is_skipped() -> None:
    """A wrong expert_map must not read past the weights."""
    case = cases.Case("bad_map", 6, 7, 2)
    inputs = cases.make_inputs(case, torch.float32, DEVICE)
    good = torch.arange(7, dtype=torch.int32, device=DEVICE)
    bad = good.clone()
    good[3], bad[3] = -1, 7
    for config in (GROUPED, DECODE):
        expected = run_layer(case, replace(inputs, expert_map=good), config)
        assert torch.equal(run_layer(case, replace(inputs, expert_map=bad), config), expected)


def test_strided_map_and_strided_unreduced_out() -> None:
    """A column of a table as map, and an output whose slots lie apart."""
    case = cases.Case("map_table", 6, 7, 2, expert_map="half")
    inputs = cases.make_inputs(case, torch.float32, DEVICE)
    table = torch.full((7, 3), 5, dtype=torch.int32, device=DEVICE)
    table[:, 1] = inputs.expert_map
    strided = replace(inputs, expert_map=table[:, 1])
    for config in (GROUPED, DECODE):
        cases.assert_close_to_reference(run_layer(case, strided, config), case, inputs)
    case = cases.Case("slots", 6, 7, 2, reduce=False)
    inputs = cases.make_inputs(case, torch.float32, DEVICE)
    wide = torch.full((6, 3, 2 * case.hidden_size), 3.0, device=DEVICE)
    out = run_layer(case, inputs, GROUPED, out=wide[:, :2, : case.hidden_size])
    cases.assert_close_to_reference(out, case, inputs)
    assert (wide[:, 2] == 3.0).all() and (wide[:, :, case.hidden_size :] == 3.0).all()
