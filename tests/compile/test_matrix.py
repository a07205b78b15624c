"""Every kernel x dtype x architecture compiles: matrix instructions, in shared memory, unspilled.

"Compiled" is all that is claimed: none of this runs. The configurations are those that the library
would choose on each machine. TILEWISE_COMPILE_FULL=1 adds every token count and shape to every
dtype.
"""

from __future__ import annotations

import os
import re
from typing import Any

import pytest

from .crosscompile import ARCHS, check_overlap, compile_kernel, load, waits_for_each_product

FULL = os.environ.get("TILEWISE_COMPILE_FULL") == "1"
DTYPES = ("bf16", "fp16", "fp32")
# Sizes that divide by every tile, by 16 alone (every published model does), and by nothing.
SHAPES = {
    "even": (128, 8, 2048, 1024),
    "by16": (60, 4, 1424, 720),
    "odd": (60, 4, 1411, 709),
    "narrow": (128, 8, 4096, 192),
    "long": (8, 2, 4096, 14336),
}
FEWEST = {"narrow": (3,), "long": (3,)}  # Tokens that are rules of their own there.
TOKENS = (8, 32, 48, 128, 2048, 8192)
# Shipped although ptxas makes its products wait for each other: its costs were measured so.
SERIAL = ("32x32x64 g8 w4 s4 SD",)

config = load("dispatch.config")
fuse = load("dispatch.fuse")
rules = load("dispatch.rules")
select = load("dispatch.select")
table = load("dispatch.table")
target_module = load("target")


def gemm(shape: str, tokens: int, stage: str, dtype: str) -> Any:
    experts, top_k, hidden, inter = SHAPES[shape]
    size = 4 if dtype == "fp32" else 2
    rows, aligned = tokens * top_k, shape != "odd"
    if stage == "gate_up":
        return config.GroupedGemm(rows, tokens, experts, inter, hidden, 2, size, True, aligned)
    return config.GroupedGemm(rows, tokens, experts, hidden, inter, 1, size, False, aligned)


def precision(dtype: str, arch: str) -> str:
    return "tf32x3" if dtype == "fp32" and arch.startswith("sm") else "ieee"


def overlap_of(arch: str, cfg: Any) -> int:
    """Early with the tiles of few rows, late with others; 0 where kernels start in turn."""
    if not target_module.Target.from_arch(arch).dependent_launch:
        return 0
    return 1 if cfg.block_m <= 32 else 2


