"""Writes docs/support.md from the library's own tables.

python scripts/support_matrix.py           write it
python scripts/support_matrix.py --check   exit with 1 if it is not current
"""

# ruff: noqa: E501 - rows of a Markdown table stay on one line

from __future__ import annotations

import sys
from pathlib import Path

from tilewise.cli.doctor import RAN
from tilewise.moe.activation import GATED_KINDS, UNGATED_KINDS
from tilewise.moe.weights import LAYOUTS
from tilewise.target import CATALOGUE

PAGE = Path(__file__).resolve().parent.parent / "docs" / "support.md"

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


def same_bits() -> str:
    """Where `batch_invariant` leaves tiles free, because bits do not depend on them."""
    free = ", ".join(f"`{arch}`" for arch, target in CATALOGUE.items() if target.same_bits_any_tile)
    return (
        f"On {free} tests showed that a row's bits do not depend on its tile in 16 bits, so\n"
        "`batch_invariant=True` only excludes decode, shared reductions, copies in expert order and the launch that both products "
        "may share. Elsewhere,\nand in fp32, every batch of a layer then runs one configuration."
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

## Batch invariance

{same_bits()}

## What a call would run

`tilewise explain MODEL --tokens N --target ARCH` prints path, tiles, bytes and floor for every architecture above,
without the machine; `--target cpu` prints what remains without kernels. Where there is no GPU and no `--target`, it
models `sm_90` and says so.
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
