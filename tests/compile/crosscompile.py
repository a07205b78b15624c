"""Cross-compiling the kernels for machines that are not here. Needs triton alone: no torch, no GPU.

The library's torch-free parts (kernels, dispatch, targets) are imported as package `tw`, past
`tilewise/__init__.py`, so that any Triton can compile them in an environment that has nothing else.
"""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
import tempfile
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

SRC = Path(__file__).resolve().parents[2] / "src" / "tilewise"

if "tw" not in sys.modules:
    package = types.ModuleType("tw")
    package.__path__ = [str(SRC)]
    sys.modules["tw"] = package


def load(name: str) -> Any:
    """A module of the library by its path below `tilewise`, as `tw.<name>`."""
    return importlib.import_module(f"tw.{name}")


_MMA = r"mma\.sync|wgmma\.mma_async|tcgen05\.mma"
_ANY_MMA = {"bf16": _MMA, "fp16": _MMA, "fp32": _MMA}
_MFMA = {"bf16": r"v_mfma", "fp16": r"v_mfma", "fp32": r"v_mfma"}
# RDNA has no fp32 matrix instruction: it multiplies fp32 on its vector units.
_WMMA = {"bf16": r"v_wmma", "fp16": r"v_wmma", "fp32": r"v_fma|v_dual_fma|v_pk_fma"}

# arch -> compiler's name for it, and what a matrix product must show in the assembly, by dtype
ARCHS: dict[str, tuple[Any, dict[str, str]]] = {
    "sm_80": (80, _ANY_MMA),
    "sm_86": (86, _ANY_MMA),
    "sm_89": (89, _ANY_MMA),
    "sm_90": (90, _ANY_MMA),
    "sm_100": (100, _ANY_MMA),
    "sm_120": (120, _ANY_MMA),
    "gfx90a": ("gfx90a", _MFMA),
    "gfx942": ("gfx942", _MFMA),
    "gfx950": ("gfx950", _MFMA),
    "gfx1100": ("gfx1100", _WMMA),
    "gfx1201": ("gfx1201", _WMMA),
}


@dataclass(frozen=True)
class Compiled:
    """What the compiler said of one kernel for one machine."""

    assembly: str
    shared: int  # bytes
    spilled: int  # registers (AMD) or bytes of stack (NVIDIA)
    cubin: bytes = b""  # NVIDIA


def compile_kernel(
    kernel: Any, arch: str, arguments: dict[str, Any], num_warps: int, num_stages: int
) -> Compiled:
    """Compiles `kernel` for `arch`.

    Args:
        arguments: by name; a string for a run-time argument is its type ("*bf16", "i32",
            "tensordesc<...>"), with a trailing "!" if known to divide by 16; anything else is a
            compile-time constant.
    """
    target = load("target").Target.from_arch(arch)
    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attrs: dict[tuple[int, ...], list[list[Any]]] = {}
    assert set(arguments) == set(kernel.arg_names), set(arguments) ^ set(kernel.arg_names)
    for i, (name, param) in enumerate(zip(kernel.arg_names, kernel.params, strict=True)):
        value = arguments[name]
        if isinstance(value, str) and not param.is_constexpr:
            signature[name] = value.rstrip("!")
            if value.endswith("!"):
                attrs[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "constexpr"
            constants[(i,)] = value
    binary = triton.compile(
        ASTSource(kernel, signature, constants, attrs),
        target=GPUTarget(target.backend, ARCHS[arch][0], target.warp_size),
        options={"num_warps": num_warps, "num_stages": num_stages},
    )
    if target.backend == "hip":
        text = binary.asm["amdgcn"]
        spilled = sum(int(n) for n in re.findall(r"vgpr_spill_count:\s*(\d+)", text))
        return Compiled(text, binary.metadata.shared, spilled)
    cubin = binary.asm["cubin"]
    return Compiled(binary.asm["ptx"], binary.metadata.shared, _stack_bytes(cubin), cubin)


_BULK_STORE = r"cp\.async\.bulk\.tensor[\w.]*global\.shared"
_STORE = rf"(?:st|atom|red)\.(?:global|relaxed|release|acq)[\w.:]*|{_BULK_STORE}"
_LOAD = r"ld\.(?:global|relaxed|acquire|volatile)[\w.:]*|cp\.async[\w.:]*"


def check_overlap(ptx: str, mode: int) -> None:
    """Asserts the order that dependent launches rely on.

    The wait comes before any access to memory.

    Args:
        mode: when the next kernel is let in: 1 before any access, 2 after the last store, 0 never.
    """
    order = re.findall(rf"griddepcontrol\.\w+|{_STORE}|{_LOAD}", ptx[ptx.index("{") :])
    accesses = [i for i, op in enumerate(order) if not op.startswith("griddepcontrol")]
    stores = [i for i in accesses if re.match(_STORE, order[i])]
    assert [i for i, op in enumerate(order) if op.endswith(".wait")] == [0] and stores
    let_in = [i for i, op in enumerate(order) if op.endswith(".launch_dependents")]
    assert let_in == {0: [], 1: [1], 2: [len(order) - 1]}[mode], (let_in, len(order), stores[-1])


def waits_for_each_product(cubin: bytes) -> bool:
    """Whether a Hopper binary waits for every wgmma before the next one.

    ptxas does so throughout a kernel, and says no more than an advice (C7515), if it cannot keep
    the accumulators of any one loop in place.
    """
    code = _cuobjdump(cubin, "-sass")
    waits = re.findall(r"WARPGROUP\.DEPBAR\.LE gsb0, (0x\d+)", code)
    return len(waits) >= len(re.findall(r"\bHGMMA\.", code)) and set(waits) == {"0x0"}


def _stack_bytes(cubin: bytes) -> int:
    """Bytes of stack a CUDA binary uses, which for these kernels can only be spills."""
    text = _cuobjdump(cubin, "--dump-resource-usage")
    return max(int(n) for n in re.findall(r"STACK:(\d+)", text))


def _cuobjdump(cubin: bytes, what: str) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run(
            [str(tool), what, file.name], capture_output=True, text=True, check=True
        ).stdout
