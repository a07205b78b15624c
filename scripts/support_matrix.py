"""Writes docs/support.md from the library's own tables.

python scripts/support_matrix.py           write it
python scripts/support_matrix.py --check   exit with 1 if it is not current
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

from tilewise.cli.doctor import RAN
from tilewise.dispatch.config import KernelConfig, StreamConfig
from tilewise.models import MODELS, MoEShape
from tilewise.moe.activation import GATED_KINDS, UNGATED_KINDS
from tilewise.moe.schedule import LayerProblem, schedule
from tilewise.moe.weights import LAYOUTS
from tilewise.target import CATALOGUE, Target

PAGE = Path(__file__).resolve().parent.parent / "docs" / "support.md"
EXAMPLE = "qwen3-30b-a3b"
TOKENS = (1, 32, 512, 8192)

MACHINES = {
    "sm_80": "NVIDIA A100",
    "sm_86": "NVIDIA RTX 30",
    "sm_89": "NVIDIA RTX 40, L4, L40",
    "sm_90": "NVIDIA H100, H200",
    "sm_100": "NVIDIA B200",
    "sm_120": "NVIDIA RTX 50",
    "gfx90a": "AMD MI200",
    "gfx942": "AMD MI300",
    "gfx950": "AMD MI350",
    "gfx1100": "AMD RX 7000",
    "gfx1201": "AMD RX 9000",
}


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def machines() -> str:
    rows = []
    for arch, target in CATALOGUE.items():
        shared = f"{target.shared_memory // 1024} KiB"
        rows.append(
            [
                MACHINES[arch],
                f"`{arch}`",
                "yes",
                f"yes, on an {RAN[arch]}" if arch in RAN else "no",
                "wgmma" if target.warpgroup_mma else f"{target.warp_size} lanes",
                "yes" if target.tensor_descriptors else "no",
                shared,
            ]
        )
    rows.append(["any CPU", "`cpu`", "no kernels", "yes, in plain torch", "", "", ""])
    header = ["machine", "architecture", "compiled", "ran", "matrix unit", "descriptors", "shared"]
    return table(header, rows)


def tile(config: KernelConfig | StreamConfig) -> str:
    """A configuration in a few characters."""
    if isinstance(config, StreamConfig):
        return f"{config.block_n}x{config.block_k}"
    flags = ("s" * config.swap_operands) + ("d" * config.descriptors) + ("p" * config.persistent)
    return f"{config.block_m}x{config.block_n}x{config.block_k}{' ' if flags else ''}{flags}"


def problem(shape: MoEShape, tokens: int, itemsize: int) -> LayerProblem:
    return LayerProblem(
        tokens, shape.top_k, shape.num_experts, shape.hidden_size, shape.intermediate_size,
        itemsize, True, True,
    )  # fmt: skip


def choices(itemsize: int) -> str:
    rows = []
    for arch in CATALOGUE:
        cells = []
        for tokens in TOKENS:
            call = problem(MODELS[EXAMPLE], tokens, itemsize)
            config = schedule(call, Target.from_arch(arch))
            cells.append(f"{tile(config.gate_up)} · {tile(config.down)}")
        rows.append([f"`{arch}`", *cells])
    return table(["", *(f"{tokens:,} tokens" for tokens in TOKENS)], rows)


def batch_invariant() -> str:
    """Architectures on which the option leaves tiles free, because their bits do not depend on them."""
    free = [arch for arch, target in CATALOGUE.items() if target.same_bits_any_tile]
    call = replace(problem(MODELS[EXAMPLE], 1, 2), batch_invariant=True)
    fixed = schedule(call, Target.from_arch("sm_80"))
    return (
        f"On {', '.join(f'`{arch}`' for arch in free)} a row's bits were shown not to depend on "
        "its tile, so `batch_invariant=True` only excludes the decode path. Elsewhere, and in "
        "fp32, every batch of a layer runs one configuration, on `sm_80` for this one "
        f"{tile(fixed.gate_up)} · {tile(fixed.down)}."
    )


def page() -> str:
    return f"""# Support

Written by `python scripts/support_matrix.py` from the library's own tables; a test keeps it current.
`tilewise doctor` says the same about the machine in front of you, and tests it.

## Machines

{machines()}

*Compiled*: every kernel compiles for the architecture in bf16, fp16 and fp32 on every change, with its matrix
instructions and within its shared memory. It says nothing about speed, and a kernel that compiles can still fail.
*Ran*: outputs were compared with the fp32 specification on that machine.

A chip that is not listed decides like the newest listed one that is not newer than it.

## What runs

| | |
|---|---|
| dtypes | bf16, fp16, fp32; weights and hidden states alike, biases also fp32 |
| weights | dense; {", ".join(f"`{name}`" for name in LAYOUTS)} rows of one tensor, split tensors, any strides |
| gated activations | {", ".join(f"`{kind}`" for kind in GATED_KINDS)} |
| without a gate | {", ".join(f"`{kind}`" for kind in UNGATED_KINDS)} |
| ids | int32, int64; global, with an `expert_map` for experts held elsewhere |
| routing | softmax, softmax of the chosen, sigmoid; groups, a correction bias, a scale |
| captured by | CUDA graphs, `torch.compile` with `fullgraph=True` |
| not supported | gradients, quantised weights, communication between devices |

## What would run

Tiles for one layer of {EXAMPLE} in bf16, gate+up · down. The first column is the decode path, columns x reduction
step; the others rows x columns x reduction step, `s` with swapped operands, `d` with tensor descriptors, `p`
persistent.

{choices(2)}

The same in fp32:

{choices(4)}

{batch_invariant()}
"""


def main() -> None:
    if "--check" in sys.argv[1:]:
        if not PAGE.exists() or PAGE.read_text() != page():
            sys.exit("docs/support.md is not current: run python scripts/support_matrix.py")
        return
    PAGE.write_text(page())
    print("wrote", PAGE)


if __name__ == "__main__":
    main()
