"""Repeating a call's launches with other pointers, past most of Triton's launch overhead.

A Triton launch of these kernels costs about 50 us of CPU time, nearly all of it spent finding out
again which compiled kernel the same arguments mean. Everything that decides this (shapes, strides,
dtypes, alignments, options, the weights' addresses) is in `forward.py`'s key: where that key was
seen before, the recorded launches are repeated with the addresses that a call changes put in place.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
from triton import knobs
from triton.tools.tensor_descriptor import TensorDescriptor

from .launch import INTERPRETED, Launch

# `CompiledKernel.run`'s argument order was checked for these; others launch the ordinary way.
SUPPORTED = triton.__version__.startswith("3.6.") and not INTERPRETED and torch.version.hip is None


# One for each layer's weights and each address that scratch memory has had.
MAX_DESCRIPTORS = 4096


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


class Replay:
    """The launches of one call, ready to be repeated.

    Args:
        launches: as recorded.
        workspace: the call's scratch memory; a pointer into it is kept as an offset.
        addresses: of the other tensors of the call, in the order in which `run` takes them; 0 for
            one that is not there.
    """

    def __init__(
        self, launches: Sequence[Launch], workspace: torch.Tensor, addresses: Sequence[int]
    ) -> None:
        # Whether every tensor is known by its place: another's address may not be repeated.
        self.complete = True
        self._steps: list[tuple[Any, ...]] = []
        # Descriptors are never changed once made, so threads may share them.
        self._descriptors: dict[tuple[int, int, int], _Descriptor] = {}
        scratch = workspace.data_ptr()
        places = {address: i + 1 for i, address in enumerate(addresses) if address}
        for launch in launches:
            args: list[Any] = []
            slots: list[tuple[int, int, int]] = []  # argument, buffer, bytes past its start
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
                    slots.append((position, 0, address - scratch))
                elif address in places:
                    slots.append((position, places[address], 0))
                elif address:
                    self.complete = False
            compiled = launch.compiled
            self._steps.append(
                (compiled.run, launch.grid, compiled.function, compiled.packed_metadata, args,
                 slots)
            )  # fmt: skip

    def run(self, addresses: Sequence[int], stream: int) -> None:
        """Launches everything on `stream`; addresses of the workspace, then of the buffers."""
        for step, (run, (x, y, z), function, metadata, template, slots) in enumerate(self._steps):
            args = template.copy()
            for position, buffer, offset in slots:
                address, value = addresses[buffer] + offset, args[position]
                if type(value) is int:
                    args[position] = address
                else:
                    args[position] = self._descriptor(step, position, address, value)
            run(x, y, z, stream, function, metadata, None, None, None, *args)

    def _descriptor(self, step: int, position: int, address: int, like: _Descriptor) -> _Descriptor:
        key = (step, position, address)
        found = self._descriptors.get(key)
        if found is None:
            if len(self._descriptors) >= MAX_DESCRIPTORS:
                self._descriptors.clear()
            found = self._descriptors[key] = _Descriptor(address, like)
        return found


def profiler_listens() -> bool:
    """Whether a launch hook is installed (Proton): then launches go the ordinary way."""
    hook = knobs.runtime.launch_enter_hook
    return bool(getattr(hook, "calls", hook))
