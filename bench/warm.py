"""Fills the kernel cache before anything is timed: compiling is serial in one process."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch

from bench import protocol
from bench.measure import Options, prepare
from bench.peers import base
from bench.protocol import SHAPES


def warm(options: Options) -> None:
    """Calls every peer once on every cell; errors are left to the measurement to report."""
    peers, _ = base.load(options.peers)
    for name in options.shapes:
        layers, _ = prepare(peers, *protocol.make_weights(SHAPES[name], device=options.device))
        for num_tokens in options.tokens:
            for routing in options.routings:
                sets, _ = protocol.build_sets(
                    routing, num_tokens, SHAPES[name], device=options.device
                )
                for layer in layers.values():
                    try:
                        layer(*sets[0])
                    except Exception as error:
                        print(name, num_tokens, routing, base.describe_error(error))
        torch.cuda.synchronize()


def in_parallel(options: Options, jobs: int) -> None:
    """Warms each shape in a process of its own, ``jobs`` at a time."""
    lists = {
        "--tokens": options.tokens,
        "--routings": options.routings,
        "--peers": [name for name in options.peers if base.original(name) == name],
    }
    command = [sys.executable, "-m", "bench", "--warm-only"]
    for option, values in lists.items():
        command += [option, *map(str, values)]
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(partial(_run, command), options.shapes))


def _run(command: list[str], shape: str) -> None:
    run = subprocess.run([*command, "--shapes", shape], capture_output=True, text=True)
    if run.returncode:
        print(f"warming {shape} failed: {run.stderr[-500:]}")
