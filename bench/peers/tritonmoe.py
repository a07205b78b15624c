"""Peer ``tritonmoe``: the public code of "Cross-Platform Fused MoE Dispatch in Triton".

Its functions run as they are, but for the block schedule: that is built in Python from numbers
read back from the GPU, which no CUDA graph can hold, so it is made once for each routing and left
untimed. That favours the peer.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from bench.peers.archive import TRITONMOE
from bench.peers.base import Layer, Peer

PACKAGE = "triton_kernels"  # its name, which is also that of Triton's own kernels


def load() -> Peer:
    """Returns the layer; its first weights are two copies, of the gate's and of up's rows."""
    with apart(folder()):
        fused, permute = (
            importlib.import_module(f"{PACKAGE}.moe.{name}") for name in ("fused_moe", "permute")
        )
        gemm = importlib.import_module(f"{PACKAGE}.moe.expert_gemm")
    schedule = Schedule(gemm._build_block_schedule)
    fused._build_block_schedule = gemm._build_block_schedule = schedule

    def prepare(w13: Tensor, w2: Tensor) -> Layer:
        gate, up = (half.contiguous() for half in w13.chunk(2, 1))
        num_experts = w2.shape[0]

        def layer(x: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
            schedule.routing = (topk_ids.data_ptr(), *topk_ids.shape, num_experts)
            rows, offsets, order, _ = permute.permute_tokens(x, topk_ids, num_experts)
            return fused.fused_expert_ffn(
                *(rows, gate, up, w2, offsets, num_experts),
                *(topk_weights, order, *topk_ids.shape),
            )

        return layer

    notes = {"schedule": "host-built block schedule left untimed, which favours it"}
    return Peer(prepare, "bassrehab/triton-kernels 7f19abd", notes)


def folder() -> Path:
    """Returns the unpacked sources."""
    for entry in sys.path:
        found = Path(entry) / TRITONMOE / PACKAGE
        if found.is_dir():
            return found
    raise ImportError("its sources are not unpacked: python -m bench.prepare_peers tritonmoe")


@contextmanager
def apart(package: Path) -> Iterator[None]:
    """Lets this package be imported beside another one of its name, which comes back after."""
    others = {name: module for name, module in sys.modules.items() if _in_package(name)}
    for name in others:
        del sys.modules[name]
    stand_in = ModuleType(PACKAGE)  # without the package's kernels for other layers
    stand_in.__path__ = [str(package)]
    sys.modules[PACKAGE] = stand_in
    try:
        yield
    finally:
        for name in [name for name in sys.modules if _in_package(name)]:
            del sys.modules[name]
        sys.modules.update(others)


def _in_package(name: str) -> bool:
    return name.partition(".")[0] == PACKAGE


class Schedule:
    """Builds the block schedule of a routing at its first call, and repeats it after.

    The ids behind an address must not change: a cell's inputs do not, and a call before each
    capture builds the schedules anew.
    """

    def __init__(self, build: Any) -> None:
        self.build = build
        self.routing: tuple[int, ...] = ()
        self.known: dict[tuple[int, ...], Any] = {}

    def __call__(self, expert_offsets: Tensor, num_experts: int, BLOCK_M: int = 64) -> Any:
        """Takes and returns what the function in its place does."""
        if not torch.cuda.is_available() or not torch.cuda.is_current_stream_capturing():
            self.known[self.routing] = self.build(expert_offsets, num_experts, BLOCK_M)
        return self.known[self.routing]