def grouped_arguments(
    shape: str,
    stage: str,
    dtype: str,
    arch: str,
    cfg: Any,
    kind: str,
    extras: bool,
    bounded: bool = False,
) -> dict[str, Any]:
    problem = gemm(shape, 8, stage, dtype)
    pointer, gated = f"*{dtype}!", stage == "gate_up"
    weight = first = rows = tail = out = out_tail = pointer
    parts = cfg.store_parts if cfg.split_k == 1 and shape != "odd" else 0
    # Gate and up of one tensor come by one descriptor; split tensors ("odd" here) by two.
    pair = gated and cfg.descriptors and shape != "odd"

    def ragged(height: int, width: int) -> str:
        return f"tensordesc<{dtype}[1, 1, {height}, {width}]>"

    # Triton learns at run time which sizes divide by 16 and vectorises loads by it.
    size = "i32" if shape == "odd" else "i32!"
    if cfg.descriptors:
        weight = f"tensordesc<{dtype}[1, {cfg.block_n}, {cfg.block_k}]>"
        first = f"tensordesc<{dtype}[1, 2, {cfg.block_n}, {cfg.block_k}]>" if pair else weight
        if not gated:
            rows = ragged(cfg.block_m, cfg.block_k)
            tail = ragged(cfg.tail_m, cfg.block_k) if cfg.tail_m else pointer
        if parts:
            out = ragged(cfg.block_m, cfg.block_n // parts)
            out_tail = ragged(cfg.tail_m, cfg.block_n // parts) if cfg.tail_m else pointer
    return {
        "x_ptr": rows, "x_tail_ptr": tail, "gate": first, "up": weight, "gate_bias_ptr": pointer,
        "up_bias_ptr": pointer, "out_ptr": out, "out_tail_ptr": out_tail, "sizes_ptr": "*i32!",
        "gather_ptr": "*i32", "row_weights_ptr": "*fp32!", "partials_ptr": "*fp32!",
        "counters_ptr": "*i32!",
        "num_segments": "i32", "num_programs": "i32", "N": size, "K": size, "top_k": "i32",
        "more_than": "i32", "at_most": "i32",
        "stride_xm": size, "stride_xk": 1, "stride_ge": size, "stride_gn": size,
        "stride_gk": 1, "stride_ue": size, "stride_un": size, "stride_uk": 1,
        "stride_gbe": size, "stride_gbn": 1, "stride_ube": size, "stride_ubn": 1,
        "stride_rt": "i32", "stride_rk": 1, "stride_om": size,
        "SEGMENTS": 256, "GATED": gated, "GATHER": gated, "BIAS": extras,
        "ROW_WEIGHTS": extras and gated, "KIND": kind if gated else "none", "ALPHA": 1.702,
        "BETA": 1.0, "LIMIT": 7.0 if extras else None,
        "EVEN_K": problem.k % cfg.block_k == 0 or (cfg.descriptors and not gated),
        "EVEN_N": problem.n % cfg.block_n == 0 or cfg.descriptors,
        "SAME_STRIDES": True,
        "DESCRIPTORS": cfg.descriptors, "X_DESCRIPTOR": cfg.descriptors and not gated,
        "OUT_PARTS": parts,
        "PAIR": pair, "UP_FIRST": False, "SWAP": cfg.swap_operands, "PERSISTENT": cfg.persistent,
        # Two accumulators are never split.
        "SPLIT_K": cfg.split_k if pair or not gated else 1, "TAIL_M": cfg.tail_m,
        "OVERLAP": overlap_of(arch, cfg), "BOUNDED": bounded,
        "UPCAST": False,
        "PRECISION": precision(dtype, arch), "BLOCK_M": cfg.block_m, "BLOCK_N": cfg.block_n,
        "BLOCK_K": cfg.block_k, "GROUP_M": cfg.group_m, "NUM_STAGES": cfg.num_stages,
    }  # fmt: skip


def grouped_cases() -> list[Any]:
    cases = []
    for arch in ARCHS:
        for dtype in DTYPES:
            tokens = TOKENS if FULL or dtype == "bf16" else (8, 2048)
            for stage in ("gate_up", "down"):
                for shape in SHAPES if FULL or dtype == "bf16" else ("by16",):
                    seen = set()
                    ends = FEWEST.get(shape, (tokens[0], tokens[-1]))
                    for count in tokens if shape == "even" else ends:
                        cfg = select.choose(
                            gemm(shape, count, stage, dtype), target_module.Target.from_arch(arch)
                        )
                        if cfg not in seen:
                            seen.add(cfg)
                            name = f"{arch}-{dtype}-{stage}-{shape}-{count}"
                            cases.append(pytest.param(arch, dtype, stage, shape, cfg, id=name))
                    for variant in (
                        variants(arch, stage) if (dtype, shape) == ("bf16", "even") else ()
                    ):
                        if variant not in seen:
                            seen.add(variant)
                            name = f"{arch}-{dtype}-{stage}-{variant.name}".replace(" ", "_")
                            cases.append(pytest.param(arch, dtype, stage, shape, variant, id=name))
    return cases


def variants(arch: str, stage: str) -> list[Any]:
    """What costs were fitted for: any of them may be chosen for some shape."""
    fitted = table.shipped(arch)
    return list(getattr(fitted, stage).coefficients) if fitted else []


@pytest.mark.parametrize(("arch", "dtype", "stage", "shape", "cfg"), grouped_cases())
def test_grouped_gemm(arch: str, dtype: str, stage: str, shape: str, cfg: Any) -> None:
    kernel = load("moe.kernels.grouped").grouped_gemm_kernel
    arguments = grouped_arguments(shape, stage, dtype, arch, cfg, "swiglu", shape != "even")
    compiled = compile_kernel(kernel, arch, arguments, cfg.num_warps, cfg.num_stages)
    assert re.search(ARCHS[arch][1][dtype], compiled.assembly), "no matrix instruction"
    limit = target_module.Target.from_arch(arch).shared_memory
    assert compiled.shared <= limit, f"{compiled.shared} B of shared memory, limit {limit}"
    estimate = config.shared_memory(cfg, gemm(shape, 8, stage, dtype))
    assert compiled.shared <= estimate, f"estimated {estimate} B, needs {compiled.shared}"
    # Element-wise loads hold their tiles in registers; no model needs them fast.
    if shape != "odd":
        assert compiled.spilled == 0, f"spills {compiled.spilled}"
    if cfg.swap_operands and dtype != "fp32":
        assert "wgmma" in compiled.assembly, "operands were swapped for wgmma, which is not there"
    if cfg.descriptors and arch.startswith("sm"):
        assert "cp.async.bulk.tensor" in compiled.assembly, "descriptor loads fell back"
    if mode := overlap_of(arch, cfg):
        check_overlap(compiled.assembly, mode)
    if (arch, dtype, shape) == ("sm_90", "bf16", "even"):
        assert waits_for_each_product(compiled.cubin) is (cfg.name in SERIAL)


def fused_pairs() -> list[Any]:
    """(architecture, dtype, both configurations) of one launch: Hopper's, shallower elsewhere."""
    pairs = (fuse.SHORT, fuse.MEDIUM, fuse.TALL)
    small = [config.replace(c, num_stages=2) for c in fuse.SHORT]
    cases = [("sm_90", dtype, *pair) for pair in pairs for dtype in ("bf16", "fp16")]
    cases += [(arch, "bf16", *small) for arch in ("sm_100", "sm_120")]
    return [pytest.param(*c, id=f"{c[0]}-{c[1]}-{c[2].name}".replace(" ", "_")) for c in cases]


@pytest.mark.parametrize(("arch", "dtype", "first", "second"), fused_pairs())
def test_fused_gemms(arch: str, dtype: str, first: Any, second: Any) -> None:
    pointer = f"*{dtype}!"

    def ragged(height: int) -> str:
        return f"tensordesc<{dtype}[1, 1, {height}, {second.block_k}]>"

    extras, mode = second.tail_m == 0, 1 if first.block_m <= 32 else 2
    arguments = {
        "x_ptr": pointer, "gate_up": f"tensordesc<{dtype}[1, 2, {first.block_n}, {first.block_k}]>",
        "gate_bias_ptr": pointer, "up_bias_ptr": pointer, "act_ptr": pointer,
        "act_rows": ragged(second.block_m),
        "act_tail": ragged(second.tail_m) if second.tail_m else pointer,
        "down": f"tensordesc<{dtype}[1, {second.block_n}, {second.block_k}]>",
        "down_bias_ptr": pointer, "out_ptr": pointer, "sizes_ptr": "*i32!", "gather_ptr": "*i32",
        "row_weights_ptr": "*fp32", "ticket_ptr": "*i32!", "stored_ptr": "*i32",
        "num_segments": "i32", "inter": "i32!", "hidden": "i32!", "top_k": "i32",
        "stride_xm": "i32!", "stride_xk": 1, "stride_gbe": "i32!", "stride_gbn": 1,
        "stride_ube": "i32!", "stride_ubn": 1, "stride_dbe": "i32!", "stride_dbn": 1,
        "stride_rt": "i32", "stride_rk": 1,
        "SEGMENTS": 256, "GATED": True, "BIAS": extras, "DOWN_BIAS": extras, "ROW_WEIGHTS": extras,
        "KIND": "swiglu", "ALPHA": 1.702, "BETA": 1.0, "LIMIT": 7.0 if extras else None,
        "EVEN_K": True, "UP_FIRST": False, "FENCE": True, "OVERLAP": mode, "UPCAST": False,
        "PRECISION": "ieee", "BLOCK_M": first.block_m, "BLOCK_N": first.block_n,
        "BLOCK_K": first.block_k, "GROUP_M": first.group_m, "SWAP": first.swap_operands,
        "TAIL_M": first.tail_m, "NUM_STAGES": first.num_stages, "DOWN_M": second.block_m,
        "DOWN_N": second.block_n, "DOWN_K": second.block_k, "DOWN_GROUP": second.group_m,
        "DOWN_SWAP": second.swap_operands, "DOWN_TAIL": second.tail_m,
        "DOWN_STAGES": second.num_stages,
    }  # fmt: skip
    kernel = load("moe.kernels.fused").fused_gemms_kernel
    compiled = compile_kernel(kernel, arch, arguments, first.num_warps, first.num_stages)
    assert re.search(ARCHS[arch][1][dtype], compiled.assembly), "no matrix instruction"
    # Triton 3.6 keeps 8 bytes on sm_120, for the smallest tiles too.
    assert compiled.spilled <= (8 if arch == "sm_120" else 0), f"spills {compiled.spilled}"
    target = target_module.Target.from_arch(arch)
    products = [gemm("even", 8, stage, dtype) for stage in ("gate_up", "down")]
    sizes = [config.shared_memory(c, g) for c, g in zip((first, second), products, strict=True)]
    assert compiled.shared <= max(sizes) <= target.shared_memory
    check_overlap(compiled.assembly, mode)
    assert arch != "sm_90" or not waits_for_each_product(compiled.cubin)
    # Stores, fence, announcement; then the wait, the other fence, and loads.
    announces = r"bar\.sync|(?:atom|red|ld)[\w.]*\.gpu\.(?:release|acquire)[\w.]*"
    accesses = r"fence\.proxy\.async\.global|st\.global|cp\.async\.bulk\.tensor[\w.]*"
    order = re.findall(f"{announces}|{accesses}", compiled.assembly)
    letters = {"bar": "b", "fence": "f", "release": "R", "acquire": "A", "st": "s", "cp": "c"}
    kinds = "".join(next(v for k, v in letters.items() if k in op) for op in order)
    assert re.search(r"sfb+R", kinds), kinds
    assert re.search(r"Ab+fb*c", kinds), kinds
    assert kinds.count("R") == kinds.count("A") == 1


@pytest.mark.parametrize("arch", list(ARCHS))
def test_permute(arch: str) -> None:
    mode = 2 if target_module.Target.from_arch(arch).dependent_launch else 0
    arguments = {
        "x_ptr": "*bf16!", "scatter_ptr": "*i32!", "rows_ptr": "*bf16!", "hidden_size": "i32!",
        "top_k": "i32", "stride_xm": "i32!", "stride_xk": 1, "OVERLAP": mode, "BLOCK": 1024,
    }  # fmt: skip
    compiled = compile_kernel(load("moe.kernels.permute").permute_kernel, arch, arguments, 4, 3)
    assert compiled.spilled == 0
    if arch.startswith("sm"):
        assert re.search(r"st\.global\.v4\.b32", compiled.assembly), "stores of less than 16 bytes"
    if mode:
        check_overlap(compiled.assembly, mode)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("extras", [False, True])
def test_rows_in_expert_order(dtype: str, extras: bool) -> None:
    """Gate and up from rows by descriptor, as after the copy."""
    cfg = load("dispatch.permute").PERMUTED
    arguments = grouped_arguments("even", "gate_up", dtype, "sm_90", cfg, "swiglu", extras)
    arguments |= {
        "GATHER": False, "X_DESCRIPTOR": True, "EVEN_K": True,
        "x_ptr": f"tensordesc<{dtype}[1, 1, {cfg.block_m}, {cfg.block_k}]>",
    }  # fmt: skip
    kernel = load("moe.kernels.grouped").grouped_gemm_kernel
    compiled = compile_kernel(kernel, "sm_90", arguments, cfg.num_warps, cfg.num_stages)
    assert "wgmma" in compiled.assembly and "cp.async.cg" not in compiled.assembly
    problem = gemm("even", 8192, "gate_up", dtype)
    target = target_module.Target.from_arch("sm_90")
    assert compiled.shared <= config.shared_memory(cfg, problem) <= target.shared_memory
    assert compiled.spilled == 0
    assert not waits_for_each_product(compiled.cubin)


@pytest.mark.parametrize("tail_m,split_k", [(16, 1), (32, 1), (0, 4)])
@pytest.mark.parametrize("stage", ["gate_up", "down"])
@pytest.mark.parametrize("arch", list(ARCHS))
def test_tails_and_splits(arch: str, stage: str, tail_m: int, split_k: int) -> None:
    """Tiles chosen by the sizes that only the device knows, on top of what a machine would get."""
    target = target_module.Target.from_arch(arch)
    problem = gemm("even", 128, stage, "bf16")
    wish = config.replace(
        select.choose(problem, target), persistent=False, swap_operands=False, block_m=64,
        tail_m=tail_m, split_k=split_k,
    )  # fmt: skip
    cfg = config.fit(wish, problem, target)
    kernel = load("moe.kernels.grouped").grouped_gemm_kernel
    arguments = grouped_arguments("even", stage, "bf16", arch, cfg, "swiglu", False)
    compiled = compile_kernel(kernel, arch, arguments, cfg.num_warps, cfg.num_stages)
    assert re.search(ARCHS[arch][1]["bf16"], compiled.assembly), "no matrix instruction"
    assert compiled.shared <= config.shared_memory(cfg, problem) <= target.shared_memory
    assert compiled.spilled == 0


@pytest.mark.parametrize(
    "kind", ["geglu", "geglu_tanh", "reglu2", "silu", "gelu", "gelu_tanh", "relu2"]
)
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "gfx942", "gfx1100"])
def test_activations(arch: str, kind: str) -> None:
    cfg = config.KernelConfig(16, 32, 32, 1, 4, 2)
    arguments = grouped_arguments("odd", "gate_up", "bf16", arch, cfg, kind, True)
    if kind in ("silu", "gelu", "gelu_tanh", "relu2"):
        arguments["GATED"] = False
    compiled = compile_kernel(
        load("moe.kernels.grouped").grouped_gemm_kernel, arch, arguments, 4, 2
    )
    assert re.search(ARCHS[arch][1]["bf16"], compiled.assembly)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("arch", list(ARCHS))
