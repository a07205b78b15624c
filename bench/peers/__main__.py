"""``python -m bench.peers unpack [FOLDER]`` and ``python -m bench.peers check [NAME ...]``."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from functools import partial
from pathlib import Path

import torch

from bench import protocol
from bench.accuracy import make_reference
from bench.peers import archive, base

TRIAL = protocol.Shape(8, 2, 512, 256)


def check(names: list[str]) -> bool:
    """Loads each peer and, where there is a GPU, captures a small layer and checks its numbers."""
    good = True
    for name in names:
        peers, missing = base.load([name])
        if missing:
            print(f"{name}: {missing[name]}", flush=True)
            good = False
            continue
        try:
            outcome = _try(peers[name]) if torch.cuda.is_available() else "loads; no GPU to try it"
        except Exception:
            outcome = f"FAILED\n{traceback.format_exc()}"
        good &= not outcome.startswith("FAILED")
        print(f"{name}: {outcome} ({peers[name].version}) {peers[name].notes or ''}", flush=True)
    return good


def _try(peer: base.Peer) -> str:
    w13, w2 = protocol.make_weights(TRIAL)
    layer = peer.prepare(w13, w2)
    errors = []
    for num_tokens in (tokens for tokens in (1, 33, 1024) if tokens <= peer.max_tokens):
        (inputs, *_), _ = protocol.build_sets("zipf", num_tokens, TRIAL)
        captured = protocol.capture([partial(layer, *inputs)])
        reference = make_reference(*inputs, w13, w2)
        errors.append((reference.error(captured.outputs[0]), reference.err_bf16))
    right = all(err <= 2 * plain for err, plain in errors)
    texts = ", ".join(f"{err:.4f} (bf16 torch {plain:.4f})" for err, plain in errors)
    return f"{'ok' if right else 'FAILED'}, errors {texts}"


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.peers", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    unpack = commands.add_parser("unpack", help="restore .peers; prints the folder")
    folder = os.environ.get("TILEWISE_PEERS") or archive.default_folder()
    unpack.add_argument("folder", type=Path, nargs="?", default=Path(folder))
    checks = commands.add_parser("check", help="say for each peer: ok, or the exact error")
    checks.add_argument("names", nargs="*")
    options = parser.parse_args()
    if options.command == "unpack":
        archive.unpack(options.folder)
        print(options.folder)
    elif not check(options.names or [n for n in base.LOADERS if n != "tilewise_invariant"]):
        sys.exit(1)


if __name__ == "__main__":
    main()
