"""A layer from tensors you already have: any layout, without copies, and what a call costs."""

from __future__ import annotations

import torch

import tilewise


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    experts, top_k, hidden, inter, tokens = 16, 4, 256, 128, 32

    # As vLLM and transformers keep them: gate rows above up rows.
    gate_up = torch.randn(experts, 2 * inter, hidden, dtype=dtype, device=device) / hidden**0.5
    down = torch.randn(experts, hidden, inter, dtype=dtype, device=device) / inter**0.5
    weights = tilewise.ExpertWeights.from_gate_up(gate_up, down)

    # The same experts as gpt-oss would store them: transposed, gate and up columns alternating.
    columns = torch.stack([weights.gate, weights.up], dim=2).flatten(1, 2).mT.contiguous()
    alternating = tilewise.ExpertWeights.from_gate_up(
        columns, down.mT.contiguous(), layout="interleaved", transposed=True
    )
    assert alternating.up.data_ptr() == columns.data_ptr() + columns.element_size(), "a view"

    x = torch.randn(tokens, hidden, dtype=dtype, device=device)
    logits = torch.randn(tokens, experts, device=device)
    with torch.inference_mode():
        topk_weights, topk_ids = tilewise.route(logits, top_k)
        output = tilewise.fused_experts(x, weights, topk_weights, topk_ids)
        same = tilewise.fused_experts(x, alternating, topk_weights, topk_ids)
    print(f"output {list(output.shape)} {output.dtype} on {device}")
    print(f"largest difference between the two layouts: {(output - same).abs().max():.1e}")

    # What a call does and costs at least, on this machine or on one that is not here.
    h100 = tilewise.Target.from_arch("sm_90")
    shape = tilewise.moe_shape("qwen3-30b-a3b")
    print(f"\nOne layer of Qwen3-30B-A3B, {tokens} tokens, on {h100.arch}:")
    print(tilewise.explain(shape, tokens, target=h100))
    print(f"scratch      {tilewise.workspace_size(shape, tokens, target=h100):,} bytes")


if __name__ == "__main__":
    main()
