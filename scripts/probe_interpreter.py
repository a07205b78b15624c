"""Fails where Triton's interpreter does not work with the installed NumPy: 3.6 with NumPy 2.4."""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"

import torch
import triton
import triton.language as tl


@triton.jit
def count_kernel(out_ptr, rounds):  # type: ignore[no-untyped-def]
    total = tl.load(out_ptr)
    for _ in tl.range(0, tl.load(out_ptr) + rounds):
        total += 1
    tl.store(out_ptr, total)


out = torch.zeros(1, dtype=torch.int32)
count_kernel[(1,)](out, 3)
assert out.item() == 3, out
