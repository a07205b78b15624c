"""Which experts a model's tokens choose, layer by layer, as a trace to tune with.

    with tilewise.integrations.record.recording(model) as trace:
        model.generate(**inputs)
    trace.save("routing.safetensors")

Any experts implementation can be recorded, Tilewise or not.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .transformers import experts_layers, is_llama4

FORMAT = "tilewise-routing-1"


@dataclass(frozen=True, eq=False)
class Call:
    """One call of one layer's experts.

    Attributes:
        layer: name of the experts module in the model.
        num_experts: experts that the module holds.
        ids: int32 [num_tokens, top_k]; ids >= num_experts belong to another device.
    """

    layer: str
    num_experts: int
    ids: torch.Tensor

    @property
    def num_tokens(self) -> int:
        return self.ids.shape[0]

    @property
    def top_k(self) -> int:
        return self.ids.shape[1]


@dataclass(eq=False)
class Trace:
    """Calls in the order they were made."""

    calls: list[Call] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.calls)

    def __iter__(self) -> Iterator[Call]:
        return iter(self.calls)

    def save(self, path: str | Path) -> None:
        """Writes a safetensors file: ids under each call's number, the rest as metadata."""
        from safetensors.torch import save_file

        ids = {str(number): call.ids.cpu().contiguous() for number, call in enumerate(self.calls)}
        calls = [[call.layer, call.num_experts] for call in self.calls]
        save_file(ids, path, metadata={"format": FORMAT, "calls": json.dumps(calls)})

    @classmethod
    def load(cls, path: str | Path) -> Trace:
        """Reads what `save` wrote; ids are on the CPU.

        Raises:
            ValueError: a file that is no trace.
        """
        from safetensors import safe_open

        with safe_open(path, "pt") as file:
            metadata: dict[str, str] = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise ValueError(f"{path} is no trace: its format must be {FORMAT!r}")
            calls = enumerate(json.loads(metadata["calls"]))
            return cls([Call(layer, n, file.get_tensor(str(i))) for i, (layer, n) in calls])


@dataclass(eq=False)
class _Recorder(Trace):
    """A trace that is being recorded and bounds what it keeps on a device."""

    device_bytes: int = 0
    _moved: int = 0
    _held: int = 0

    def add(self, call: Call) -> None:
        self.calls.append(call)
        if call.ids.device.type == "cpu":
            return
        self._held += call.ids.nbytes
        if self._held > self.device_bytes:
            for i in range(self._moved, len(self.calls)):
                self.calls[i] = replace(self.calls[i], ids=self.calls[i].ids.cpu())
            self._moved, self._held = len(self.calls), 0


@contextmanager
def recording(model: nn.Module, *, device_bytes: int = 256 << 20) -> Iterator[Trace]:
    """Records the ids of every call of every experts module while the block runs.

    Ids are copied on their device, without a sync, until they take `device_bytes`; then all of them
    move to the host, which waits for the device. Calls of a model that was compiled before are not
    seen, nor those inside a replayed CUDA graph: record a model that is not compiled.

    Raises:
        ValueError: a model without experts that can be recorded.
        RuntimeError: the block ran and no call was seen.
    """
    trace = _Recorder(device_bytes=device_bytes)
    hooks: list[Any] = []
    for name, layer in experts_layers(model):
        if is_llama4(layer):
            name = f"{name}.experts".lstrip(".")
            hooks.append(layer.router.register_forward_hook(_llama4_hook(trace, name, layer)))
        else:
            hook = _experts_hook(trace, name, layer)
            hooks.append(layer.register_forward_pre_hook(hook, with_kwargs=True))
    if not hooks:
        raise ValueError(
            f"{type(model).__name__} has no experts that can be recorded: they must be modules "
            "that transformers dispatches by `experts_implementation`, or Llama 4's"
        )
    try:
        yield trace
    finally:
        for hook in hooks:
            hook.remove()
    if not trace.calls:
        raise RuntimeError(
            f"no call of {type(model).__name__}'s experts was seen: the block did not run it, or "
            "it was compiled before. Record a model that is not compiled"
        )


def _experts_hook(trace: _Recorder, name: str, experts: Any) -> Any:
    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # After the hidden states and before the weights; models name it differently.
        found = [ids for ids in (*args, *kwargs.values()) if _are_ids(ids)]
        if len(found) != 1:
            raise RuntimeError(f"{name} was called without ids, or with several: cannot record it")
        _add(trace, name, experts.num_experts, found[0])

    return hook


def _llama4_hook(trace: _Recorder, name: str, block: Any) -> Any:
    """Its experts are given no ids, but the router's logits say which it chose."""

    def hook(_: nn.Module, args: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
        _add(trace, name, block.num_experts, output[1].topk(block.top_k, dim=1).indices)

    return hook


def _are_ids(value: Any) -> bool:
    return (
        isinstance(value, torch.Tensor)
        and value.dim() == 2
        and value.dtype in (torch.int32, torch.int64)
    )


def _add(trace: _Recorder, layer: str, num_experts: int, ids: torch.Tensor) -> None:
    # The model may write to its tensor again.
    trace.add(Call(layer, num_experts, ids.detach().to(torch.int32, copy=True)))
