"""Kernel configurations, and their legality on a machine before anything is launched."""

from __future__ import annotations

import json
import re
from dataclasses import MISSING, asdict, dataclass, fields, replace
from typing import Any

from ..target import Target

MAX_SHARING = 64  # Programs a multiprocessor whose arrivals are counted.
MAX_GROUP_M = 1024
MIN_DOT = 16  # The narrowest side of a matrix instruction that every backend has.


def fields_of(kind: Any, values: Any) -> dict[str, Any]:
    """A JSON object's fields, refused with the allowed ones where there are others or too few."""
    if not isinstance(values, dict):
        raise TypeError(f"a {kind.__name__} is a JSON object, got {values!r}")
    known = {f.name: f.default is MISSING for f in fields(kind)}
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise ValueError(f"unknown fields {unknown}; a {kind.__name__} has {sorted(known)}")
    missing = [name for name, needed in known.items() if needed and name not in values]
    if missing:
        raise ValueError(f"a {kind.__name__} has {missing} too, got {sorted(values)}")
    return values


@dataclass(frozen=True)
class KernelConfig:
    """How one grouped GEMM is cut into programs.

    Attributes:
        block_m: rows (tokens) of a tile.
        block_n: output columns of a tile.
        block_k: elements of the reduction per step.
        group_m: row tiles of one expert that share a column of weight tiles before moving on.
        num_warps: warps per program.
        num_stages: steps of loads in flight.
        swap_operands: multiply weights by tokens, so that few tokens ride on the narrow side.
        descriptors: load weights, and rows already in order, through tensor descriptors.
        persistent: as many programs as fit, each walking the tile list.
        occupancy: programs per multiprocessor that a persistent or split grid assumes, and one of
            both products (then gate+up's counts).
        tail_m: rows of the short tile for what is left of a segment; 0 for tall tiles alone.
        split_k: programs that may share a tile's reduction where tiles are too few; decided on the
            device, from the sizes that are there.
        store_parts: column parts in which a tile is staged and stored by descriptor; 0 to store by
            pointers. A persistent program then starts on the next tile while this one is stored.
    """

    block_m: int
    block_n: int
    block_k: int
    group_m: int = 8
    num_warps: int = 4
    num_stages: int = 3
    swap_operands: bool = False
    descriptors: bool = False
    persistent: bool = False
    occupancy: int = 1
    tail_m: int = 0
    split_k: int = 1
    store_parts: int = 0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            kind = bool if isinstance(field.default, bool) else int
            if type(value) is not kind:
                raise TypeError(f"{field.name}={value!r} must be of type {kind.__name__}")
        for name in ("block_m", "block_n", "block_k", "num_warps"):
            value = getattr(self, name)
            if value < 1 or value & (value - 1):
                raise ValueError(f"{name}={value} must be a power of two")
        for name in ("block_m", "block_n", "block_k"):
            if getattr(self, name) < MIN_DOT:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {MIN_DOT}")
        for name in ("group_m", "num_stages", "occupancy", "split_k"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.group_m > MAX_GROUP_M:  # Kernels multiply it with the column tiles in 32 bits.
            raise ValueError(f"group_m={self.group_m} must be at most {MAX_GROUP_M}")
        if self.tail_m and (
            self.tail_m < MIN_DOT or self.tail_m & (self.tail_m - 1) or self.tail_m >= self.block_m
        ):
            raise ValueError(
                f"tail_m={self.tail_m} must be 0, or a power of two from {MIN_DOT} to below "
                f"block_m={self.block_m}"
            )
        parts = self.store_parts
        if parts and (parts < 1 or parts & (parts - 1) or self.block_n < MIN_DOT * parts):
            raise ValueError(
                f"store_parts={parts} must be 0, or a power of two that leaves parts of {MIN_DOT} "
                f"columns of block_n={self.block_n}"
            )
        if parts and not self.descriptors:
            raise ValueError(f"store_parts={parts} needs descriptors=True")
        if self.tail_m and self.split_k > 1:
            raise ValueError("tail_m and split_k>1 do not go together: use one of them")
        if self.split_k > 1 and self.occupancy > MAX_SHARING:
            raise ValueError(f"occupancy={self.occupancy} with split_k is at most {MAX_SHARING}")
        if self.persistent and (self.tail_m or self.split_k > 1):
            raise ValueError("persistent programs take neither tail_m nor split_k: use one of them")

    @staticmethod
    def from_dict(values: dict[str, Any]) -> KernelConfig:
        """The configuration of a JSON object; ValueError, TypeError: it is none."""
        return KernelConfig(**fields_of(KernelConfig, values))

    def to_json(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)

    @property
    def name(self) -> str:
        """A short name for files and charts: "128x128x64 g8 w8 s4 D t64"; `from_name` reads it."""
        words = [f"{self.block_m}x{self.block_n}x{self.block_k}"]
        words += [f"g{self.group_m}", f"w{self.num_warps}", f"s{self.num_stages}"]
        flags = "S" * self.swap_operands + "D" * self.descriptors + "P" * self.persistent
        words += [flags] if flags else []
        rest = (("o", self.occupancy, 1), ("t", self.tail_m, 0), ("k", self.split_k, 1),
                ("p", self.store_parts, 0))  # fmt: skip
        return " ".join(words + [f"{key}{value}" for key, value, usual in rest if value != usual])

    @staticmethod
    def from_name(name: str) -> KernelConfig:
        """The configuration of a `name`.

        Raises:
            ValueError: no configuration has this name.
        """
        match = _NAME.fullmatch(name)
        if match is None:
            raise ValueError(f"{name!r} is no configuration's name; one is '128x128x64 g8 w8 s4 D'")
        part = match.groupdict()
        numbers = {key: int(part[key]) for key in _NUMBERS if part[key] is not None}
        flags = part["flags"] or ""
        return KernelConfig(
            **numbers, swap_operands="S" in flags, descriptors="D" in flags, persistent="P" in flags
        )


_NUMBERS = (
    "block_m", "block_n", "block_k", "group_m", "num_warps", "num_stages", "occupancy", "tail_m",
    "split_k", "store_parts",
)  # fmt: skip
_NAME = re.compile(
    r"(?P<block_m>\d+)x(?P<block_n>\d+)x(?P<block_k>\d+) g(?P<group_m>\d+) w(?P<num_warps>\d+)"
    r" s(?P<num_stages>\d+)(?: (?P<flags>S?D?P?))?(?: o(?P<occupancy>\d+))?"
    r"(?: t(?P<tail_m>\d+))?(?: k(?P<split_k>\d+))?(?: p(?P<store_parts>\d+))?"
)


@dataclass(frozen=True)
class FewActive:
    """Another configuration of a product for few active segments; the device chooses.

    Both are launched, and the programs of one of them leave at once (RaMP chooses on the host and
    waits for it; DA-MoE, arXiv 2607.23099, by a node of a CUDA graph).

    Attributes:
        config: what runs if at most `up_to` segments have rows.
        up_to: at least 1.
    """

    config: KernelConfig
    up_to: int

    def __post_init__(self) -> None:
        if not isinstance(self.config, KernelConfig) or type(self.up_to) is not int:
            raise TypeError(
                f"FewActive takes a KernelConfig and an int: {self.config!r}, {self.up_to!r}"
            )
        if self.up_to < 1:
            raise ValueError(f"up_to={self.up_to} must be at least 1")

    @staticmethod
    def from_dict(values: dict[str, Any]) -> FewActive:
        """The choice of a JSON object; ValueError, TypeError: it is none."""
        given = fields_of(FewActive, values)
        return FewActive(KernelConfig.from_dict(given["config"]), given["up_to"])


@dataclass(frozen=True)
class GroupedGemm:
    """A grouped GEMM described by its grid, without knowing what the segments are.

    Attributes:
        max_rows: host-side bound on the rows over all segments.
        max_segment_rows: host-side bound on the rows of one segment.
        num_segments: segments, empty ones included.
        n: output columns. k: length of the reduction.
        num_weights: weight tiles multiplied by one row tile: 2 for gate+up, else 1.
        itemsize: bytes of an operand's element.
        gathered: rows come by an index, so that only weights can use descriptors.
        descriptors_possible: the weights' strides and alignment suit a descriptor.
    """

    max_rows: int
    max_segment_rows: int
    num_segments: int
    n: int
    k: int
    num_weights: int = 1
    itemsize: int = 2
    gathered: bool = False
    descriptors_possible: bool = True


def shared_memory(config: KernelConfig, gemm: GroupedGemm) -> int:
    """Bytes of shared memory of a program: its staged tiles, or the epilogue's staging if more."""
    elements = config.block_m * config.block_k
    elements += gemm.num_weights * config.block_n * config.block_k
    staged = config.num_stages * elements * gemm.itemsize
    # Layout changes of the epilogue pass through shared memory in fp32.
    tiles = gemm.num_weights if config.swap_operands else 1
    epilogue = config.block_m * config.block_n * 4 * tiles
    if config.split_k > 1:  # Partial sums are laid out in rows.
        epilogue = config.block_m * config.block_n * 4 * gemm.num_weights
    if config.persistent:  # The next tile's loads are in flight while this one is stored.
        parts = config.store_parts
        staging = config.block_m * config.block_n // parts + 128 if parts else 0
        # A pair's result is laid out anew to be stored by pointers.
        anew = 8 if parts or gemm.num_weights == 1 else 16
        staged += max(staging, config.num_warps * anew * config.block_n) * gemm.itemsize
    return max(staged, epilogue) + 1024


def accumulators(config: KernelConfig, gemm: GroupedGemm) -> int:
    """fp32 accumulator registers per lane, for 32 lanes a warp."""
    return config.block_m * config.block_n * gemm.num_weights // (32 * config.num_warps)


def why_illegal(config: KernelConfig, gemm: GroupedGemm, target: Target) -> str | None:
    """The reason `config` cannot run `gemm` on `target`, or None if it can."""
    need = shared_memory(config, gemm)
    if target.backend != "cpu" and need > target.shared_memory:
        return f"needs {need} B of shared memory, {target.arch} has {target.shared_memory} B"
    if config.num_warps * target.warp_size > 1024:
        return f"{config.num_warps} warps of {target.warp_size} lanes exceed 1024 threads"
    lanes = 32 * config.num_warps
    if config.block_m * config.block_n * gemm.num_weights > 200 * lanes:
        return f"needs {accumulators(config, gemm)} accumulator registers per lane, at most 200"
    if config.descriptors and target.backend != "cpu":
        if not target.tensor_descriptors:
            return f"{target.arch} has no tensor descriptors"
        if not gemm.descriptors_possible:
            return "these weights' strides or alignment do not suit a tensor descriptor"
    if config.split_k > 1 and target.backend == "hip":
        return "programs that share a reduction were never tested across an AMD chip's dies"
    if config.descriptors and config.block_k * gemm.itemsize < 16:
        return "a descriptor's innermost box must be at least 16 bytes"
    return None


def fit(config: KernelConfig, gemm: GroupedGemm, target: Target) -> KernelConfig:
    """`config`, or the nearest legal one: fewer stages first, then shorter, then smaller tiles."""
    if config.descriptors and not (target.tensor_descriptors and gemm.descriptors_possible):
        config = replace(config, descriptors=False, store_parts=0)
    if target.backend == "hip":
        config = replace(config, split_k=1)
    while config.num_warps > 1 and config.num_warps * target.warp_size > 1024:
        config = replace(config, num_warps=config.num_warps // 2)
    while why_illegal(config, gemm, target) is not None:
        if config.num_stages > 2:
            config = replace(config, num_stages=config.num_stages - 1)
        elif config.block_k > 32:
            config = replace(config, block_k=config.block_k // 2)
        elif config.block_n > 32 and config.block_n >= config.block_m:
            block_n = config.block_n // 2
            parts = min(config.store_parts, block_n // MIN_DOT)
            config = replace(config, block_n=block_n, store_parts=parts)
        elif config.block_m > MIN_DOT:
            block_m = config.block_m // 2
            config = replace(config, block_m=block_m, tail_m=config.tail_m % block_m)
        elif config.num_stages > 1:
            config = replace(config, num_stages=1)
        else:
            reason = why_illegal(config, gemm, target)
            raise ValueError(f"no legal configuration on {target.arch} near {config}: {reason}")
    return config


@dataclass(frozen=True)
class StreamConfig:
    """How a matrix-vector product is cut into programs, when each expert has about one row.

    Attributes:
        block_n: output columns (weight rows) of a program.
        block_k: elements of the reduction per step.
        num_warps: warps per program.
        num_stages: steps of loads in flight; 1 leaves it to the hardware's many programs.
    """

    block_n: int
    block_k: int
    num_warps: int = 4
    num_stages: int = 1

    def __post_init__(self) -> None:
        for field in fields(self):
            if type(getattr(self, field.name)) is not int:
                raise TypeError(f"{field.name}={getattr(self, field.name)!r} must be of type int")
        for name in ("block_n", "block_k", "num_warps"):
            value = getattr(self, name)
            if value < 1 or value & (value - 1):
                raise ValueError(f"{name}={value} must be a power of two")
        if self.num_stages < 1:
            raise ValueError(f"num_stages={self.num_stages} must be at least 1")

    @staticmethod
    def from_dict(values: dict[str, Any]) -> StreamConfig:
        """The configuration of a JSON object; ValueError, TypeError: it is none."""
        return StreamConfig(**fields_of(StreamConfig, values))
