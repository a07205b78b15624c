"""`tilewise demo`: one model, generating with its own experts and with ours, token for token."""

from __future__ import annotations

import contextlib
import os
import platform
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import typer
from rich.console import Console
from rich.table import Table

# The model's own loop over experts, the default of transformers, and ours.
EXPERTS = ("eager", "grouped_mm", "tilewise")


@dataclass(frozen=True)
class Run:
    """What one experts implementation produced.

    Attributes:
        tokens: [batch, new_tokens], greedy.
        logits: fp32 [batch, new_tokens, vocabulary], those that the tokens were chosen from.
        forced: fp32 [batch, length, vocabulary], of one pass over one fixed text.
        seconds: of generating once more.
    """

    tokens: torch.Tensor
    logits: torch.Tensor
    forced: torch.Tensor
    seconds: float


def demo(
    tokens: int = typer.Option(48, min=1, help="New tokens per sequence."),
    batch: int = typer.Option(4, min=1, help="Sequences."),
    seed: int = typer.Option(0, help="Of the weights and the prompts."),
    device: str = typer.Option("", help='"cpu" or "cuda"; the GPU if there is one.'),
) -> None:
    """Generate with a random Mixture-of-Experts model, with and without Tilewise, and compare.

    Exits with 1 unless every token is the same. Nothing is downloaded.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    console = Console(width=None if sys.stdout.isatty() else 110)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cpu":
        # The model is too small for more, and on a busy machine threads wait for each other.
        torch.set_num_threads(1)
    with _step(console, f"Building a Qwen3-MoE model with random weights on {device}"):
        model = build_model(device, seed)
        generator = torch.Generator().manual_seed(seed)
        prompts = torch.randint(model.config.vocab_size, (batch, 16), generator=generator)
        prompts = prompts.to(device)

    runs: dict[str, Run] = {}
    for name in EXPERTS:
        with _step(console, f"Generating {batch} x {tokens} tokens with {name}, fp32"):
            runs[name] = run(model, name, prompts, tokens)
    console.print(_summary(model, runs, device))
    failed = not _same_tokens(console, runs["eager"], runs["tilewise"])
    if device != "cpu":
        failed |= not _half_precision(console, model, runs["eager"], prompts, tokens)
    if failed:
        raise typer.Exit(1)
    console.print("[green]Every token is the same with Tilewise as with the model's own code.")


def build_model(device: str, seed: int = 0) -> Any:
    """A Qwen3-MoE model with random weights: small on a CPU, layers of Qwen3-30B-A3B on a GPU."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    if device == "cpu":
        config = Qwen3MoeConfig(
            vocab_size=4096, hidden_size=256, num_hidden_layers=4, num_attention_heads=4,
            num_key_value_heads=2, head_dim=64, num_experts=32, num_experts_per_tok=4,
            moe_intermediate_size=128, norm_topk_prob=True,
        )  # fmt: skip
    else:
        config = Qwen3MoeConfig(
            vocab_size=32768, hidden_size=2048, num_hidden_layers=2, num_attention_heads=32,
            num_key_value_heads=4, head_dim=128, num_experts=128, num_experts_per_tok=8,
            moe_intermediate_size=768, norm_topk_prob=True,
        )  # fmt: skip
    torch.manual_seed(seed)
    with torch.device(device):
        model = Qwen3MoeForCausalLM._from_config(config, dtype=torch.float32)
    # The usual tiny deviation makes experts nearly silent and all logits alike: a test of nothing.
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    model.generation_config.eos_token_id = None
    # bf16 holds these weights exactly, so fp32 is the reference for bf16 too.
    return model.to(torch.bfloat16).float().eval()


@torch.inference_mode()
def run(model: Any, experts: str, prompts: torch.Tensor, new_tokens: int) -> Run:
    """Generates greedily with one experts implementation, then once more for the clock."""
    from ..integrations.transformers import use_tilewise

    if experts == "tilewise":
        use_tilewise(model)
    else:
        model.set_experts_implementation(experts)
    options = {"do_sample": False, "max_new_tokens": new_tokens, "pad_token_id": 0}
    mask = torch.ones_like(prompts)
    out = model.generate(
        prompts, attention_mask=mask, output_logits=True, return_dict_in_generate=True, **options
    )
    _wait(prompts.device)
    start = time.perf_counter()
    model.generate(prompts, attention_mask=mask, **options)
    _wait(prompts.device)
    seconds = time.perf_counter() - start
    return Run(
        out.sequences[:, prompts.shape[1] :],
        torch.stack(out.logits, dim=1).float(),
        model(prompts, attention_mask=mask).logits.float(),
        seconds,
    )


