"""What only a GPU can show: real shapes, graphs, syncs, memory, compiling, addresses past 2^31."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch

import tilewise
from tests import cases
from tilewise import ExpertWeights, LayerConfig, MoEShape
from tilewise.dispatch.config import FewActive, KernelConfig
from tilewise.dispatch.fuse import MEDIUM, SHORT, TALL
from tilewise.moe.activation import KINDS, Activation
from tilewise.moe.forward import EARLY_ROWS
from tilewise.moe.plan import SCAN_ASSIGNMENTS
from tilewise.moe.schedule import LayerProblem, schedule

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

QWEN3 = MoEShape(128, 8, 2048, 768)


def call(case: cases.Case, inputs: cases.Inputs, **extra: object) -> torch.Tensor:
    return tilewise.fused_experts(
        inputs.hidden_states, inputs.weights, inputs.topk_weights, inputs.topk_ids,
        expert_map=inputs.expert_map, **cases.options(case), **extra,  # type: ignore[arg-type]
    )  # fmt: skip


@pytest.mark.parametrize("case", cases.LARGE_CASES, ids=lambda c: c.name)
@pytest.mark.parametrize("invariant", [False, True], ids=["default", "invariant"])
def test_real_shapes(case: cases.Case, invariant: bool) -> None:
    inputs = cases.make_inputs(case, torch.bfloat16, "cuda")
    with cases.poisoned_empty():
        out = call(case, inputs, batch_invariant=invariant)
    cases.assert_within(
        out, cases.fp32_experts(case, inputs), cases.plain_torch_experts(case, inputs)
    )


@pytest.mark.parametrize("case", cases.CASES, ids=lambda c: c.name)
def test_every_case_through_the_operator(case: cases.Case) -> None:
    for dtype in cases.DTYPES:
        inputs = cases.make_inputs(case, dtype, "cuda")
        for seed in range(3):  # The second and third call repeat the first one's launches.
            other = cases.make_inputs(case, dtype, "cuda", seed)
            inputs = replace(
                inputs, hidden_states=other.hidden_states, topk_ids=other.topk_ids,
                topk_weights=other.topk_weights,
            )  # fmt: skip
            with cases.poisoned_empty():
                out = call(case, inputs)
            cases.assert_close_to_reference(out, case, inputs)


OLMOE = (64, 8, 2048, 1024)


@pytest.mark.parametrize(
    ("num_tokens", "sizes"),
    [
        *((n, (64, 4, 512, 256)) for n in (1, 5, 40, 700)),
        *((n, OLMOE) for n in (8, 16, 300)),
    ],
)
def test_graph_replays_with_other_routings(
    num_tokens: int, sizes: tuple[int, int, int, int]
) -> None:
    """One captured graph, replayed with six routings and inputs, each right."""
    case = cases.Case("graph", num_tokens, *sizes)
    inputs = cases.make_inputs(case, torch.bfloat16, "cuda")
    call(case, inputs)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call(case, inputs)
    routings = ["uniform", "hot", "one_expert", "zipf", "sentinels", "all_sentinels"]
    for seed, routing in enumerate(routings):
        fresh = cases.make_inputs(
            replace(case, routing=routing), torch.bfloat16, "cuda", seed + 1,
        )  # fmt: skip
        inputs.hidden_states.copy_(fresh.hidden_states)
        inputs.topk_ids.copy_(fresh.topk_ids)
        inputs.topk_weights.copy_(fresh.topk_weights)
        out.fill_(torch.nan)
        graph.replay()
        cases.assert_within(
            out, cases.fp32_experts(case, inputs), cases.plain_torch_experts(case, inputs)
        )


def fused_here(sizes: tuple[int, int, int, int], num_tokens: int) -> bool:
    """Whether both products of such a call run in one launch; Hopper's table says so."""
    experts, top_k, hidden, inter = sizes
    problem = LayerProblem(num_tokens, top_k, experts, hidden, inter, 2, True, True)
    return schedule(problem, tilewise.Target.probe()).fused


