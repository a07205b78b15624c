"""Compiling ahead of serving: every kernel variant that calls of a layer can need."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from ..dispatch.select import bucket
from ..models import MoEShape
from ..target import Target
from . import launch as launching
from .activation import SWIGLU, Activation
from .checks import (
    DTYPES,
    ID_DTYPES,
    check_activation,
    check_bools,
    check_config,
    check_dtype,
    check_tokens,
)
from .forward import forward_into, overlap_of, problem_of
from .plan import plan_variant
from .route import route_into
from .schedule import LayerConfig, layer_config
from .weights import ExpertWeights
from .workspace import buffer_sizes


def meta_weights(
    shape: MoEShape, dtype: torch.dtype, activation: Activation, bias: bool = False
) -> ExpertWeights:
    """Weights of the usual layout without memory: [E, 2I, H], gate rows first, and [E, H, I]."""
    e, h, i = shape.num_experts, shape.hidden_size, shape.intermediate_size

    def empty(*size: int) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, device="meta")

    down_bias = empty(e, h) if bias else None
    if not activation.is_gated:
        up_bias = empty(e, i) if bias else None
        return ExpertWeights.from_ungated(
            empty(e, i, h), empty(e, h, i), up_bias=up_bias, down_bias=down_bias
        )
    gate_up_bias = empty(e, 2 * i) if bias else None
    return ExpertWeights.from_gate_up(
        empty(e, 2 * i, h), empty(e, h, i), gate_up_bias=gate_up_bias, down_bias=down_bias
    )


def representative_tokens(
    weights: ExpertWeights,
    top_k: int,
    max_tokens: int,
    batch_invariant: bool,
    target: Target,
    config: str = "",
) -> list[int]:
    """Token counts up to `max_tokens` that between them need every variant, one count a variant.

    Args:
        config: a `LayerConfig` as JSON that all calls pass, or "" for those that choose.
        Others: as `warmup`.
    """

    def variant(num_tokens: int) -> object:
        ids = torch.empty((num_tokens, top_k), dtype=torch.int32, device="meta")
        hidden = torch.empty((num_tokens, weights.hidden_size), dtype=weights.dtype, device="meta")
        problem = problem_of(
            hidden, weights.gate, weights.up, weights.down, ids, True, batch_invariant
        )
        # The plan's step is a variant of its own, and so is the overlap; decode has neither.
        rows = num_tokens * top_k
        return layer_config(config, problem, target), plan_variant(rows), overlap_of(rows, target)

    return first_of_each(variant, max_tokens)


def first_of_each(variant: Callable[[int], object], largest: int) -> list[int]:
    """The smallest count of each variant up to `largest`, by bisection within token buckets.

    Within a bucket no variant comes back once another has taken its place: fitted costs see the
    bucket alone, and limits on rows, their mean or the plan's ids lie further apart.
    """
    first = {variant(1): 1}
    low = 1
    while low < largest:
        high = min(bucket(low + 1), largest)
        here = variant(low)
        if variant(high) == here:
            low = high
            continue
        same = low
        while high - same > 1:
            middle = (same + high) // 2
            if variant(middle) == here:
                same = middle
            else:
                high = middle
        low = high
        first.setdefault(variant(low), low)
    return sorted(first.values())


def warmup(
    shapes: MoEShape | Iterable[MoEShape],
    *,
    max_tokens: int = 8192,
    dtype: torch.dtype = torch.bfloat16,
    activation: Activation = SWIGLU,
    bias: bool = False,
    weights: ExpertWeights | None = None,
    topk_ids_dtype: torch.dtype = torch.int32,
    topk_weights_dtype: torch.dtype = torch.float32,
    expert_map: bool = False,
    apply_router_weight_on_input: bool = False,
    reduce: bool = True,
    batch_invariant: bool = False,
    config: LayerConfig | None = None,
    routing: bool = True,
    device: torch.device | str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[str]:
    """Compiles every kernel that calls with these options and up to `max_tokens` tokens can need.

    Nothing is run and no device memory is taken. Later calls with the same options compile nothing.

    Args:
        shapes: layers to prepare; with `expert_map`, `num_experts` counts this device's experts.
        max_tokens: the largest call to prepare for.
        dtype: of hidden states and weights.
        activation, bias: as the weights have them.
        weights: the real weights, if their strides differ from [gate; up] rows; memory is not read.
        topk_ids_dtype, topk_weights_dtype: as the router gives them.
        expert_map, apply_router_weight_on_input, reduce, batch_invariant, config: as the calls pass
            them.
        routing: prepare the default `route` too.
        device: the accelerator; the current one if None. Without one there is nothing to compile.
        progress: called with (done, total) after each step.

    Returns:
        Sorted unique "kernel:hash" of what was compiled or already there.

    Raises:
        TypeError: an argument of another type. ValueError: sizes or options that no call could
            have, or a `config` that this machine cannot run with up to `max_tokens` tokens.
    """
    shapes = _listed(shapes)
    _check(max_tokens, dtype, activation, config, device)
    check_dtype(topk_ids_dtype, "topk_ids_dtype", ID_DTYPES)
    check_dtype(topk_weights_dtype, "topk_weights_dtype", DTYPES)
    check_bools(
        bias=bias, expert_map=expert_map,
        apply_router_weight_on_input=apply_router_weight_on_input, reduce=reduce,
        batch_invariant=batch_invariant, routing=routing,
    )  # fmt: skip
    target = Target.probe(device)
    if target.backend == "cpu":
        return []
    if weights is not None:
        sizes = (weights.num_local_experts, weights.hidden_size, weights.intermediate_size)
        for shape in shapes:
            # A device may hold fewer experts than a token chooses: a shape then counts more.
            fits = (
                shape.num_experts >= weights.num_local_experts
                and (shape.hidden_size, shape.intermediate_size) == sizes[1:]
                and (shape.num_experts == weights.num_local_experts or shape.top_k > sizes[0])
            )
            if not fits or weights.is_gated is not activation.is_gated:
                raise ValueError(
                    f"weights of (experts, hidden, intermediate) {sizes} do not go with {shape} "
                    f"and activation {activation.kind!r}: warm up one layer at a time"
                )
    given = "" if config is None else config.to_json()
    jobs: list[tuple[MoEShape, ExpertWeights, int]] = []
    for shape in shapes:
        w = weights or meta_weights(shape, dtype, activation, bias)
        for tokens in representative_tokens(
            w, shape.top_k, max_tokens, batch_invariant, target, given
        ):
            jobs.append((shape, w, tokens))
    where = torch.device(device or "cuda")
    if where.index is None:
        where = torch.device("cuda", torch.cuda.current_device())
    keys: set[str] = set()
    for done, (shape, w, tokens) in enumerate(jobs):
        with launching.on_device(where), launching.compile_only() as compiled:
            _call(
                shape, w, tokens, target, activation, topk_ids_dtype, topk_weights_dtype,
                expert_map, apply_router_weight_on_input, reduce, batch_invariant, given,
            )  # fmt: skip
            if routing:
                logits = torch.empty((tokens, shape.num_experts), dtype=dtype, device="meta")
                out = torch.empty((tokens, shape.top_k), dtype=torch.float32, device="meta")
                route_into(
                    out, out.to(torch.int32), logits, shape.top_k, "softmax", True, None, 0, 0, 1.0
                )
        keys.update(f"{name}:{key}" for name, key in compiled)
        if progress is not None:
            progress(done + 1, len(jobs))
    return sorted(keys)


def _listed(shapes: Any) -> list[MoEShape]:
    """One layer or several, as a list. A string can be iterated over too, but is one name."""
    several = isinstance(shapes, Iterable) and not isinstance(shapes, str)
    listed = list(shapes) if several else [shapes]
    for shape in listed:
        if not isinstance(shape, MoEShape):
            name = repr(shape) if isinstance(shape, str) else "name"
            raise TypeError(
                f"warmup takes MoEShapes, got {shape!r}: tilewise.moe_shape({name}) makes one"
            )
    return listed


def _check(
    max_tokens: int,
    dtype: torch.dtype,
    activation: Activation,
    config: LayerConfig | None,
    device: torch.device | str | None,
) -> None:
    """Refuses what no call could have, on machines without an accelerator too."""
    check_tokens(max_tokens, 1, "max_tokens")
    check_dtype(dtype)
    check_activation(activation)
    check_config(config)
    try:
        kind = None if device is None else torch.device(device).type
    except RuntimeError as error:
        raise ValueError(
            f'device={device!r} is no device of torch: use "cuda", "cuda:N" or "cpu"'
        ) from error
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device={str(device)!r}: torch {torch.__version__} finds no GPU here")


def _call(
    shape: MoEShape,
    weights: ExpertWeights,
    tokens: int,
    target: Target,
    activation: Activation,
    ids_dtype: torch.dtype,
    weights_dtype: torch.dtype,
    expert_map: bool,
    on_input: bool,
    reduce: bool,
    batch_invariant: bool,
    config: str,
) -> None:
    def empty(*size: int, dtype: torch.dtype = weights.dtype) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, device="meta")

    hidden = empty(tokens, shape.hidden_size)
    ids = empty(tokens, shape.top_k, dtype=ids_dtype)
    problem = problem_of(
        hidden, weights.gate, weights.up, weights.down, ids, reduce, batch_invariant
    )
    sizes = buffer_sizes(problem, layer_config(config, problem, target), target)
    slots = () if reduce else (shape.top_k,)
    forward_into(
        empty(tokens, *slots, shape.hidden_size),
        empty(sum(sizes), dtype=torch.uint8),
        hidden,
        weights.gate,
        weights.up,
        weights.down,
        weights.gate_bias,
        weights.up_bias,
        weights.down_bias,
        empty(tokens, shape.top_k, dtype=weights_dtype),
        ids,
        activation,
        empty(shape.num_experts, dtype=torch.int32) if expert_map else None,
        on_input,
        reduce,
        batch_invariant,
        config,
        target,
    )
