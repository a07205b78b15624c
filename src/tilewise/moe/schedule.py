"""What one call of the layer launches: the path, and a configuration for each kernel."""

from __future__ import annotations

import functools
import json
from dataclasses import asdict, dataclass, replace
from typing import Any

from ..dispatch.config import (
    FewActive,
    GroupedGemm,
    KernelConfig,
    StreamConfig,
    fields_of,
    fit,
    why_illegal,
)
from ..dispatch.fuse import fuse, why_not_fused
from ..dispatch.permute import permuted
from ..dispatch.rules import choose_stream
from ..dispatch.select import choose, choose_pair
from ..target import Target

# Up to this many tokens every program streams its own expert; measured in docs/performance.md.
DECODE_TOKENS = 2
DECODE_TOP_K = 32
MAX_GRID_Y = 65535
# The batch that batch-invariant calls choose for, whatever theirs is: a tile of 64 rows serves all.
INVARIANT_TOKENS = 512
KINDS: dict[str, Any] = {"decode": StreamConfig, "grouped": KernelConfig}  # Of both products.


def _known_path(path: str) -> str:
    if not isinstance(path, str) or path not in KINDS:
        raise ValueError(f"path={path!r} must be one of {sorted(KINDS)}")
    return path


@dataclass(frozen=True)
class LayerConfig:
    """The path of one call and the configuration of its two products.

    Attributes:
        path: "decode" (two launches, `StreamConfig`s) or "grouped" (`KernelConfig`s).
        gate_up: configuration of the first product.
        down: configuration of the second product.
        gate_up_few, down_few: what runs instead of either when few experts are active.
        fused: both products in one launch (kernels/fused.py); "grouped" only.
        permuted: rows are copied in expert order first, so that a `gate_up` with descriptors loads
            both operands by them (kernels/permute.py); "grouped" only, not with `fused`.
    """

    path: str
    gate_up: KernelConfig | StreamConfig
    down: KernelConfig | StreamConfig
    gate_up_few: FewActive | None = None
    down_few: FewActive | None = None
    fused: bool = False
    permuted: bool = False

    def __post_init__(self) -> None:
        kind = KINDS[_known_path(self.path)]
        for name in ("gate_up", "down"):
            given = getattr(self, name)
            if not isinstance(given, kind):
                raise TypeError(f"path={self.path!r} takes a {kind.__name__}: {name}={given!r}")
            few = getattr(self, f"{name}_few")
            if few is not None and not isinstance(few, FewActive):
                raise TypeError(f"{name}_few={few!r} must be a FewActive or None")
        for name in ("fused", "permuted"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name}={getattr(self, name)!r} must be True or False")
        if self.path == "decode":
            options = ("gate_up_few", "down_few", "fused", "permuted")
            given = " and no ".join(name for name in options if getattr(self, name))
            if given:
                raise ValueError(f"path='decode' takes no {given}: use 'grouped'")
        if self.fused:
            self._check_fused()

    def _check_fused(self) -> None:
        if self.permuted:
            raise ValueError("fused=True gathers its rows itself: use permuted=False")
        if self.gate_up_few or self.down_few:
            raise ValueError(
                "fused=True takes one configuration a product: leave out gate_up_few and down_few"
            )
        assert isinstance(self.gate_up, KernelConfig) and isinstance(self.down, KernelConfig)
        reason = why_not_fused(self.gate_up, self.down)
        if reason is not None:
            raise ValueError(f"fused=True: {reason}")

    def kernels(self, product: str) -> tuple[KernelConfig, ...]:
        """What may run as "gate_up" or "down" on the grouped path: one, or one of two."""
        few = getattr(self, f"{product}_few")
        config = getattr(self, product)
        grouped = (config,) if isinstance(config, KernelConfig) else ()
        return grouped if few is None else (*grouped, few.config)

    def to_json(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)

    @staticmethod
    def from_json(text: str) -> LayerConfig:
        values = fields_of(LayerConfig, json.loads(text))
        path = _known_path(values["path"])
        made = dict(values)
        for name in ("gate_up", "down"):
            made[name] = KINDS[path].from_dict(values[name])
        for name in ("gate_up_few", "down_few"):
            if values.get(name) is not None:
                made[name] = FewActive.from_dict(values[name])
        return LayerConfig(**made)


@dataclass(frozen=True)
class LayerProblem:
    """The host-side facts of one call, hashable so that a decision is made once."""

    num_tokens: int
    top_k: int
    num_experts: int
    hidden_size: int
    intermediate_size: int
    itemsize: int
    gated: bool
    descriptors_possible: bool
    reduce: bool = True
    batch_invariant: bool = False
    fusable: bool = True  # Gate and up by one descriptor, and activations that suit one.

    def needs_fixed_batch(self, target: Target) -> bool:
        """Whether all batches need one configuration: here bits may depend on the tile."""
        return self.batch_invariant and not (target.same_bits_any_tile and self.itemsize == 2)

    def gemms(self, fixed_batch: bool = False) -> tuple[GroupedGemm, GroupedGemm]:
        """The two products; with `fixed_batch`, of a batch of one fixed size."""
        tokens = INVARIANT_TOKENS if fixed_batch else self.num_tokens
        rows = tokens * self.top_k
        gate_up = GroupedGemm(
            rows, tokens, self.num_experts, self.intermediate_size, self.hidden_size,
            2 if self.gated else 1, self.itemsize, True, self.descriptors_possible,
        )  # fmt: skip
        down = GroupedGemm(
            rows, tokens, self.num_experts, self.hidden_size, self.intermediate_size,
            1, self.itemsize, False, self.descriptors_possible,
        )  # fmt: skip
        return gate_up, down