@pytest.mark.parametrize("num_tokens", [8, 300])
@pytest.mark.parametrize("routing", ["uniform", "hot", "one_expert"])
def test_one_launch_ends_beside_others(num_tokens: int, routing: str) -> None:
    """Programs that wait for each other end, with the same bits, while streams share the device."""
    if not fused_here(OLMOE, num_tokens):
        pytest.skip("both products run in launches of their own here")
    case = cases.Case("beside", num_tokens, *OLMOE, routing=routing)
    inputs = cases.make_inputs(case, torch.bfloat16, "cuda")
    wanted = call(case, inputs)
    cases.assert_within(
        wanted, cases.fp32_experts(case, inputs), cases.plain_torch_experts(case, inputs)
    )
    busy = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    streams = [torch.cuda.Stream() for _ in range(4)]
    torch.cuda.synchronize()
    outs = []
    for _ in range(50):
        for stream in streams[1:]:
            # Activations of the call before would be these: what is read too early must show.
            with torch.cuda.stream(stream), cases.poisoned_empty():
                outs.append(call(case, inputs))
        with torch.cuda.stream(streams[0]):
            busy = (busy @ busy).clamp_(-1, 1)
    torch.cuda.synchronize()
    assert all(torch.equal(out, wanted) for out in outs)


def test_the_sizes_choose_inside_a_graph() -> None:
    """The same bits as by the configuration that the routing calls for, without a sync."""
    plain = KernelConfig(64, 64, 64, descriptors=True)
    other = KernelConfig(16, 64, 64, descriptors=True, split_k=4)
    both = tilewise.LayerConfig("grouped", plain, plain, FewActive(other, 8), FewActive(other, 8))
    case = cases.Case("few", 100, 64, 4, 512, 256)
    inputs = cases.make_inputs(case, torch.bfloat16, "cuda")
    call(case, inputs, config=both)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call(case, inputs, config=both)
    for seed, (routing, alone) in enumerate(
        {"uniform": plain, "hot": other, "zipf": plain}.items()
    ):
        fresh = cases.make_inputs(replace(case, routing=routing), torch.bfloat16, "cuda", seed + 1)
        inputs.hidden_states.copy_(fresh.hidden_states)
        inputs.topk_ids.copy_(fresh.topk_ids)
        inputs.topk_weights.copy_(fresh.topk_weights)
        out.fill_(torch.nan)
        graph.replay()
        wanted = call(case, inputs, config=tilewise.LayerConfig("grouped", alone, alone))
        assert torch.equal(out, wanted)


@pytest.mark.parametrize("num_tokens", [1, 40, 700])
def test_no_hidden_sync(num_tokens: int) -> None:
    case = cases.Case("sync", num_tokens, 64, 4, 512, 256)
    inputs = cases.make_inputs(case, torch.bfloat16, "cuda")
    logits = torch.randn(num_tokens, 64, device="cuda")
    router = torch.randn(64, 512, device="cuda", dtype=torch.bfloat16)
    torch.cuda.set_sync_debug_mode("error")
    try:
        call(case, inputs)
        call(case, inputs, batch_invariant=True)
        tilewise.route(logits, 4)
        tilewise.plan(inputs.topk_ids, 64)
        tilewise.fused_moe(inputs.hidden_states, router, inputs.weights, 4)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_addresses_past_two_to_the_31(dtype: torch.dtype) -> None:
    """Weights, hidden states and rows of more than 2^31 elements, used at their far ends."""
    experts, hidden, inter = 80, 6144, 4608
    gate_up = torch.empty(experts, 2 * inter, hidden, dtype=dtype, device="cuda")
    down = torch.empty(experts, hidden, inter, dtype=dtype, device="cuda")
    assert gate_up.numel() > 2**31 and down.numel() > 2**31
    for t, scale in ((gate_up, hidden**-0.5), (down, inter**-0.5)):
        for e in range(experts):
            t[e].normal_(std=scale)
    case = cases.Case("far", 24, experts, 2, hidden, inter, routing="uniform")
    for num_tokens in (1, 24, 400):
        case = cases.Case("far", num_tokens, experts, 2, hidden, inter)
        small = cases.make_ids(case, "cuda", torch.Generator("cuda").manual_seed(0))
        small[0, 0], small[-1, -1] = experts - 1, experts - 2
        inputs = cases.Inputs(
            torch.randn(num_tokens, hidden, device="cuda", dtype=dtype),
            ExpertWeights.from_gate_up(gate_up, down),
            torch.rand(num_tokens, 2, device="cuda"), small, None,
        )  # fmt: skip
        for invariant in (False, True):
            cases.assert_within(
                call(case, inputs, batch_invariant=invariant), cases.fp32_experts(case, inputs),
                cases.plain_torch_experts(case, inputs),
            )  # fmt: skip


