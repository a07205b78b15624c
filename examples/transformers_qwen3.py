"""A Qwen3-MoE model of transformers on Tilewise: switched with one call, nothing else changes.

python examples/transformers_qwen3.py                          # a tiny model with random weights
python examples/transformers_qwen3.py Qwen/Qwen3-30B-A3B       # the real one, from its hub
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3MoeConfig

from tilewise.integrations.transformers import use_tilewise


def random_model() -> Any:
    config = Qwen3MoeConfig(
        vocab_size=512, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, num_experts=8, num_experts_per_tok=2,
        moe_intermediate_size=32,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config)


def main(name: str | None = None) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if name is None:
        model = random_model().to(device)
        prompt = torch.randint(512, (1, 8), device=device)
    else:
        model = AutoModelForCausalLM.from_pretrained(name, dtype="auto").to(device)
        tokenizer = AutoTokenizer.from_pretrained(name)
        prompt = tokenizer("A sparse model is", return_tensors="pt").input_ids.to(device)

    options = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 16, "do_sample": False}
    model.set_experts_implementation("eager")
    before = model.generate(prompt, **options)
    use_tilewise(model)
    after = model.generate(prompt, **options)

    print("experts:", model.config._experts_implementation)
    print("the same tokens:", torch.equal(before, after))
    print(after[0].tolist() if name is None else tokenizer.decode(after[0]))


if __name__ == "__main__":
    main(*sys.argv[1:2])
