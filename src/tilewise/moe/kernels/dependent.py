"""Starting a kernel while the one before it still runs (CUDA's programmatic dependent launch).

A kernel launched so may do anything that does not depend on the kernel before it, then waits until that
has ended and its stores are visible. Every program waits, so that the end of a kernel means the end of
all before it. That needs the kernel before to be ours, or launched the ordinary way: a host thread that
puts its own dependent kernels between ours on one stream must wait in all their programs too.

OVERLAP is `launch.Overlap`: 0 never, 1 early, 2 late.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def wait_for_previous(OVERLAP: tl.constexpr):
    """Until the kernel before has ended."""
    if OVERLAP > 0:
        gdc_wait()


@triton.jit
def launch_early(OVERLAP: tl.constexpr):
    """At the beginning: lets the next kernel start once all programs have begun or ended."""
    if OVERLAP == 1:
        gdc_launch_dependents()


@triton.jit
def launch_late(OVERLAP: tl.constexpr):
    """At the end: lets the next kernel start once all programs have stored what they had to."""
    if OVERLAP == 2:
        gdc_launch_dependents()
