"""Synthetic routings by name, for tuning and for scoring a choice of configuration.

Each name is a family with its strength: "uniform", "zipf1.2", "dirichlet2", "hot", "few0.25",
"bimodal", "empty8". `fingerprint` tells apart what two rows really routed: a benchmark that labels
one histogram with two names is worse than none.
"""

from __future__ import annotations

import hashlib
import re

import torch
from torch import Tensor

from ..models import MoEShape

UNIFORM_FLOOR = 0.1  # of a Dirichlet's mass, as in FlashInfer's exemplars (pull request 4106)


def expert_ids(kind: str, num_tokens: int, shape: MoEShape, generator: torch.Generator) -> Tensor:
    """Draws routing of one family.

    Args:
        kind: a family's name and strength. "zipfS": p ~ rank^-S. "dirichletF": effective experts
            (inverse Simpson) of about E / F. "hot": every token to the same experts. "fewA": a
            share A of the experts is used. "bimodal": an eighth of the tokens spread, the rest hot.
            "emptyR": the last of R ranks' experts get nothing.

    Returns:
        int32 [num_tokens, top_k], distinct within a token.

    Raises:
        ValueError: no such family.
    """
    device, experts = generator.device, shape.num_experts
    match = re.fullmatch(r"([a-z]+)([0-9.]*)", kind)
    family, strength = (match[1], float(match[2] or 0)) if match else (kind, 0.0)

    def noise(rows: int) -> Tensor:  # Gumbel: its top k of log p + noise are k draws, all distinct.
        u = torch.rand(rows, experts, generator=generator, device=device).clamp_(1e-9, 1 - 1e-7)
        return -torch.log(-torch.log(u))

    def shuffled(p: Tensor) -> Tensor:
        return p[torch.randperm(experts, generator=generator, device=device)]

    flat = torch.zeros(experts, device=device)
    if family == "uniform":
        score = flat + noise(num_tokens)
    elif family == "zipf":
        ranks = torch.arange(1, experts + 1, device=device, dtype=torch.float32)
        score = shuffled(-strength * ranks.log()) + noise(num_tokens)
    elif family == "dirichlet":
        # E[sum p^2] of a symmetric Dirichlet is (a + 1) / (E a + 1): solved for F / E.
        alpha = (1 - strength / experts) / max(strength - 1, 1e-3)
        p = torch._standard_gamma(flat + alpha, generator=generator)
        p = (1 - UNIFORM_FLOOR) * p / p.sum() + UNIFORM_FLOOR / experts
        score = p.log() + noise(num_tokens)
    elif family == "hot":
        score = noise(1).expand(num_tokens, experts)
    elif family == "few":
        used = max(shape.top_k, round(strength * experts))
        allowed = torch.arange(experts, device=device) < used
        score = shuffled(torch.where(allowed, 0.0, -torch.inf)) + noise(num_tokens)
    elif family == "bimodal":
        spread = torch.arange(num_tokens, device=device)[:, None] % 8 == 0
        score = torch.where(spread, noise(num_tokens), noise(1))
    elif family == "empty":
        present = torch.arange(experts, device=device) < experts - experts // int(strength)
        score = torch.where(present, 0.0, -torch.inf) + noise(num_tokens)
    else:
        raise ValueError(
            f"routing {kind!r}: a family is one of uniform, zipf, dirichlet, hot, few, bimodal, "
            "empty, followed by its strength"
        )
    return score.topk(shape.top_k, dim=-1).indices.to(torch.int32).contiguous()


def sizes_of(ids: Tensor, num_experts: int) -> list[int]:
    """Rows of each expert."""
    flat = ids.flatten().long()
    return torch.bincount(flat[flat >= 0], minlength=num_experts).tolist()


def fingerprint(sizes: list[int]) -> str:
    """Twelve digits that differ when histograms do, whatever order the experts are in."""
    return hashlib.sha256(repr(sorted(sizes)).encode()).hexdigest()[:12]
