"""The benchmark of the MoE layer: peers side by side in one run, paired and interleaved."""

import time

STARTED = time.monotonic()  # before torch is imported, which a run of a minute has to count