@functools.lru_cache(maxsize=65536)
def schedule(problem: LayerProblem, target: Target) -> LayerConfig:
    """The configuration of a call; from its shape alone if it must not depend on the batch."""
    gate_up, down = problem.gemms(problem.needs_fixed_batch(target))
    if (
        problem.reduce
        and not problem.batch_invariant
        and problem.num_tokens <= DECODE_TOKENS
        and problem.top_k <= DECODE_TOP_K
    ):
        return LayerConfig("decode", choose_stream(gate_up, target), choose_stream(down, target))
    if problem.batch_invariant:  # How many programs share a reduction depends on the batch.
        alone = (replace(choose(gemm, target), split_k=1) for gemm in (gate_up, down))
        return LayerConfig("grouped", next(alone), next(alone))
    if problem.fusable:  # Both of these were measured with gate and up by one descriptor.
        pair = fuse(gate_up, down, target)
        if pair is not None:
            return LayerConfig("grouped", *pair, fused=True)
        in_order = permuted(gate_up, target)
        if in_order is not None:
            return LayerConfig("grouped", in_order, choose(down, target), permuted=True)
    (first, first_few), (second, second_few) = (
        choose_pair(gemm, target) for gemm in (gate_up, down)
    )
    return LayerConfig("grouped", first, second, first_few, second_few)


def _check_decode(config: LayerConfig, problem: LayerProblem, target: Target) -> None:
    if problem.num_tokens * problem.top_k > MAX_GRID_Y:
        raise ValueError(
            f"config.path='decode' takes up to {MAX_GRID_Y} assignments, this call has "
            f"{problem.num_tokens * problem.top_k}: use 'grouped'"
        )
    for name in ("gate_up", "down"):
        stream = getattr(config, name)
        matrices = 2 if name == "gate_up" and problem.gated else 1
        lanes = 32 * stream.num_warps
        if stream.num_warps * target.warp_size > 1024:
            raise ValueError(f"config.{name}={stream} has more than 1024 threads")
        if stream.block_n * stream.block_k * matrices > 256 * lanes:
            raise ValueError(
                f"config.{name}={stream} needs more than 256 accumulators a lane: shrink block_n "
                "or block_k, or use more warps"
            )
        staged = matrices * stream.block_n * stream.block_k * problem.itemsize * stream.num_stages
        if target.backend != "cpu" and staged > target.shared_memory:
            raise ValueError(
                f"config.{name}={stream} needs {staged} B of shared memory, {target.arch} has "
                f"{target.shared_memory} B"
            )


@functools.lru_cache(maxsize=1024)
def given_schedule(config_json: str, problem: LayerProblem, target: Target) -> LayerConfig:
    """A caller's configuration, refused with the reason if it cannot run here."""
    config = LayerConfig.from_json(config_json)
    if config.path == "decode":
        if not problem.reduce:
            raise ValueError("config.path='decode' always reduces; use 'grouped' for reduce=False")
        _check_decode(config, problem, target)
        return config
    if config.fused and not (target.tensor_descriptors or target.backend == "cpu"):
        raise ValueError(
            f"config.fused=True loads by tensor descriptors, which {target.arch} does not have: "
            "use fused=False"
        )
    for name, gemm in zip(("gate_up", "down"), problem.gemms(), strict=True):
        if problem.batch_invariant and getattr(config, f"{name}_few"):
            raise ValueError(
                f"config.{name}_few: which configuration runs depends on the batch; "
                "batch_invariant=True takes none"
            )
        for kernel_config in config.kernels(name):
            _check_kernel(name, kernel_config, gemm, problem, target)
    if config.fused and not problem.fusable:
        raise ValueError(
            "config.fused=True loads gate and up by one descriptor and activations by another: "
            "gate and up must be parts of one tensor, a multiple of 16 bytes apart, and a row of "
            f"intermediate_size={problem.intermediate_size} must take a multiple of 16 bytes; "
            "else use fused=False"
        )
    return config


def layer_config(config_json: str, problem: LayerProblem, target: Target) -> LayerConfig:
    """What a call runs: the caller's configuration, or the chosen one where that is ""."""
    if config_json:
        return given_schedule(config_json, problem, target)
    return schedule(problem, target)


def _check_kernel(
    name: str, kernel_config: KernelConfig, gemm: GroupedGemm, problem: LayerProblem, target: Target
) -> None:
    if problem.batch_invariant and kernel_config.split_k > 1:
        raise ValueError(
            f"config.{name}.split_k={kernel_config.split_k}: how many programs share a "
            "reduction depends on the batch; batch_invariant=True takes split_k=1"
        )
    if kernel_config.tail_m and problem.needs_fixed_batch(target):
        raise ValueError(
            f"config.{name}.tail_m={kernel_config.tail_m}: which tile a row is in depends on "
            f"the batch, and its bits may on {target.arch}; batch_invariant=True takes tail_m=0"
        )
    reason = why_illegal(kernel_config, gemm, target)
    if reason is not None:
        raise ValueError(
            f"config.{name}={kernel_config} cannot run: {reason}; nearest legal: "
            f"{fit(kernel_config, gemm, target)}"
        )
