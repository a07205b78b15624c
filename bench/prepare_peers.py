"""Gathers the peers where there is a network, for a GPU machine that has none.

Downloads the wheels with pip for that machine's Python, keeps what a fused MoE layer needs, drops
the device code of other GPUs, and packs the rest into ``.peers/*.tar.xz.part*``.

Command: ``python -m bench.prepare_peers base`` and, each to be carried on its own, ``sonic``,
``deepgemm`` and ``tritonmoe``.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bench import fatbin
from bench.peers import archive

PYTHON_VERSION = "3.12"
ARCH = 90
GPU_NAME = "NVIDIA_H200"
GLIBC_MINORS = (39, 35, 34, 31, 28, 27, 24, 17)


@dataclass(frozen=True)
class Wheel:
    """One wheel and what to keep of it: ``place`` maps its paths to paths in the archive."""

    requirement: str
    place: Callable[[str], str | None] = lambda path: path


@dataclass(frozen=True)
class Checkout:
    """One commit of a git repository and what to keep of it, for what has no wheel."""

    url: str
    commit: str
    place: Callable[[str], str | None]

    @property
    def requirement(self) -> str:
        """What the archive's manifest says."""
        return f"{self.url}@{self.commit}"


def _place_vllm(path: str) -> str | None:
    """Keeps Python, this GPU's tuned configurations and the two extensions with the MoE ops."""
    if path.startswith("vllm/third_party/triton_kernels/"):
        return path.removeprefix("vllm/third_party/")
    if re.match(r"vllm/(third_party/\w+|vllm_flash_attn|benchmarks)/", path):
        return None
    extension = re.fullmatch(r"vllm/_(moe_)?C_stable_libtorch\.abi3\.so", path)
    tuned = "/fused_moe/configs/" in path and GPU_NAME in path
    return path if extension or tuned or path.endswith((".py", "dist-info/METADATA")) else None


def _place_deep_gemm(path: str) -> str | None:
    """Keeps DeepGEMM for this Python: its sources are compiled where it runs."""
    extension = path.endswith(".so") and f"cpython-{PYTHON_VERSION.replace('.', '')}-" not in path
    folder = "vllm/third_party/"
    kept = path.startswith(f"{folder}deep_gemm/") and not extension
    return path.removeprefix(folder) if kept else None


def _place_cuda_headers(path: str) -> str | None:
    """Keeps the headers that NVRTC needs, for a machine without nvcc."""
    folder, _, header = path.partition("/include/")
    kept = folder == "nvidia/cu13" and not header.startswith(("cccl/cub", "cccl/thrust"))
    return f"{archive.CUDA_HEADERS}/include/{header}" if kept else None


def _place_tritonmoe(path: str) -> str | None:
    """Keeps the MoE kernels, in a folder of their own: another package has the same name."""
    return f"{archive.TRITONMOE}/{path}" if path.startswith("triton_kernels/moe/") else None


def _place_tvm_ffi(path: str) -> str | None:
    return None if "/3rdparty/" in path else path


ARCHIVES: dict[str, tuple[Wheel | Checkout, ...]] = {
    "base": (
        Wheel("vllm==0.24.0", _place_vllm),
        Wheel("pydantic==2.14.3"),
        Wheel("pydantic-core==2.50.4"),
        Wheel("annotated-types==0.8.0"),
        Wheel("typing-inspection==0.4.5"),
    ),
    "sonic": (
        Wheel("sonic-moe==0.1.2"),
        Wheel("quack-kernels==0.5.0"),
        Wheel("nvidia-cutlass-dsl==4.5.2"),
        Wheel("nvidia-cutlass-dsl-libs-base==4.5.2"),
        Wheel("apache-tvm-ffi==0.1.9", _place_tvm_ffi),
        Wheel("torch-c-dlpack-ext==0.1.5"),
    ),
    "deepgemm": (
        Wheel("vllm==0.24.0", _place_deep_gemm),
        # CUDA 13.0's, as torch 2.11 has it.
        Wheel("nvidia-cuda-runtime==13.0.96", _place_cuda_headers),
        Wheel("nvidia-cuda-cccl==13.0.85", _place_cuda_headers),
        Wheel("nvidia-cuda-crt==13.0.88", _place_cuda_headers),
    ),
    "tritonmoe": (
        Checkout(
            "https://github.com/bassrehab/triton-kernels",
            "7f19abd04e526076e2917defa67e6a67cb04c629",
            _place_tritonmoe,
        ),
    ),
}


def prepare(name: str, sources: tuple[Wheel | Checkout, ...], downloads: Path) -> list[Path]:
    """Downloads, prunes and packs one archive; returns its parts."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for source in sources:
            fetch = _download if isinstance(source, Wheel) else _clone
            _extract(fetch(source.requirement, downloads), source.place, folder)
        for library in folder.rglob("*.so"):
            _shrink(library)
        manifest = {"archive": name, "wheels": [source.requirement for source in sources]}
        (folder / f"{name}.manifest.json").write_text(json.dumps(manifest, indent=1))
        return archive.pack(folder, name)


def _download(requirement: str, downloads: Path) -> Path:
    name, _, version = requirement.partition("==")
    pattern = f"{name.replace('-', '_')}-{version}-*.whl"
    if not any(downloads.glob(pattern)):
        platforms = [f"--platform=manylinux_2_{minor}_x86_64" for minor in GLIBC_MINORS]
        command = [
            *(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"),
            *("--only-binary=:all:", f"--python-version={PYTHON_VERSION}", "--implementation=cp"),
            *(*platforms, "--platform=manylinux2014_x86_64", "--platform=manylinux1_x86_64"),
            *("--dest", str(downloads), requirement),
        ]
        subprocess.run(command, check=True)
    return next(downloads.glob(pattern))


def _clone(requirement: str, downloads: Path) -> Path:
    """Returns a zip of one commit; git's ``url.<base>.insteadOf`` names a mirror."""
    url, _, commit = requirement.rpartition("@")
    clone = downloads / f"{url.rpartition('/')[2]}.git"
    if not clone.exists():
        subprocess.run(["git", "clone", "--quiet", "--bare", url, str(clone)], check=True)
    contents = downloads / f"{clone.stem}-{commit}.zip"
    command = ["git", "-C", str(clone), "archive", "--format=zip", "--output", str(contents)]
    subprocess.run([*command, commit], check=True)
    return contents


def _extract(wheel: Path, place: Callable[[str], str | None], folder: Path) -> None:
    with zipfile.ZipFile(wheel) as contents:
        for path in contents.namelist():
            target = None if path.endswith("/") else place(path)
            if target is None:
                continue
            (folder / target).parent.mkdir(parents=True, exist_ok=True)
            (folder / target).write_bytes(contents.read(path))


def _shrink(library: Path) -> None:
    """Keeps the device code of ``ARCH`` and drops the symbols that only a debugger reads."""
    library.write_bytes(fatbin.prune(library.read_bytes(), ARCH)[0])
    if shutil.which("strip"):
        subprocess.run(["strip", "--strip-unneeded", str(library)], check=True)


def main() -> None:
    """Prepares the archives named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("archives", nargs="+", choices=ARCHIVES)
    downloads = Path(tempfile.gettempdir()) / "tilewise-wheels"
    parser.add_argument("--downloads", type=Path, default=downloads)
    options = parser.parse_args()
    options.downloads.mkdir(parents=True, exist_ok=True)
    for name in options.archives:
        for part in prepare(name, ARCHIVES[name], options.downloads):
            print(f"{part}  {part.stat().st_size / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
