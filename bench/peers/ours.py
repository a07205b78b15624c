"""Peer ``tilewise``: the library itself, through its public face."""

from __future__ import annotations

from torch import Tensor

from bench.peers.base import Layer, Peer


def load() -> Peer:
    """Returns the layer with its defaults."""
    return _load(batch_invariant=False)


def load_batch_invariant() -> Peer:
    """Returns the layer whose bits for a token do not depend on the batch around it."""
    return _load(batch_invariant=True)


def _load(*, batch_invariant: bool) -> Peer:
    import tilewise

    def prepare(w13: Tensor, w2: Tensor) -> Layer:
        weights = tilewise.ExpertWeights.from_gate_up(w13, w2)
        options = {"batch_invariant": True} if batch_invariant else {}

        def layer(x: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
            return tilewise.fused_experts(x, weights, topk_weights, topk_ids, **options)

        return layer

    return Peer(prepare, str(getattr(tilewise, "__version__", "source tree")))
