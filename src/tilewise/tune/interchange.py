"""Configuration files of vLLM and SGLang, read as hints and written as hints.

Their gate_up product computes 2I plain columns where ours computes I columns of a pair, so a width
N of theirs is N / 2 of ours there. vLLM has one configuration for both products; SGLang may have a
second file, `_down`, but both products share BLOCK_SIZE_M. Layouts: vLLM's
`fused_moe.get_config_file_name`, SGLang's `fused_moe_triton_config.get_config_file_name`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..dispatch.config import MIN_DOT, KernelConfig
from ..dispatch.histogram import FAMILIES, expected_sizes
from ..dispatch.select import WORST
from ..dispatch.table import StageTable
from .measure import product
from .store import Profile

# The token counts that vLLM tunes by default (benchmarks/kernels/benchmark_moe.py).
TOKENS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 256, 512, 1024, 1536, 2048, 3072, 4096)

Pair = tuple[KernelConfig, KernelConfig]  # gate_up, down


def import_vllm(path: Path) -> dict[int, Pair]:
    """vLLM's choices by token count, for both of our products.

    Raises:
        OSError: no such file.
        ValueError: a file that holds no such configurations.
    """
    return {
        tokens: (_config(values, 2), _config(values, 1))
        for tokens, values in _entries(path).items()
    }


def import_sglang(path: Path) -> dict[int, Pair]:
    """SGLang's choices by token count; of the down product from the `_down` file, if there is one.

    Args:
        path: the file of the first product.

    Raises:
        OSError: no such file.
        ValueError: a file that holds no such configurations.
    """
    if path.stem.endswith("_down"):
        raise ValueError(f"{path} is of the down product: name the file without '_down'")
    first, beside = _entries(path), path.with_name(f"{path.stem}_down.json")
    second = _entries(beside) if beside.exists() else first
    return {
        tokens: (
            _config(values, 2),
            _config(second[min(second, key=lambda other: abs(other - tokens))], 1),
        )
        for tokens, values in first.items()
    }


def hints(pairs: Mapping[int, Pair], descriptors: bool) -> dict[str, list[KernelConfig]]:
    """What `profile_shape` takes as hints.

    Args:
        descriptors: whether weights are to be loaded through descriptors, which no file says.
    """
    return {
        stage: list(
            dict.fromkeys(replace(pair[at], descriptors=descriptors) for pair in pairs.values())
        )
        for at, stage in enumerate(("gate_up", "down"))
    }


def _entries(path: Path) -> dict[int, dict[str, Any]]:
    try:
        values = json.loads(path.read_text())
        found = {int(key): dict(one) for key, one in values.items() if key != "triton_version"}
        if not found:
            raise ValueError("it has no token counts")
        for one in found.values():
            _config(one, 1)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} holds no configurations of a fused MoE kernel by token count: {error!r}"
        ) from error
    return found


def _config(values: Mapping[str, Any], matrices: int) -> KernelConfig:
    """One entry as a configuration of ours for a product with so many weight tiles a row tile."""
    return KernelConfig(
        int(values["BLOCK_SIZE_M"]),
        max(MIN_DOT, int(values["BLOCK_SIZE_N"]) // matrices),
        int(values["BLOCK_SIZE_K"]),
        int(values.get("GROUP_SIZE_M", 8)),
        int(values.get("num_warps", 4)),
        int(values.get("num_stages", 3)),
    )


def _entry(config: KernelConfig, matrices: int) -> dict[str, int]:
    return {
        "BLOCK_SIZE_M": config.block_m,
        "BLOCK_SIZE_N": config.block_n * matrices,
        "BLOCK_SIZE_K": config.block_k,
        "GROUP_SIZE_M": config.group_m,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }


def file_name(profile: Profile, device: str) -> str:
    """Without the suffix: "E=128,N=768,device_name=NVIDIA_H200"; bf16 has no dtype in it."""
    shape, device = profile.shape, device.replace(" ", "_")
    return f"E={shape.num_experts},N={shape.intermediate_size},device_name={device}"


def export_vllm(profile: Profile, folder: Path, device: str = "") -> list[Path]:
    """Writes the file for $VLLM_TUNED_CONFIG_FOLDER.

    Args:
        device: as the driver names it; by default the machine's that was profiled.

    Returns:
        What was written.

    Raises:
        ValueError: a profile without a table, or without variants that vLLM's kernel has, too.
    """
    device = _device(profile, device)
    # vLLM takes every machine of this family for one.
    if "H200" in device.replace(" ", "_").split("_"):
        device = "NVIDIA_H200"
    values: dict[str, Any] = {"triton_version": profile.key["triton"]}
    for tokens, (gate_up, _) in _choices(profile, tied=True):
        values[str(tokens)] = _entry(gate_up, 2)
    return [_write(folder / f"{file_name(profile, device)}.json", values)]


def export_sglang(profile: Profile, folder: Path, device: str = "") -> list[Path]:
    """Writes both products' files for $SGLANG_MOE_CONFIG_DIR.

    Args, Returns, Raises:
        As `export_vllm`.
    """
    version = profile.key["triton"].replace(".", "_")
    place = folder / "configs" / f"triton_{version}"
    name = file_name(profile, _device(profile, device))
    pairs = list(_choices(profile, tied=False))
    return [
        _write(place / f"{name}.json", {str(t): _entry(pair[0], 2) for t, pair in pairs}),
        _write(place / f"{name}_down.json", {str(t): _entry(pair[1], 1) for t, pair in pairs}),
    ]


def _device(profile: Profile, device: str) -> str:
    found = device or str(profile.meta.get("device", ""))
    if not found:
        raise ValueError("the profile does not name its machine: give the device's name")
    return found


def _write(path: Path, values: Mapping[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values, indent=4) + "\n")
    return path


def plain(table: StageTable) -> list[KernelConfig]:
    """Variants that a kernel without our options could run, but for the loads by descriptor."""
    return [
        config
        for config in table.coefficients
        if not (config.swap_operands or config.persistent or config.tail_m) and config.split_k == 1
    ]


def _choices(profile: Profile, tied: bool) -> Iterator[tuple[int, Pair]]:
    """For each of `TOKENS` the pair of least mean and worst relative time over the families.

    Args:
        tied: the two must be one configuration of a kernel without pairs, but for GROUP_SIZE_M.
    """
    table, shape, target = profile.table, profile.shape, profile.target
    if table is None:
        raise ValueError("the profile has too few rows for a table: run `tilewise tune` again")
    pairs = [
        (a, b)
        for a in plain(table.gate_up)
        for b in plain(table.down)
        if a.block_m == b.block_m and (not tied or _same(a, b))
    ]
    if not pairs:
        raise ValueError(
            "no two of the profiled variants can be "
            + ("one configuration of both products" if tied else "of one BLOCK_SIZE_M")
            + ": import the host's own file as hints (--hints), and tune again"
        )
    for tokens in TOKENS:
        gemms = [product(shape, stage, tokens) for stage in ("gate_up", "down")]
        scores: dict[Pair, list[float]] = {}
        for family in FAMILIES:
            histogram = expected_sizes(family, tokens, shape.top_k, shape.num_experts)
            first = table.gate_up.costs(gemms[0], target, histogram)
            second = table.down.costs(gemms[1], target, histogram)
            times = {(a, b): first[a] + second[b] for a, b in pairs if a in first and b in second}
            fastest = min(times.values())
            for pair, us in times.items():
                scores.setdefault(pair, []).append(us / fastest)
        robust = {
            pair: sum(relative) / len(relative) + WORST * max(relative)
            for pair, relative in scores.items()
        }
        yield tokens, min(robust, key=robust.__getitem__)


def _same(gate_up: KernelConfig, down: KernelConfig) -> bool:
    """Whether both are one configuration, the first one's columns counted twice."""
    a, b = _entry(gate_up, 2), _entry(down, 1)
    return all(a[name] == b[name] for name in a if name != "GROUP_SIZE_M")
