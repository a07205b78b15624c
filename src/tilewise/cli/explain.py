"""`tilewise explain`: what a call would do and what it costs at least, on any machine."""

from __future__ import annotations

import typer

from ..target import CHIPS, Target, plain_name
from .shapes import HELP, parse_shape
from .tokens import parse_tokens

# Where there is no GPU and none is named.
DEFAULT_ARCH = "sm_90"


def explain(
    model: str = typer.Argument(help=HELP),
    tokens: str = typer.Option("64", help="Token counts: integers, with commas."),
    arch: str = typer.Option(
        "",
        "--target",
        "--arch",
        help=f'The machine: "sm_90", "h100", "gfx942", ... or "cpu"; the GPU here if empty, '
        f"{DEFAULT_ARCH} where there is none.",
    ),
    dtype: str = typer.Option("bf16", help='"bf16", "fp16" or "fp32".'),
    batch_invariant: bool = typer.Option(False, help="As calls with this option would run."),
) -> None:
    """Print path, tiles, bytes, FLOPs and floor of a call. Nothing runs; no GPU is needed."""
    import torch

    from ..moe.explain import explain as explanation

    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    if dtype not in dtypes:
        raise typer.BadParameter(f"{dtype!r} is not one of {', '.join(dtypes)}")
    counts = parse_tokens(tokens)
    try:
        shape = parse_shape(model)
        target = Target.from_arch(arch) if arch else Target.probe()
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    if target.backend != "cpu" and arch:
        modelled = CHIPS[target.arch][0]
        other = plain_name(arch) in CHIPS[target.arch][1:]  # Not the architecture, as "sm90".
        others = f", not of the {arch}" if other else ""
        typer.echo(f"{target.arch}: sizes and rates are those of the {modelled}{others}.")
    elif target.backend == "cpu" and not arch:
        target = Target.from_arch(DEFAULT_ARCH)
        typer.echo(
            "No GPU here: calls on this machine run plain torch and no kernel (--target cpu).\n"
            f"What follows is for another machine, {DEFAULT_ARCH}, with sizes and rates of the "
            f"{CHIPS[DEFAULT_ARCH][0]}.\nName yours with --target: h100, mi300x, gfx942, ..."
        )
    typer.echo(
        f"{model}: {shape.num_experts} experts, top {shape.top_k}, {shape.hidden_size} x "
        f"{shape.intermediate_size}, {dtype}"
    )
    for count in counts:
        typer.echo(f"\n{count} token{'s' if count > 1 else ''}")
        call = explanation(
            shape, count, dtype=dtypes[dtype], batch_invariant=batch_invariant, target=target
        )
        typer.echo(str(call))
