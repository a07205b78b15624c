"""How models choose experts: softmax, sigmoid with groups, ids to skip, experts elsewhere."""

from __future__ import annotations

import torch

import tilewise


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokens, experts, hidden, inter = 8, 16, 64, 32
    torch.manual_seed(0)
    logits = torch.randn(tokens, experts, device=device)
    routings = {
        "Qwen3: softmax over all, renormalised": tilewise.route(logits, 4),
        "Mixtral: softmax over the chosen": tilewise.route(logits, 2, scoring_func="topk_softmax"),
        "DeepSeek-V3: sigmoid, a bias for choosing, 2 of 4 groups": tilewise.route(
            logits,
            4,
            scoring_func="sigmoid",
            e_score_correction_bias=torch.randn(experts, device=device) / 10,
            num_expert_group=4,
            topk_group=2,
            routed_scaling_factor=2.5,
        ),
    }

    weights = tilewise.ExpertWeights.from_gate_up(
        torch.randn(experts, 2 * inter, hidden, device=device) / hidden**0.5,
        torch.randn(experts, hidden, inter, device=device) / inter**0.5,
    )
    x = torch.randn(tokens, hidden, device=device)
    with torch.inference_mode():
        for name, (topk_weights, topk_ids) in routings.items():
            output = tilewise.fused_experts(x, weights, topk_weights, topk_ids)
            print(f"{name}: token 0 goes to {topk_ids[0].tolist()}, |output| {output.norm():.2f}")

        # -1 (or an id past the last expert) skips an assignment: a padding row costs nothing.
        topk_weights, topk_ids = routings["Qwen3: softmax over all, renormalised"]
        padded = topk_ids.clone()
        padded[-1] = -1
        output = tilewise.fused_experts(x, weights, topk_weights, padded)
        print(f"a token without experts: |output| {output[-1].norm():.2f}")

        # Two devices with half of the experts each: ids stay global, their sum is the layer.
        expected = tilewise.fused_experts(x, weights, topk_weights, topk_ids)
        total = torch.zeros_like(expected)
        for first in (0, experts // 2):
            local = slice(first, first + experts // 2)
            here = tilewise.ExpertWeights(
                weights.gate[local], weights.up[local], weights.down[local]
            )
            expert_map = torch.full((experts,), -1, dtype=torch.int32, device=device)
            expert_map[local] = torch.arange(experts // 2, dtype=torch.int32, device=device)
            total += tilewise.fused_experts(x, here, topk_weights, topk_ids, expert_map=expert_map)
        print(f"two halves against the whole: {(total - expected).abs().max():.1e}")
        torch.testing.assert_close(total, expected, rtol=1e-4, atol=1e-4)


if __name__ == "__main__":
    main()
