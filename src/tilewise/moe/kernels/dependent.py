"""Starting a kernel while the one before it still runs (CUDA's programmatic dependent launch).

A kernel launched so may do anything that does not depend on the kernel before it, then waits until that
has ended and its stores are visible. Every program waits, so that the end of a kernel means the end of
all before it. That needs the kernel before to be ours, or launched the ordinary way: a host thread that
puts its own dependent kernels between ours on one stream must wait in all their programs too.
"""

import triton
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def wait_for_previous():
    gdc_wait()


@triton.jit
def launch_dependents():
    """Lets the next kernel start once all programs have said so or ended."""
    gdc_launch_dependents()