def test_decode(arch: str, dtype: str) -> None:
    target = target_module.Target.from_arch(arch)
    kernels = load("moe.kernels.decode")
    pointer = f"*{dtype}!"
    for tokens in (1, 2):
        gate_up = rules.choose_stream(gemm("even", tokens, "gate_up", dtype), target)
        compiled = compile_kernel(
            kernels.decode_gate_up_kernel, arch,
            {
                **dict.fromkeys(("x_ptr", "gate_ptr", "up_ptr", "gate_bias_ptr", "up_bias_ptr",
                                 "act_ptr"), pointer),
                "ids_ptr": "*i32", "map_ptr": "*i32!", "row_weights_ptr": "*fp32",
                **dict.fromkeys(("num_experts", "num_local_experts", "N", "K", "top_k"), "i32"),
                "stride_xm": "i32!", "stride_xk": 1, "stride_ge": "i32!", "stride_gn": "i32!",
                "stride_gk": 1, "stride_ue": "i32!", "stride_un": "i32!", "stride_uk": 1,
                "stride_gbe": "i32", "stride_gbn": 1, "stride_ube": "i32", "stride_ubn": 1,
                "stride_it": "i32", "stride_ik": 1, "stride_rt": "i32", "stride_rk": 1,
                "HAS_MAP": tokens == 2, "GATED": True, "BIAS": True, "ROW_WEIGHTS": True,
                "KIND": "swiglu", "ALPHA": 1.0, "BETA": 0.0, "LIMIT": None,
                "BLOCK_N": gate_up.block_n, "BLOCK_K": gate_up.block_k,
                "NUM_STAGES": gate_up.num_stages,
            }, gate_up.num_warps, gate_up.num_stages,
        )  # fmt: skip
        assert compiled.shared <= target.shared_memory
        assert compiled.spilled == 0
        down = rules.choose_stream(gemm("even", tokens, "down", dtype), target)
        compiled = compile_kernel(
            kernels.decode_down_kernel, arch,
            {
                **dict.fromkeys(("act_ptr", "down_ptr", "bias_ptr", "out_ptr"), pointer),
                "ids_ptr": "*i32", "map_ptr": "*i32!", "row_weights_ptr": "*fp32",
                **dict.fromkeys(("num_experts", "num_local_experts", "N", "K", "top_k"), "i32"),
                "stride_de": "i32!", "stride_dn": "i32!", "stride_dk": 1, "stride_be": "i32",
                "stride_bn": 1, "stride_it": "i32", "stride_ik": 1, "stride_rt": "i32",
                "stride_rk": 1, "stride_om": "i32!", "HAS_MAP": tokens == 2, "BIAS": True,
                "ROW_WEIGHTS": True, "BLOCK_N": down.block_n, "BLOCK_K": down.block_k,
                "NUM_STAGES": down.num_stages,
            }, down.num_warps, down.num_stages,
        )  # fmt: skip
        assert compiled.shared <= target.shared_memory
        assert compiled.spilled == 0