@pytest.mark.parametrize(
    ("hidden", "inter"), [(16_400, 64), (64, 16_400)], ids=["hidden_states", "activations"]
)
@pytest.mark.parametrize("descriptors", [True, False], ids=["descriptors", "pointers"])
def test_many_tokens_past_two_to_the_31(hidden: int, inter: int, descriptors: bool) -> None:
    """131,072 tokens: rows beyond 2^31 elements in and out, or between the products."""
    tokens = 131_072
    assert tokens * max(hidden, inter) > 2**31
    x = torch.empty(tokens, hidden, dtype=torch.bfloat16, device="cuda")
    x[-64:].normal_()
    x[:-64] = 0.5
    weights = ExpertWeights.from_gate_up(
        torch.randn(4, 2 * inter, hidden, device="cuda").mul_(hidden**-0.5).bfloat16(),
        torch.randn(4, hidden, inter, device="cuda").mul_(inter**-0.5).bfloat16(),
    )
    ids = torch.randint(0, 4, (tokens, 1), device="cuda", dtype=torch.int32)
    ids[-32:] = 3  # The last rows of all, whose elements are the farthest.
    topk_weights = torch.ones(tokens, 1, device="cuda")
    problem = LayerProblem(tokens, 1, 4, hidden, inter, 2, True, descriptors)
    config = schedule(problem, tilewise.Target.probe())
    out = tilewise.fused_experts(x, weights, topk_weights, ids, config=config)
    tail = slice(tokens - 64, tokens)
    case = cases.Case("tail", 64, 4, 1, hidden, inter)
    part = cases.Inputs(x[tail], weights, topk_weights[tail], ids[tail], None)
    cases.assert_within(
        out[tail], cases.fp32_experts(case, part), cases.plain_torch_experts(case, part)
    )
    # Alike in all tokens of an expert, wherever their rows lie.
    where = ids[:-64, 0].long()
    first = out[torch.stack([(where == e).int().argmax() for e in range(4)])]
    assert torch.equal(out[:-64], first[where])


@pytest.mark.parametrize(
    "shape",
    [QWEN3, MoEShape(128, 8, 4096, 192), MoEShape(8, 2, 4096, 3584), MoEShape(60, 4, 1411, 709)],
    ids=str,
)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_batch_invariance(shape: MoEShape, dtype: torch.dtype) -> None:
    """A token has the same bits alone and among 33, 500 and 2,500 others."""
    case = cases.Case("batch", 2501, shape.num_experts, shape.top_k, shape.hidden_size,
                      shape.intermediate_size)  # fmt: skip
    inputs = cases.make_inputs(case, dtype, "cuda")
    weights = inputs.weights

    def run(rows: slice) -> torch.Tensor:
        return tilewise.fused_experts(
            inputs.hidden_states[rows], weights, inputs.topk_weights[rows], inputs.topk_ids[rows],
            batch_invariant=True,
        )  # fmt: skip

    everyone = run(slice(None))
    for count in (1, 2, 8, 34, 129, 501):
        assert torch.equal(run(slice(0, count)), everyone[:count]), count
        assert torch.equal(run(slice(2501 - count, None)), everyone[2501 - count :]), count


def test_product_bits_do_not_depend_on_the_tile() -> None:
    """What `Target.same_bits_any_tile` claims, over the tiles and instructions that are chosen."""
    target = tilewise.Target.probe()
    if not target.same_bits_any_tile:
        pytest.skip(f"not claimed for {target.arch}")
    shape = MoEShape(32, 4, 4096, 1536)
    case = cases.Case("bits", 300, 32, 4, 4096, 1536)
    inputs = cases.make_inputs(case, torch.bfloat16, "cuda")
    outs = []
    for tokens in (4, 16, 40, 128, 700, 3000):  # Batches that choose different tiles.
        problem = LayerProblem(tokens, 4, 32, 4096, 1536, 2, True, True)
        for machine in (target, replace(target, warpgroup_mma=False)):
            outs.append(call(case, inputs, config=schedule(problem, machine)))
    for pair in (SHORT, MEDIUM, TALL):  # Both products in one launch.
        outs.append(call(case, inputs, config=tilewise.LayerConfig("grouped", *pair, fused=True)))
    assert all(torch.equal(out, outs[0]) for out in outs), shape


