"""Builds the wheel, installs it apart from the sources and uses it from there."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

CHECK = """
import sys, torch, tilewise
assert tilewise.__file__.startswith(sys.argv[1]), tilewise.__file__
layer = tilewise.FusedMoE(tilewise.MoEShape(4, 2, 32, 16), dtype=torch.float32)
with torch.no_grad():
    assert layer(torch.randn(3, 32)).isfinite().all()
from tilewise.dispatch.table import shipped
assert shipped("sm_90") is not None, "no fitted costs in the wheel"
print("the installed wheel works: tilewise", tilewise.__version__)
"""


def main() -> None:
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    with tempfile.TemporaryDirectory() as folder:
        wheels, site = Path(folder, "wheels"), Path(folder, "site")
        subprocess.run([*pip, "wheel", str(ROOT), "--no-deps", "-w", str(wheels)], check=True)
        (wheel,) = wheels.glob("tilewise-*.whl")
        print("built", wheel.name, f"({wheel.stat().st_size / 1024:.0f} KiB)", flush=True)
        subprocess.run([*pip, "install", "--no-deps", "-t", str(site), str(wheel)], check=True)
        env = {**os.environ, "PYTHONPATH": str(site)}
        for arguments in (["-c", CHECK, str(site)], ["-m", "tilewise.cli", "--help"]):
            subprocess.run([sys.executable, *arguments], check=True, cwd=folder, env=env)
        assert (site / "bin" / "tilewise").exists(), "no console script"


if __name__ == "__main__":
    main()