@pytest.mark.parametrize("arch", list(ARCHS))
def test_plan(arch: str) -> None:
    target = target_module.Target.from_arch(arch)
    limit, dependent = target.shared_memory, target.dependent_launch
    for ids, block, contiguous in (("*i32!", 256, True), ("*i64!", 4096, False)):
        compiled = compile_kernel(
            load("moe.kernels.plan").plan_kernel, arch,
            {
                "ids_ptr": ids, "map_ptr": "*i32!", "sizes_ptr": "*i32!", "offsets_ptr": "*i32",
                "gather_ptr": "*i32", "scatter_ptr": "*i32", "counters_ptr": "*i32",
                "num_assignments": "i32",
                "num_experts": "i32", "num_local_experts": "i32", "top_k": "i32",
                "stride_t": "i32", "stride_k": 1, "HAS_MAP": not contiguous,
                "CONTIGUOUS": contiguous, "COUNTERS": 256 if contiguous else 0, "BLOCK": block,
                "OVERLAP": (1 if contiguous else 2) * dependent,
            }, 4 if block <= 1024 else 8, 3,
        )  # fmt: skip
        assert compiled.shared <= limit
        assert compiled.spilled == 0


@pytest.mark.parametrize("experts", [8, 256, 2048])
@pytest.mark.parametrize("arch", list(ARCHS))
def test_plan_in_two_launches(arch: str, experts: int) -> None:
    target = target_module.Target.from_arch(arch)
    limit = target.shared_memory
    kernels = load("moe.kernels.plan")
    common = {
        "ids_ptr": "*i32!", "map_ptr": "*i32!", "counts_ptr": "*i32", "num_assignments": "i32",
        "num_experts": "i32", "num_local_experts": "i32", "top_k": "i32", "stride_t": "i32",
        "stride_k": 1, "HAS_MAP": experts == 256, "CONTIGUOUS": experts != 256, "CHUNK": 512,
        "EXPERTS": experts, "OVERLAP": 2 * target.dependent_launch,
    }  # fmt: skip
    placed = {
        "sizes_ptr": "*i32!", "offsets_ptr": "*i32!", "gather_ptr": "*i32!",
        "scatter_ptr": "*i32!", "num_chunks": "i32", "ROWS": max(1, min(32, 8192 // experts)),
        "STEP": 32,
    }  # fmt: skip
    for kernel, arguments, warps in (
        (kernels.plan_count_kernel, common | {"counters_ptr": "*i32", "COUNTERS": 256}, 4),
        (kernels.plan_place_kernel, common | placed, 8),
    ):
        compiled = compile_kernel(kernel, arch, arguments, warps, 3)
        assert compiled.shared <= limit
        assert compiled.spilled == 0
    if target.dependent_launch:
        check_overlap(compiled.assembly, 2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("arch", list(ARCHS))
def test_combine(arch: str, dtype: str) -> None:
    for reduce in (True, False):
        compiled = compile_kernel(
            load("moe.kernels.combine").combine_kernel, arch,
            {
                "rows_ptr": f"*{dtype}!", "scatter_ptr": "*i32", "weights_ptr": "*fp32",
                "out_ptr": f"*{dtype}!", "hidden_size": "i32!", "top_k": "i32",
                "stride_wt": "i32", "stride_wk": 1, "stride_om": "i32!", "stride_os": "i32!",
                "ROUTER_WEIGHT": True, "REDUCE": reduce, "BLOCK": 1024,
                "OVERLAP": int(target_module.Target.from_arch(arch).dependent_launch),
            }, 4, 3,
        )  # fmt: skip
        assert compiled.spilled == 0
        if target_module.Target.from_arch(arch).dependent_launch:
            check_overlap(compiled.assembly, 0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("arch", list(ARCHS))
def test_route(arch: str, dtype: str) -> None:
    for scoring, groups, bias, experts, slots in (
        ("softmax", 1, False, 128, 8),
        ("sigmoid", 8, True, 256, 8),
        ("topk_softmax", 1, False, 2048, 16),
    ):
        compiled = compile_kernel(
            load("moe.kernels.topk").route_kernel, arch,
            {
                "logits_ptr": f"*{dtype}!", "bias_ptr": "*fp32!", "weights_ptr": "*fp32!",
                "ids_ptr": "*i32!", "num_experts": "i32", "top_k": "i32", "group_size": "i32",
                "topk_group": "i32", "stride_lt": "i32", "stride_le": 1, "scale": "fp32",
                "SCORING": scoring, "RENORMALIZE": True, "HAS_BIAS": bias, "NUM_GROUPS": groups,
                "EXPERTS": experts, "SLOTS": slots,
            }, 1 if experts <= 256 else 8, 3,
        )  # fmt: skip
        assert compiled.spilled == 0
