"""Tilewise: the ragged parts of inference at hardware speed, in portable Triton."""

from .dispatch.config import FewActive, KernelConfig, StreamConfig
from .models import MODELS, MoEShape, moe_shape
from .moe.activation import SWIGLU, Activation
from .moe.explain import explain, workspace_size
from .moe.layer import FusedExperts, FusedMoE, fused_experts, fused_moe, plan, route
from .moe.schedule import LayerConfig
from .moe.warmup import warmup
from .moe.weights import ExpertWeights
from .target import Target

__version__ = "0.1.0"

__all__ = [
    "MODELS",
    "SWIGLU",
    "Activation",
    "ExpertWeights",
    "FewActive",
    "FusedExperts",
    "FusedMoE",
    "KernelConfig",
    "LayerConfig",
    "MoEShape",
    "StreamConfig",
    "Target",
    "explain",
    "fused_experts",
    "fused_moe",
    "moe_shape",
    "plan",
    "route",
    "warmup",
    "workspace_size",
]