def _same_tokens(console: Console, theirs: Run, ours: Run) -> bool:
    """Whether all tokens are equal; says where they part, and by what margin they were chosen."""
    different = (theirs.tokens != ours.tokens).nonzero()
    if len(different) == 0:
        return True
    sequence, position = (int(i) for i in different[different[:, 1].argmin()])
    top = theirs.logits[sequence, position].topk(2).values
    error = (theirs.logits - ours.logits)[sequence, position].abs().max()
    console.print(
        f"[red]Tokens differ first at sequence {sequence}, position {position}: "
        f"{int(theirs.tokens[sequence, position])} with the model's own code, "
        f"{int(ours.tokens[sequence, position])} with Tilewise. The two best logits there are "
        f"{float(top[0] - top[1]):.2e} apart, and ours are off by up to {float(error):.2e}."
    )
    return False


def _half_precision(
    console: Console, model: Any, exact: Run, prompts: torch.Tensor, new_tokens: int
) -> bool:
    """bf16, as models are served: our logits must be as close to fp32 as the model's own."""
    model.to(torch.bfloat16)
    runs: dict[str, Run] = {}
    for name in EXPERTS:
        with _step(console, f"The same model with {name}, bf16"):
            runs[name] = run(model, name, prompts, new_tokens)
    eager = runs["eager"]
    errors = {name: _error(run, exact) for name, run in runs.items()}
    table = Table(title="bf16", title_justify="left")
    for column in ("experts", "tokens as eager's", "logits off fp32 by", "tokens/s"):
        table.add_column(column, justify="left" if column == "experts" else "right")
    for name, result in runs.items():
        equal = int((result.tokens == eager.tokens).sum())
        total = result.tokens.numel()
        speed = f"{total / result.seconds:,.0f}"
        table.add_row(name, f"{equal}/{total}", f"{errors[name]:.2e}", speed)
    console.print(table)
    console.print("Two correct bf16 computations may round to different tokens; errors decide.")
    if errors["tilewise"] <= 1.5 * errors["eager"]:
        return True
    console.print("[red]Tilewise's error is more than 1.5 times that of the model's own code.")
    return False


def _error(result: Run, exact: Run) -> float:
    """Root mean square of the logits' errors in one pass over the same prompts."""
    return float((result.forced - exact.forced).square().mean().sqrt())


def _summary(model: Any, runs: dict[str, Run], device: str) -> Table:
    config, eager = model.config, runs["eager"]
    top = eager.logits.topk(2).values
    table = Table(
        title=f"Qwen3-MoE, {config.num_hidden_layers} layers, {config.num_experts} experts, "
        f"top {config.num_experts_per_tok}, {config.hidden_size} x "
        f"{config.moe_intermediate_size}, fp32",
        caption=f"Logits have a deviation of {float(eager.logits.std()):.2f}; a token's two best "
        f"are at least {float((top[..., 0] - top[..., 1]).min()):.1e} apart.\n"
        f"{_hardware(device)}\n{_versions()}",
        title_justify="left",
        caption_justify="left",
    )
    table.add_column("experts")
    for column in ("tokens as eager's", "logits off by", "seconds", "tokens/s"):
        table.add_column(column, justify="right")
    for name, result in runs.items():
        equal, total = int((result.tokens == eager.tokens).sum()), result.tokens.numel()
        difference = float((result.logits - eager.logits).abs().max())
        table.add_row(
            name,
            f"{equal}/{total}",
            "" if name == "eager" else f"{difference:.1e}",
            f"{result.seconds:.2f}",
            f"{total / result.seconds:,.0f}",
        )
    return table


def _hardware(device: str) -> str:
    if device != "cpu":
        return str(torch.cuda.get_device_name())
    return f"{platform.machine()} CPU, one thread: the times say nothing about a GPU"


def _versions() -> str:
    import transformers
    import triton

    from .. import __version__

    return (
        f"tilewise {__version__} · torch {torch.__version__} · triton {triton.__version__} · "
        f"transformers {transformers.__version__} · Python {platform.python_version()}"
    )


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextlib.contextmanager
def _step(console: Console, text: str) -> Iterator[None]:
    """A spinner on a terminal, a line with the time it took everywhere."""
    start = time.perf_counter()
    with console.status(text + " ..."):
        yield
    console.print(f"{text} [dim]({time.perf_counter() - start:.1f} s)", highlight=False)
