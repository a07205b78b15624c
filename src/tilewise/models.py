"""Shapes of MoE layers, and the catalogue of real models by name."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass

MAX_DEVICES = 64  # As many as errors list.


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

    def sharded(self, tensor_parallel: int = 1, expert_parallel: int = 1) -> MoEShape:
        """One device's part of the layer.

        Args:
            tensor_parallel: devices that share each expert's intermediate size.
            expert_parallel: devices that share the experts. `top_k` stays: a call of this shape is
                one whose tokens all choose experts of this device.

        Raises:
            ValueError: a size that does not divide, or fewer experts on a device than `top_k`.
        """
        if tensor_parallel < 1 or self.intermediate_size % tensor_parallel:
            raise ValueError(
                f"intermediate_size={self.intermediate_size} does not divide by {tensor_parallel}: "
                "a shard needs a divisor of it, "
                f"{_divisors(self.intermediate_size, self.intermediate_size)}"
            )
        most = self.num_experts // self.top_k
        if expert_parallel < 1 or self.num_experts % expert_parallel:
            raise ValueError(
                f"num_experts={self.num_experts} does not divide by {expert_parallel}: "
                f"a shard needs a divisor of it, {_divisors(self.num_experts, most)}"
            )
        if expert_parallel > most:
            raise ValueError(
                f"num_experts={self.num_experts} over {expert_parallel} devices leaves each fewer "
                f"than top_k={self.top_k}: use {_divisors(self.num_experts, most)}"
            )
        experts = self.num_experts // expert_parallel
        size = self.intermediate_size // tensor_parallel
        return MoEShape(experts, self.top_k, self.hidden_size, size)


def _divisors(size: int, largest: int) -> str:
    """The numbers of devices that divide a size, in words: "1, 2, 4 or 8"."""
    *first, last = [str(n) for n in range(1, min(largest, MAX_DEVICES) + 1) if size % n == 0]
    return f"{', '.join(first)} or {last}" if first else last


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
    "hunyuan-a13b": MoEShape(64, 8, 4096, 3072),
    "granite-3b-a800m": MoEShape(40, 8, 1536, 512),
    "dbrx": MoEShape(16, 4, 6144, 10752),
    "grok-1": MoEShape(8, 2, 6144, 32768),
    "arctic": MoEShape(128, 2, 7168, 4864),
}


# Short names that no other model shares, and names as their makers spell them.
ALIASES: dict[str, str] = {
    "snowflake-arctic": "arctic",
    "qwen3-30b": "qwen3-30b-a3b",
    "qwen3-235b": "qwen3-235b-a22b",
    "qwen3-coder-480b": "qwen3-coder-480b-a35b",
    "qwen3-next-80b": "qwen3-next-80b-a3b",
    "llama-4-scout": "llama4-scout",
    "llama-4-maverick": "llama4-maverick",
}


# What a name is before its shards, and one shard of it.
_NAME = re.compile(r"(.*?)((?:@|-(?=[te]p(?![a-z]))).*)?", re.DOTALL)
_SHARD = re.compile(r"[-@](tp|ep)([1-9][0-9]*)(?![^-@])")


def moe_shape(name: str) -> MoEShape:
    """The shape of a model by name, or of one device's part of it: "NAME-tpN", "NAME-epN".

    Args:
        name: of `MODELS` or `ALIASES`, in any case; of a name with slashes ("Qwen/Qwen3-30B-A3B")
            the last part. "-tpN" divides the intermediate size, "-epN" the experts; both may
            follow a name, "@" may stand for "-".

    Raises:
        TypeError: `name` is no string.
        ValueError: No such model, or a suffix that is no shard of it.
    """
    if not isinstance(name, str):
        raise TypeError(f"a model's name is a string, got {name!r}; known: {', '.join(MODELS)}")
    if re.fullmatch(r"\s*\d+\s*(,\s*\d+\s*){3}", name):
        sizes = ", ".join(str(int(size)) for size in name.split(","))
        raise ValueError(f"{name!r} are sizes and no model's name: use MoEShape({sizes})")
    match = _NAME.fullmatch(name.lower().rpartition("/")[2])
    base, suffix = match.groups(default="") if match else (name, "")
    known = ALIASES.get(base, base)
    if known not in MODELS:
        near = [repr(one + suffix) for one in _near(base)]
        hint = f" (did you mean {' or '.join(near)}?)" if near else ""
        raise ValueError(f"unknown model {base!r}{hint}; known: {', '.join(MODELS)}")
    if not suffix:
        return MODELS[known]
    shards = _SHARD.findall(suffix)
    kinds = dict(shards)
    if len(kinds) < len(shards) or _SHARD.sub("", suffix):
        raise ValueError(
            f"{name!r}: the suffix of a shard is -tpN or -epN, N from 1, each once: {base}-tp2"
        )
    try:
        return MODELS[known].sharded(int(kinds.get("tp", 1)), int(kinds.get("ep", 1)))
    except ValueError as error:
        raise ValueError(f"{name!r}: {error}") from None


def _near(base: str) -> list[str]:
    """Up to three models whose names resemble `base`, or begin alike."""
    names = [*MODELS, *ALIASES]
    close = difflib.get_close_matches(base, names, n=3, cutoff=0.7)
    alike = [n for n in names if base and (n.startswith(base) or base.startswith(n))]
    return list(dict.fromkeys(ALIASES.get(n, n) for n in [*close, *alike]))[:3]