@pytest.mark.parametrize(
    "case",
    [
        cases.Case("repeat", 700, 64, 4, 512, 256, routing="zipf"),
        # Narrow enough that programs share reductions, in whatever order they arrive.
        cases.Case("shared", 8, 128, 8, 4096, 192, routing="hot"),
    ],
    ids=lambda c: c.name,
)
def test_same_bits_run_after_run(case: cases.Case) -> None:
    inputs = cases.make_inputs(case, torch.bfloat16, "cuda")
    if case.name == "shared":
        tiles = inputs.topk_ids.unique().numel() * 3
        assert torch.cuda.get_device_properties(0).multi_processor_count // tiles > 1
    first = call(case, inputs)
    cases.assert_within(
        first, cases.fp32_experts(case, inputs), cases.plain_torch_experts(case, inputs)
    )
    for _ in range(200):
        assert torch.equal(call(case, inputs), first)


@pytest.mark.parametrize("num_tokens", [1, 64, 2048])
def test_workspace_size_is_the_peak(num_tokens: int) -> None:
    case = cases.Case("memory", num_tokens, 128, 8, 2048, 768)
    inputs = cases.make_inputs(case, torch.bfloat16, "cuda")
    out = torch.empty_like(inputs.hidden_states)
    size = tilewise.workspace_size(QWEN3, num_tokens)
    call(case, inputs)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call(case, inputs, out=out)
    torch.cuda.synchronize()
    taken = torch.cuda.max_memory_allocated() - before
    assert abs(taken - size) <= max(0.05 * size, 512), (taken, size)
    workspace = torch.full((size,), 255, dtype=torch.uint8, device="cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call(case, inputs, out=out, workspace=workspace)
    assert torch.cuda.max_memory_allocated() == before


def compiled_variants() -> set[object]:
    """Every variant that this process has compiled or loaded, over all kernels."""
    from tilewise.moe.kernels import combine, decode, fused, grouped, plan, topk

    kernels = [
        grouped.grouped_gemm_kernel, fused.fused_gemms_kernel, decode.decode_gate_up_kernel,
        decode.decode_down_kernel, plan.plan_kernel, plan.plan_count_kernel,
        plan.plan_place_kernel, combine.combine_kernel, topk.route_kernel,
    ]  # fmt: skip
    found: set[object] = set()
    for kernel in kernels:
        for caches in kernel.device_caches.values():
            found.update((kernel.fn.__name__, key) for key in caches[0])
    return found


GIVEN = KernelConfig(64, 64, 64, 8, 4, 3, descriptors=True, tail_m=16)


@pytest.mark.parametrize(
    "options",
    [{}, {"batch_invariant": True}, {"config": LayerConfig("grouped", GIVEN, GIVEN)}],
    ids=["default", "invariant", "config"],
)
def test_nothing_compiles_after_warmup(options: dict[str, Any]) -> None:
    shape = MoEShape(24, 8, 2048, 1024)
    listed = tilewise.warmup(shape, max_tokens=3000, **options)
    assert listed
    before = compiled_variants()
    weights = tilewise.FusedExperts(shape, device="cuda").weights
    for num_tokens in (1, 2, 3, 7, 8, 9, 16, 17, 31, 64, 65, 100, 333, 1024, 1025, 2999):
        x = torch.randn(num_tokens, 2048, device="cuda", dtype=torch.bfloat16)
        logits = torch.randn(num_tokens, 24, device="cuda", dtype=torch.bfloat16)
        topk_weights, ids = tilewise.route(logits, 8)
        tilewise.fused_experts(x, weights, topk_weights, ids, **options)
    torch.cuda.synchronize()
    assert not compiled_variants() - before


def test_torch_compile_captures_the_layer() -> None:
    layer = tilewise.FusedMoE(MoEShape(64, 4, 512, 256), device="cuda")
    compiled = torch.compile(layer, fullgraph=True)
    for num_tokens in (3, 50, 51, 400):
        x = torch.randn(num_tokens, 512, device="cuda", dtype=torch.bfloat16)
        torch.testing.assert_close(compiled(x), layer(x), rtol=2e-2, atol=2e-2)


def test_operator_checks() -> None:
    case = cases.Case("opcheck", 9, 7, 2)
    inputs = cases.make_inputs(case, torch.bfloat16, "cuda")
    w = inputs.weights
    args = (
        inputs.hidden_states, w.gate, w.up, w.down, None, None, None, None, None, None, None, None,
        None, "dense", inputs.topk_weights, inputs.topk_ids, None, "swiglu", 1.0, 0.0, None, False,
        True, False, "",
    )  # fmt: skip
    torch.library.opcheck(torch.ops.tilewise.fused_experts.default, args)
    torch.library.opcheck(torch.ops.tilewise.plan.default, (inputs.topk_ids, 7, None))
    torch.library.opcheck(
        torch.ops.tilewise.route.default,
        (torch.randn(9, 7, device="cuda"), 2, "softmax", True, None, 0, 0, 1.0),
    )


def test_repeated_launches_follow_their_tensors() -> None:
    """Calls alike in shape, with other addresses, strides, aliasing and alignment, in any order."""
    for num_tokens in (1, 40):
        case = cases.Case("repeat", num_tokens, 64, 4, 512, 256)
        for round_ in range(3):
            inputs = cases.make_inputs(case, torch.bfloat16, "cuda", round_)
            expected = cases.fp32_experts(case, inputs)
            plain = cases.plain_torch_experts(case, inputs)
            flat = torch.empty(num_tokens * 512 + 1, dtype=torch.bfloat16, device="cuda")
            wide = torch.full((num_tokens, 1024), 3.0, dtype=torch.bfloat16, device="cuda")
            outs = [None, flat[1:].view(num_tokens, 512), wide[:, :512], flat[:-1].view(-1, 512)]
            for out in outs:
                cases.assert_within(call(case, inputs, out=out), expected, plain)
            assert (wide[:, 512:] == 3.0).all()
            unaligned = torch.empty(num_tokens * 512 + 1, dtype=torch.bfloat16, device="cuda")
            x = unaligned[1:].view(num_tokens, 512).copy_(inputs.hidden_states)
            cases.assert_within(call(case, replace(inputs, hidden_states=x)), expected, plain)


def test_repeated_launches_know_which_weights_are_one() -> None:
    """Calls that differ only in which of their tensors are the same one."""
    for num_tokens in (2, 40):
        case = cases.Case("square", num_tokens, 8, 2, 256, 256, bias=True, layout="split")
        inputs = cases.make_inputs(case, torch.bfloat16, "cuda")
        w = inputs.weights
        for same in (
            {"down": w.gate}, {"down": w.up}, {"down_bias": w.gate_bias}, {"down_bias": w.up_bias},
            {"up_bias": w.gate_bias},
        ):  # fmt: skip
            tied = replace(inputs, weights=replace(w, **same))  # type: ignore[arg-type]
            expected = cases.fp32_experts(case, tied)
            for _ in range(2):
                cases.assert_within(
                    call(case, tied), expected, cases.plain_torch_experts(case, tied)
                )


@pytest.mark.parametrize("kind", KINDS)
def test_nan_of_an_active_token_stays(kind: str) -> None:
    """Clamps and maxima on the GPU would turn NaN into a number if told nothing."""
    for limit in (None, 0.5):
        activation = Activation(kind, limit=limit)
        for num_tokens in (2, 9):
            case = cases.Case("nan", num_tokens, 7, 2, 64, 32, activation=activation)
            inputs = cases.make_inputs(case, torch.bfloat16, "cuda")
            inputs.hidden_states[0, 3] = torch.nan
            out = call(case, inputs)
            assert out[0].isnan().all() and torch.isfinite(out[1:]).all()


@pytest.mark.parametrize("num_tokens", [100, 700, 3000])
@pytest.mark.parametrize("sizes", [(8, 2, 1024, 2048), (64, 4, 512, 256)], ids=str)
def test_nan_of_one_token_leaves_the_others_bits(
    sizes: tuple[int, int, int, int], num_tokens: int
) -> None:
    """Tall tiles hold many tokens' rows, and their tails rows of no token."""
    case = cases.Case("nan_rows", num_tokens, *sizes, routing="zipf")
    inputs = cases.make_inputs(case, torch.bfloat16, "cuda")
    clean = call(case, inputs)
    for token in (0, num_tokens // 2, num_tokens - 1):
        for value in (torch.nan, torch.inf):
            x = inputs.hidden_states.clone()
            x[token, 5] = value
            out = call(case, replace(inputs, hidden_states=x))
            assert not torch.isfinite(out[token]).any()
            out[token] = clean[token]
            assert torch.equal(out, clean), (token, value)


def test_shared_reductions_after_a_plan_in_two_launches() -> None:
    """More ids than one launch plans, few enough tiles that programs share their reductions."""
    target = tilewise.Target.probe()
    if not target.tensor_descriptors:
        pytest.skip(f"{target.arch} loads gate and up by pointers, and shares no sums of theirs")
    case = cases.Case("shared_long", 2600, 4, 2, 512, 256, routing="hot")
    inputs = cases.make_inputs(case, torch.bfloat16, "cuda")
    whole = KernelConfig(128, 64, 64, 8, 8, 3, descriptors=True)
    split = replace(whole, split_k=3, occupancy=16)
    first = call(case, inputs, config=tilewise.LayerConfig("grouped", split, split))
    cases.assert_within(
        first, cases.fp32_experts(case, inputs), cases.plain_torch_experts(case, inputs)
    )
    for other in ((split, whole), (whole, split)):
        # Sums of parts round otherwise than whole sums: both products were shared.
        unlike = call(case, inputs, config=tilewise.LayerConfig("grouped", *other))
        assert not torch.equal(unlike, first)
    for _ in range(50):
        again = call(case, inputs, config=tilewise.LayerConfig("grouped", split, split))
        assert torch.equal(again, first)


@pytest.mark.parametrize("captured", [False, True], ids=["eager", "graph"])
@pytest.mark.parametrize("mapped", [False, True], ids=["all_here", "expert_map"])
@pytest.mark.parametrize("kind", ["chosen", "two_configurations", "one_launch"])
@pytest.mark.parametrize(
    "shape", [MoEShape(64, 4, 512, 256), MoEShape(128, 8, 4096, 192)], ids=["plain", "shared"]
)
def test_calls_in_a_row_share_their_memory(
    shape: MoEShape, kind: str, mapped: bool, captured: bool
) -> None:
    """Kernels that start before the one ahead has ended write nothing that it still reads.

    Pairs of calls, of many sizes, on one workspace and one tensor between the two calls of a pair;
    also with two configurations of each product, of which the device chooses one, and with both
    products in one launch.
    """
    target = tilewise.Target.probe()
    pairs = kind == "two_configurations"
    if kind != "chosen" and not target.tensor_descriptors:
        pytest.skip(f"{target.arch} has no tensor descriptors")
    experts, top_k, hidden = shape.num_experts, shape.top_k, shape.hidden_size
    counts = (1200, 128, 1, 16, 3, 20)
    assert 20 * top_k <= EARLY_ROWS < 128 * top_k
    assert 1200 * top_k > SCAN_ASSIGNMENTS  # Planned by two launches.
    case = cases.Case("row", 1, experts, top_k, hidden, shape.intermediate_size,
                      expert_map="half" if mapped else None)  # fmt: skip
    made = cases.make_inputs(case, torch.bfloat16, "cuda")
    weights, expert_map = made.weights, made.expert_map
    here = replace(shape, num_experts=weights.num_local_experts)
    config = None
    if pairs:
        plain = KernelConfig(64, 64, 64, descriptors=True)
        few = FewActive(KernelConfig(16, 64, 64, descriptors=True, split_k=4), 3 * top_k)
        assert few.up_to < here.num_experts  # Both are launched.
        config = tilewise.LayerConfig("grouped", plain, plain, few, few)
    if kind == "one_launch":
        tiles = KernelConfig(64, 64, 64, descriptors=True, tail_m=16, occupancy=2)
        config = tilewise.LayerConfig("grouped", tiles, replace(tiles, block_n=128), fused=True)
    xs = [torch.empty(n, hidden, dtype=torch.bfloat16, device="cuda") for n in counts]
    gates = [torch.empty(n, top_k, device="cuda") for n in counts]
    ids = [torch.empty(n, top_k, dtype=torch.int32, device="cuda") for n in counts]
    outs = [torch.empty_like(x) for x in xs]
    shared_between = torch.empty_like(xs[0])
    size = tilewise.workspace_size(here, max(counts), config=config)
    shared = torch.full((size,), 255, dtype=torch.uint8, device="cuda")

    def run(alone: bool) -> list[torch.Tensor]:
        results = []
        for x, weight, expert, out in zip(xs, gates, ids, outs, strict=True):
            between = torch.empty_like(x) if alone else shared_between[: len(x)]
            result = torch.empty_like(x) if alone else out
            for source, into in ((x, between), (between, result)):
                workspace = torch.full_like(shared, 255) if alone else shared
                tilewise.fused_experts(
                    source, weights, weight, expert, expert_map=expert_map, config=config,
                    out=into, workspace=workspace,
                )  # fmt: skip
                if alone:
                    torch.cuda.synchronize()
            results.append(result)
        return results

    def renew(round_: int) -> None:
        for i, (x, weight, expert) in enumerate(zip(xs, gates, ids, strict=True)):
            x.normal_()
            weight.uniform_()
            # Every second call's tokens all choose alike: few experts are active, next time many.
            alike = pairs and (round_ + i) % 2 == 1
            scores = torch.rand(1 if alike else len(x), experts, device="cuda")
            expert.copy_(scores.topk(top_k).indices)

    renew(0)
    run(alone=False)
    graph = torch.cuda.CUDAGraph() if captured else None
    if graph is not None:
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            run(alone=False)
    for round_ in range(50):
        renew(round_)
        expected = run(alone=True)
        for out in outs:
            out.fill_(torch.nan)
        if graph is not None:
            graph.replay()
            graph.replay()
        else:
            torch.cuda._sleep(4_000_000)  # Until all launches are queued: then none waits for us.
            run(alone=False)
        assert all(map(torch.equal, outs, expected))


def test_threads_repeat_the_same_launches() -> None:
    case = cases.Case("threads", 40, 64, 4, 512, 256)
    inputs = [cases.make_inputs(case, torch.bfloat16, "cuda", seed) for seed in range(4)]
    weights = inputs[0].weights
    inputs = [replace(i, weights=weights) for i in inputs]
    expected = [call(case, i) for i in inputs]

    def work(index: int) -> bool:
        with torch.cuda.stream(torch.cuda.Stream()):
            good = True
            for _ in range(50):
                good &= torch.equal(call(case, inputs[index]), expected[index])
            return good

    torch.cuda.synchronize()
    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(4)))


