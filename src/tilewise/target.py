"""The machine as numbers. Every capability question in the library is answered here, once."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # The catalogue and every decision made from it work without torch.
    import torch

KIB = 1024
MIB = 1024 * KIB


@dataclass(frozen=True)
class Target:
    """One accelerator as the dispatcher sees it.

    Attributes:
        backend: "cuda", "hip", or "cpu" (no accelerator).
        arch: compiler name: "sm_90", "gfx942", or "cpu".
        num_sms: streaming multiprocessors (NVIDIA) or compute units (AMD).
        shared_memory: bytes of shared memory one program may use.
        l2_bytes: last-level on-chip cache in bytes.
        warp_size: lanes per warp (NVIDIA) or wavefront (AMD).
        tensor_descriptors: whether Triton lowers descriptor loads to a copy engine here.
        warpgroup_mma: whether a dot wants 64 rows on its first operand (Hopper's wgmma).
        same_bits_any_tile: whether a product's bits are known not to depend on its tile's shape:
            tests/gpu compares them bit by bit on a machine before this may be set.
        memory_gbs: nominal device memory bandwidth, GB/s.
        bf16_tflops: nominal dense bf16 rate, TFLOP/s.
    """

    backend: str
    arch: str
    num_sms: int
    shared_memory: int
    l2_bytes: int
    warp_size: int
    tensor_descriptors: bool
    warpgroup_mma: bool
    memory_gbs: float
    bf16_tflops: float
    same_bits_any_tile: bool = False

    @property
    def capability(self) -> int:
        """Compute capability times ten on NVIDIA (90 for sm_90), 0 elsewhere."""
        return int(self.arch[3:]) if self.arch.startswith("sm_") else 0

    @property
    def dependent_launch(self) -> bool:
        """Whether a kernel may start before the one ahead of it in its stream has ended."""
        return self.capability >= 90

    @staticmethod
    def from_arch(arch: str) -> Target:
        """The catalogue entry of an architecture, for compiling without the machine.

        Args:
            arch: "sm_90", "gfx942", ..., or the name of a chip that has it, "h100"; an entry's
                sizes and rates are those of the first chip in `CHIPS`. "cpu": no accelerator.
        """
        name = plain_name(arch)
        if name == CPU.arch:
            return CPU
        key = _SPELLINGS.get(name, "")
        if not key:
            known = ", ".join(f"{name} ({', '.join(chips)})" for name, chips in CHIPS.items())
            raise ValueError(f"unknown architecture {arch!r}; known: {known}, cpu")
        return CATALOGUE[key]

    @staticmethod
    def probe(device: torch.device | str | int | None = None) -> Target:
        """The machine behind `device`; the catalogue's nominal rates, the driver's sizes."""
        index = _device_index(device)
        if index is None:
            return CPU
        return _probe(index)


def _nvidia(
    arch: str, sms: int, shared: int, l2: int, gbs: float, tflops: float, *, tma: bool = False
) -> Target:
    hopper = arch == "sm_90"
    return Target("cuda", arch, sms, shared, l2, 32, tma, hopper, gbs, tflops, hopper)


def _amd(
    arch: str, cus: int, lds: int, l2: int, gbs: float, tflops: float, *, warp: int = 64
) -> Target:
    return Target("hip", arch, cus, lds, l2, warp, False, False, gbs, tflops)


CPU = Target("cpu", "cpu", 1, 99 * KIB, 32 * MIB, 32, False, False, 50.0, 1.0)

# Sizes from the vendors' datasheets; a probed machine replaces them by what its driver reports.
CATALOGUE: dict[str, Target] = {
    t.arch: t
    for t in (
        _nvidia("sm_80", 108, 163 * KIB, 40 * MIB, 2039, 312),  # A100
        _nvidia("sm_86", 82, 99 * KIB, 6 * MIB, 936, 71),  # RTX 3090
        _nvidia("sm_89", 128, 99 * KIB, 72 * MIB, 1008, 165),  # RTX 4090
        _nvidia("sm_90", 132, 227 * KIB, 50 * MIB, 4800, 989, tma=True),  # H200
        _nvidia("sm_100", 148, 227 * KIB, 126 * MIB, 8000, 2250, tma=True),  # B200
        _nvidia("sm_120", 170, 99 * KIB, 96 * MIB, 1792, 210, tma=True),  # RTX 5090
        _amd("gfx90a", 104, 64 * KIB, 8 * MIB, 1638, 191),  # MI250X, one die
        _amd("gfx942", 304, 64 * KIB, 32 * MIB, 5300, 1307),  # MI300X, 4 MiB on each of 8 dies
        _amd("gfx950", 256, 160 * KIB, 32 * MIB, 8000, 2300),  # MI355X
        _amd("gfx1100", 96, 64 * KIB, 6 * MIB, 960, 123, warp=32),  # RX 7900 XTX
        _amd("gfx1201", 64, 64 * KIB, 8 * MIB, 640, 195, warp=32),  # RX 9070 XT
    )
}


# By name, in any case, with "-", "_" or a space anywhere; sizes and rates are the first one's.
CHIPS: dict[str, tuple[str, ...]] = {
    "sm_80": ("a100", "a800", "a30"),
    "sm_86": ("rtx3090", "rtx3080", "a10", "a40", "a6000"),
    "sm_89": ("rtx4090", "rtx4080", "l4", "l40", "l40s"),
    "sm_90": ("h200", "h100", "h800", "h20", "gh200"),
    "sm_100": ("b200", "b100", "gb200"),
    "sm_120": ("rtx5090", "rtx5080"),
    "gfx90a": ("mi250x", "mi250", "mi210"),
    "gfx942": ("mi300x", "mi300a", "mi308x", "mi325x"),
    "gfx950": ("mi355x", "mi350x"),
    "gfx1100": ("rx7900xtx", "rx7900xt", "w7900"),
    "gfx1201": ("rx9070xt", "rx9070"),
}


def plain_name(arch: str) -> str:
    """Without case and separators, and without what compilers add: "sm_90a" is "sm90"."""
    name = re.sub(r"[\s_-]", "", str(arch).lower().partition(":")[0])
    return re.sub(r"^(sm\d+)[af]$", r"\1", name)


_SPELLINGS = {plain_name(name): arch for arch in CATALOGUE for name in (arch, *CHIPS[arch])}


def _device_index(device: torch.device | str | int | None) -> int | None:
    import torch

    if not torch.cuda.is_available():
        return None
    if device is None:
        return torch.cuda.current_device()
    if isinstance(device, int):
        return device
    device = torch.device(device)
    if device.type != "cuda":
        return None
    return torch.cuda.current_device() if device.index is None else device.index


@functools.cache
def _probe(index: int) -> Target:
    import torch

    props: Any = torch.cuda.get_device_properties(index)  # Its stubs differ between versions.
    if torch.version.hip:
        arch = props.gcnArchName.split(":")[0]
        nearest = CATALOGUE.get(arch, CATALOGUE["gfx1100"])
        return replace(
            nearest, arch=arch, num_sms=props.multi_processor_count, l2_bytes=props.L2_cache_size
        )
    capability = props.major * 10 + props.minor
    known = [t for t in CATALOGUE.values() if t.backend == "cuda"]
    # An unknown chip decides like the newest known one that is not newer than it.
    older = [t for t in known if t.capability <= capability] or known[:1]
    return replace(
        max(older, key=lambda t: t.capability),
        arch=f"sm_{capability}",
        num_sms=props.multi_processor_count,
        shared_memory=props.shared_memory_per_block_optin,
        l2_bytes=props.L2_cache_size,
    )
