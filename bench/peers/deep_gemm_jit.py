"""Makes DeepGEMM's run-time compiler work: the machine's nvcc, or NVRTC where it has none."""

from __future__ import annotations

import ctypes
import os
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

from bench.peers.archive import CUDA_HEADERS


def prepare() -> str:
    """Chooses the compiler, before ``deep_gemm`` is imported; ``DG_JIT_USE_NVRTC`` wins if set.

    Returns:
        The compiler, in words.

    Raises:
        ImportError: Neither nvcc nor unpacked headers are there.
    """
    preload()
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    wanted = os.environ.setdefault("DG_JIT_USE_NVRTC", "0" if nvcc else "1")
    if wanted == "0":
        return f"nvcc: {nvcc}"
    os.environ["CUDA_HOME"] = cuda_home(headers())
    return "NVRTC"


def headers() -> Path:
    """Returns the folder of CUDA's headers in the unpacked archive."""
    for entry in sys.path:
        folder = Path(entry) / CUDA_HEADERS / "include"
        if folder.is_dir():
            return folder
    raise ImportError("no nvcc, and no CUDA headers: python -m bench.prepare_peers deepgemm")


def cuda_home(include: Path) -> str:
    """Returns a ``CUDA_HOME`` that carries options for NVRTC as well.

    DeepGEMM gives NVRTC ``-I$CUDA_HOME/include`` and splits its options at blanks. The headers of
    CUDA 13 need one more folder, and those of the kernels one more file, which nvcc adds itself.
    """
    more = f"-I{include}/cccl --pre-include=cuda_device_runtime_api.h"
    return f"{include} {more} -I{include.parent}"  # and DeepGEMM's "/include" ends it


def preload() -> None:
    """Loads NVRTC from torch's CUDA packages, which the dynamic linker does not search."""
    spec = find_spec("nvidia")
    for folder in spec.submodule_search_locations or () if spec else ():
        # The builtins too: NVRTC opens them by name alone.
        for pattern in ("*/lib/libnvrtc-builtins.so.*", "*/lib/libnvrtc.so.*"):
            for library in sorted(Path(folder).glob(pattern)):
                ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
