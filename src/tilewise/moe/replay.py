"""Repeating a call's launches with other pointers, past most of Triton's launch overhead.

A Triton launch of these kernels costs about 50 us of CPU time, nearly all of it spent finding out
again which compiled kernel the same arguments mean. Everything that decides this (shapes, strides,
dtypes, alignments, options, the weights' addresses) is in `forward.py`'s key: where that key was
seen before, the recorded launches are repeated with the addresses that a call changes put in place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from triton import knobs
from triton.tools.tensor_descriptor import TensorDescriptor

from .launch import INTERPRETED, Launch

# `CompiledKernel.run`'s argument order was checked for these; others launch the ordinary way.
SUPPORTED = triton.__version__.startswith("3.6.") and not INTERPRETED and torch.version.hip is None


class _Address:
    """Stands for a tensor inside a descriptor: the launcher asks for nothing but its address."""

    __slots__ = ("address",)

    def __init__(self, address: int) -> None:
        self.address = address

    def data_ptr(self) -> int:
        return self.address


class _Descriptor:
    """Stands for a `TensorDescriptor`, without its checks and without keeping the tensor alive."""

    __slots__ = ("base", "padding", "shape", "strides")

    def __init__(self, address: int, descriptor: Any) -> None:
        self.base = _Address(address)
        self.shape = descriptor.shape
        self.strides = descriptor.strides
        self.padding = descriptor.padding


@dataclass(frozen=True)
class _Slot:
    """Argument `position` of a launch is address `buffer` of the call plus `offset` bytes."""

    position: int
    buffer: int
    offset: int


class Replay:
    """The launches of one call, ready to be repeated.

    Args:
        launches: as recorded.
        workspace: the call's scratch memory; a pointer into it is kept as an offset.
        buffers: the other tensors whose addresses change from call to call.
    """

    def __init__(
        self, launches: Sequence[Launch], workspace: torch.Tensor, buffers: Sequence[torch.Tensor]
    ) -> None:
        self._steps: list[tuple[Any, ...]] = []
        scratch = workspace.data_ptr()
        places = {b.data_ptr(): i + 1 for i, b in enumerate(buffers)}
        for launch in launches:
            args: list[Any] = []
            slots: list[_Slot] = []
            for position, arg in enumerate(launch.args):
                if isinstance(arg, TensorDescriptor):
                    address = arg.base.data_ptr()
                    args.append(_Descriptor(address, arg))
                elif isinstance(arg, torch.Tensor):
                    address = arg.data_ptr()
                    args.append(address)
                else:
                    args.append(arg)
                    continue
                if scratch <= address < scratch + workspace.numel():
                    slots.append(_Slot(position, 0, address - scratch))
                elif address in places:
                    slots.append(_Slot(position, places[address], 0))
            compiled = launch.compiled
            self._steps.append(
                (compiled.run, launch.grid, compiled.function, compiled.packed_metadata, args,
                 [(s.position, s.buffer, s.offset) for s in slots])
            )  # fmt: skip

    def run(self, addresses: Sequence[int], stream: int) -> None:
        """Launches everything on `stream`; addresses of the workspace, then of the buffers."""
        for run, (x, y, z), function, metadata, template, slots in self._steps:
            args = template.copy()
            for position, buffer, offset in slots:
                address, value = addresses[buffer] + offset, args[position]
                # A new descriptor for every call: other threads may be repeating the same one.
                args[position] = address if type(value) is int else _Descriptor(address, value)
            run(x, y, z, stream, function, metadata, None, None, None, *args)


def profiler_listens() -> bool:
    """Whether a launch hook is installed (Proton): then launches go the ordinary way."""
    hook = knobs.runtime.launch_enter_hook
    return bool(getattr(hook, "calls", hook))
