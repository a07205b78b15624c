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

from .device import checked_device

# The model's own loop over experts, torch's grouped product as transformers uses it, and ours.
EXPERTS = ("eager", "grouped_mm", "tilewise")


@dataclass(frozen=True)
class Run:
    """What one experts implementation produced.

    Attributes:
        text: [batch, prompt + new_tokens], generated greedily.
        tokens: [batch, new_tokens], the new ones.
        logits: fp32 [batch, new_tokens, vocabulary], teacher-forced: of one pass over the first
            run's text, with its choice of experts, so that they compare where tokens differ.
        routing: weights and ids of that choice, by layer.
        seconds: of generating once more.
    """

    text: torch.Tensor
    tokens: torch.Tensor
    logits: torch.Tensor
    routing: list[tuple[torch.Tensor, torch.Tensor]]
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
    device = checked_device(device)
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
            runs[name] = run(model, name, prompts, tokens, runs.get("eager"))
    console.print(_summary(model, runs))
    console.print(_notes(runs["eager"], device), style="dim", highlight=False)
    failed = not _same_tokens(console, runs["eager"], runs["tilewise"])
    if device != "cpu":
        failed |= not _half_precision(console, model, runs["eager"], prompts, tokens)
    if failed:
        raise typer.Exit(1)
    console.print(
        "[green]In fp32, every token is the same with Tilewise as with the model's own code."
    )