def test_layers_alike_share_their_launches() -> None:
    case = cases.Case("layers", 40, 64, 4, 512, 256)
    for seed in range(3):
        inputs = cases.make_inputs(case, torch.bfloat16, "cuda", seed)
        cases.assert_within(
            call(case, inputs), cases.fp32_experts(case, inputs),
            cases.plain_torch_experts(case, inputs),
        )  # fmt: skip


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_second_gpu_while_the_first_is_current() -> None:
    case = cases.Case("second", 40, 64, 4, 512, 256)
    inputs = cases.make_inputs(case, torch.bfloat16, "cuda:1")
    for _ in range(2):
        cases.assert_within(
            call(case, inputs), cases.fp32_experts(case, inputs),
            cases.plain_torch_experts(case, inputs),
        )  # fmt: skip
    tilewise.route(torch.randn(5, 64, device="cuda:1"), 4)


def test_wrong_out_and_workspace_are_refused_when_repeating() -> None:
    case = cases.Case("refuse_out", 9, 7, 2)
    inputs = cases.make_inputs(case, torch.bfloat16, "cuda")
    good = torch.empty(9, case.hidden_size, dtype=torch.bfloat16, device="cuda")
    call(case, inputs, out=good)
    with pytest.raises(ValueError, match="out"):
        call(case, inputs, out=good.cpu())
    workspace = torch.empty(1 << 22, dtype=torch.uint8, device="cuda")
    call(case, inputs, out=good, workspace=workspace)
    for wrong in (workspace.cpu(), workspace[::2], workspace.view(torch.int8), workspace[1:]):
        with pytest.raises(ValueError, match="workspace"):
            call(case, inputs, out=good, workspace=wrong)


def test_impossible_configuration_is_refused() -> None:
    case = cases.Case("refuse", 9, 7, 2)
    inputs = cases.make_inputs(case, torch.bfloat16, "cuda")
    huge = KernelConfig(128, 256, 128, num_warps=8, num_stages=6)
    with pytest.raises(ValueError, match="shared memory"):
        call(case, inputs, config=tilewise.LayerConfig("grouped", huge, huge))
