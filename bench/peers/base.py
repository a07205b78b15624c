"""What a peer is, and how the ones asked for are found."""

from __future__ import annotations

import importlib
import math
import os
import site
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from bench.peers import archive

Layer = Callable[[Tensor, Tensor, Tensor], Tensor]  # (x, topk_ids, topk_weights) -> output
Prepare = Callable[[Tensor, Tensor], Layer]  # (w13 [E, 2I, H], w2 [E, H, I]) -> layer, untimed


@dataclass(frozen=True)
class Peer:
    """An implementation that could be loaded.

    Attributes:
        prepare: Lays the weights out as the peer wants them.
        version: What the results file says was measured.
        notes: Anything a reader of the numbers must know.
        max_tokens: Of a call; it refuses larger ones.
    """

    prepare: Prepare
    version: str
    notes: dict[str, str] = field(default_factory=dict)
    max_tokens: float = math.inf


# Name -> "module:function"; the function returns the Peer or raises, and the error is the reason.
LOADERS = {
    "tilewise": "bench.peers.ours:load",
    "tilewise_invariant": "bench.peers.ours:load_batch_invariant",
    "vllm": "bench.peers.vllm_moe:load",
    "vllm_dflt": "bench.peers.vllm_moe:load_default",
    "triton_kernels": "bench.peers.triton_kernels_moe:load",
    "torch_gmm": "bench.peers.torch_gmm:load",
    "sonic": "bench.peers.sonic:load",
    "deep_gemm": "bench.peers.deep_gemm_moe:load",
    "deep_gemm_masked": "bench.peers.deep_gemm_moe:load_masked",
    "tritonmoe": "bench.peers.tritonmoe:load",
    "hf": "bench.peers.hf:load",
}
AGAIN = "_again"
DEFAULT = ("tilewise", "vllm", "vllm_dflt", "vllm_again", "triton_kernels", "torch_gmm")


def original(name: str) -> str:
    """Returns the peer behind a name: ``vllm_again`` is ``vllm``, timed once more for the noise."""
    return name.removesuffix(AGAIN)


def load(names: Iterable[str]) -> tuple[dict[str, Peer], dict[str, str]]:
    """Loads the peers behind the names.

    Returns:
        The peers that loaded, by name, and for each other name the reason why it is missing.
    """
    peers: dict[str, Peer] = {}
    missing: dict[str, str] = {}
    use_folder()
    for name in names:
        try:
            loader = LOADERS[original(name)]
        except KeyError:
            known = ", ".join(LOADERS)
            missing[name] = f"unknown peer; known: {known}, each also with {AGAIN}"
            continue
        module, _, function = loader.partition(":")
        try:
            peers[name] = getattr(importlib.import_module(module), function)()
        except Exception as error:  # any failure to import is a reason, none may stop the run
            missing[name] = describe_error(error)
    return peers, missing


def use_folder() -> None:
    """Makes the folder of unpacked peers importable, behind what the machine has itself."""
    folder = os.environ.get("TILEWISE_PEERS") or str(archive.default_folder())
    if Path(folder).is_dir() and folder not in sys.path:
        site.addsitedir(folder)  # also follows the .pth files of wheels


def describe_error(error: BaseException) -> str:
    """Returns an error as one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