def build_model(device: str, seed: int = 0) -> Any:
    """A Qwen3-MoE model with random weights: small on a CPU, layers of Qwen3-30B-A3B on a GPU.

    In fp32, four of those layers take 10 GB; a GPU with less free memory gets one.
    """
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    if device == "cpu":
        config = Qwen3MoeConfig(
            vocab_size=4096, hidden_size=256, num_hidden_layers=4, num_attention_heads=4,
            num_key_value_heads=2, head_dim=64, num_experts=32, num_experts_per_tok=4,
            moe_intermediate_size=128, norm_topk_prob=True,
        )  # fmt: skip
    else:
        roomy = torch.cuda.mem_get_info(device)[0] > 16e9
        config = Qwen3MoeConfig(
            vocab_size=4096, hidden_size=2048, num_hidden_layers=4 if roomy else 1,
            num_attention_heads=32, num_key_value_heads=4, head_dim=128, num_experts=128,
            num_experts_per_tok=8, moe_intermediate_size=768, norm_topk_prob=True,
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
def run(model: Any, experts: str, prompts: torch.Tensor, new_tokens: int, first: Run | None) -> Run:
    """Generates greedily with one experts implementation, then once more for the clock.

    Args:
        first: the run whose text and routing the logits are of; None for this run's own.
    """
    from ..integrations.transformers import use_tilewise

    if experts == "tilewise":
        use_tilewise(model)
    else:
        model.set_experts_implementation(experts)
    options = {
        "attention_mask": torch.ones_like(prompts),
        "do_sample": False,
        "max_new_tokens": new_tokens,
        "pad_token_id": 0,
    }
    text = model.generate(prompts, **options)
    _wait(prompts.device)
    start = time.perf_counter()
    model.generate(prompts, **options)
    _wait(prompts.device)
    seconds = time.perf_counter() - start
    length, routing = prompts.shape[1], [] if first is None else first.routing
    with _routed(model, routing):
        logits = model(text if first is None else first.text).logits[:, length - 1 : -1].float()
    return Run(text, text[:, length:], logits, routing, seconds)


@contextlib.contextmanager
def _routed(model: Any, routing: list[tuple[torch.Tensor, torch.Tensor]]) -> Iterator[None]:
    """Within, one pass of the model records its routing if there is none, else follows it.

    Rounding may send a token to another expert, and one such choice outweighs every other error.
    """
    replayed = iter(list(routing))
    record = not routing

    def hook(_module: Any, _inputs: Any, output: Any) -> Any:
        logits, weights, ids = output
        if record:
            routing.append((weights, ids))
            return output
        weights, ids = next(replayed)
        return logits, weights.to(output[1].dtype), ids

    handles = [layer.mlp.gate.register_forward_hook(hook) for layer in model.model.layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


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
    """Whether bf16, as models are served, is as close to fp32 with Tilewise as without.

    Two correct bf16 computations may choose different tokens where the two best logits are closer
    than rounding. Where they are further apart, our choice must be that of fp32.
    """
    model.to(torch.bfloat16)
    runs: dict[str, Run] = {}
    for name in EXPERTS:
        with _step(console, f"The same model with {name}, bf16"):
            runs[name] = run(model, name, prompts, new_tokens, exact)
    errors = {
        name: float((r.logits - exact.logits).square().mean().sqrt()) for name, r in runs.items()
    }
    table = Table(title="bf16", title_justify="left")
    for column in ("experts", "tokens as eager's", "logits off fp32 by", "seconds", "tokens/s"):
        table.add_column(column, justify="left" if column == "experts" else "right")
    for name, result in runs.items():
        cells = _cells(result, runs["eager"], f"{errors[name]:.1e}")
        table.add_row(name, *cells)
    console.print(table)

    rounding = 2 * float((runs["eager"].logits - exact.logits).abs().max())
    best = exact.logits.topk(2).values
    margin = best[..., 0] - best[..., 1]
    wrong = runs["tilewise"].logits.argmax(-1) != exact.logits.argmax(-1)
    decided = margin > rounding
    bad = (wrong & decided).nonzero()
    if len(bad):
        sequence, position = (int(i) for i in bad[0])
        console.print(
            f"[red]After the same text, Tilewise chooses another token at sequence {sequence}, "
            f"position {position}, where the two best logits are "
            f"{float(margin[sequence, position]):.2e} apart: more than rounding explains "
            f"({rounding:.2e})."
        )
        return False
    if errors["tilewise"] > 1.5 * errors["eager"]:
        console.print("[red]Tilewise's error is more than 1.5 times that of the model's own code.")
        return False
    console.print(
        f"After the same text, {int(decided.sum())} of {decided.numel()} tokens are chosen by a "
        f"larger margin than bf16 may round away: with Tilewise, fp32's choice in each of them.\n"
        f"Of the others, {int(wrong.sum())} differ; generated texts part for good where one does."
    )
    return True


def _cells(result: Run, eager: Run, error: str) -> tuple[str, ...]:
    """The columns of a run but its name."""
    equal, total = int((result.tokens == eager.tokens).sum()), result.tokens.numel()
    speed = f"{total / result.seconds:,.0f}"
    return f"{equal}/{total}", error, f"{result.seconds:.2f}", speed


def _summary(model: Any, runs: dict[str, Run]) -> Table:
    config, eager = model.config, runs["eager"]
    table = Table(
        title=f"Qwen3-MoE, {config.num_hidden_layers} layers, {config.num_experts} experts, "
        f"top {config.num_experts_per_tok}, {config.hidden_size} x "
        f"{config.moe_intermediate_size}, fp32",
        title_justify="left",
    )
    table.add_column("experts")
    for column in ("tokens as eager's", "logits off by", "seconds", "tokens/s"):
        table.add_column(column, justify="right")
    for name, result in runs.items():
        difference = float((result.logits - eager.logits).abs().max())
        error = "" if name == "eager" else f"{difference:.1e}"
        table.add_row(name, *_cells(result, eager, error))
    return table


def _notes(eager: Run, device: str) -> str:
    best = eager.logits.topk(2).values
    deviation, margin = float(eager.logits.std()), float((best[..., 0] - best[..., 1]).min())
    return (
        f"Logits are of eager's text and routing. They have a deviation of {deviation:.2f};\n"
        f"the two best for a token are at least {margin:.1e} apart.\n"
        f"{_hardware(device)}\n{_versions()}"
    )


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
