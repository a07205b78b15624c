"""Shapes of MoE layers, and the catalogue of real models by name."""

from __future__ import annotations

import difflib
from dataclasses import dataclass


@dataclass(frozen=True)
class MoEShape:
    """One MoE layer's sizes; `intermediate_size` is per expert, as sharded on this device."""

    num_experts: int
    top_k: int
    hidden_size: int
    intermediate_size: int

    def __post_init__(self) -> None:
        for name, size in vars(self).items():
            if not isinstance(size, int):
                raise TypeError(f"{name}={size!r} must be an integer")
        if min(self.num_experts, self.top_k, self.hidden_size, self.intermediate_size) < 1:
            raise ValueError(f"every size must be at least 1, got {self}")
        if self.top_k > self.num_experts:
            raise ValueError(f"top_k={self.top_k} exceeds num_experts={self.num_experts}")

    def sharded(self, tensor_parallel: int) -> MoEShape:
        """The layer with its intermediate size cut over `tensor_parallel` devices."""
        if tensor_parallel < 1 or self.intermediate_size % tensor_parallel:
            raise ValueError(
                f"intermediate_size={self.intermediate_size} does not divide by {tensor_parallel}: "
                "a shard needs a divisor of it"
            )
        size = self.intermediate_size // tensor_parallel
        return MoEShape(self.num_experts, self.top_k, self.hidden_size, size)


MODELS: dict[str, MoEShape] = {
    "mixtral-8x7b": MoEShape(8, 2, 4096, 14336),
    "mixtral-8x22b": MoEShape(8, 2, 6144, 16384),
    "qwen2-moe-57b": MoEShape(64, 8, 3584, 2560),
    "qwen3-30b-a3b": MoEShape(128, 8, 2048, 768),
    "qwen3-235b-a22b": MoEShape(128, 8, 4096, 1536),
    "qwen3-coder-480b-a35b": MoEShape(160, 8, 6144, 2560),
    "qwen3-next-80b-a3b": MoEShape(512, 10, 2048, 512),
    "olmoe-1b-7b": MoEShape(64, 8, 2048, 1024),
    "phi-3.5-moe": MoEShape(16, 2, 4096, 6400),
    "deepseek-v2-lite": MoEShape(64, 6, 2048, 1408),
    "deepseek-v2": MoEShape(160, 6, 5120, 1536),
    "deepseek-v3": MoEShape(256, 8, 7168, 2048),
    "gpt-oss-20b": MoEShape(32, 4, 2880, 2880),
    "gpt-oss-120b": MoEShape(128, 4, 2880, 2880),
    "llama4-scout": MoEShape(16, 1, 5120, 8192),
    "llama4-maverick": MoEShape(128, 1, 5120, 8192),
    "glm-4.5-air": MoEShape(128, 8, 4096, 1408),
    "glm-4.5": MoEShape(160, 8, 5120, 1536),
    "kimi-k2": MoEShape(384, 8, 7168, 2048),
}


def moe_shape(name: str) -> MoEShape:
    """The shape of a model by name, with an optional "@tpN" suffix for a tensor-parallel shard.

    Args:
        name: of `MODELS`, in any case; of a name with slashes ("Qwen/Qwen3-30B-A3B") the last part.

    Raises:
        TypeError: `name` is no string.
        ValueError: No such model, or a suffix that is not "@tpN" with N that divides its columns.
    """
    if not isinstance(name, str):
        raise TypeError(f"a model's name is a string, got {name!r}; known: {', '.join(MODELS)}")
    base, at, suffix = name.lower().rpartition("/")[2].partition("@")
    if base not in MODELS:
        near = difflib.get_close_matches(base, MODELS, n=1, cutoff=0.7)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise ValueError(f"unknown model {base!r}{hint}; known: {', '.join(MODELS)}")
    if not at:
        return MODELS[base]
    shard = suffix.removeprefix("tp")
    if not suffix.startswith("tp") or not shard.isdecimal() or int(shard) < 1:
        raise ValueError(f"{name!r}: the suffix of a shard is @tpN, for example {base}@tp2")
    return MODELS[base].sharded(int(shard))
