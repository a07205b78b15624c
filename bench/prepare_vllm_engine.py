"""Gathers vLLM's engine where there is a network, for a GPU machine that has none.

Downloads vLLM and what it needs beyond that machine's image with pip, drops the device code of
other GPUs, and packs the rest into ``.peers/vllm.tar.xz.part*``, small enough to be carried.

Command: ``python -m bench.prepare_vllm_engine``; there, ``bench/vllm_engine.py`` unpacks it.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
import zipfile
from pathlib import Path

from bench import fatbin
from bench.peers import archive
from bench.prepare_peers import ARCH, _download

VLLM = "vllm==0.24.0"
# What the image of the GPU machine lacks. The FFI is newer than vLLM asks for: xgrammar needs it.
_LACKING = """
annotated-types==0.8.0 apache-tvm-ffi==0.1.15.post2 astor==0.8.1 blake3==1.0.11 cachetools==8.0.0
cbor2==6.2.1 compressed-tensors==0.17.0 depyf==0.20.0 dill==0.4.1 diskcache==5.6.3 distro==1.9.0
fastapi==0.136.3 ijson==3.6.0 interegular==0.3.3 jiter==0.19.0 jmespath==1.1.0 jsonschema==4.26.0
jsonschema-specifications==2025.9.1 lark==1.2.2 llguidance==1.7.6 lm-format-enforcer==0.11.3
loguru==0.7.3 mistral-common==1.13.1 model-hosting-container-standards==0.1.16 msgspec==0.22.0
openai==2.54.0 openai-harmony==0.0.8 opentelemetry-api==1.45.2 opentelemetry-sdk==1.45.2
opentelemetry-semantic-conventions==0.66b2 outlines-core==0.2.14
partial-json-parser==0.2.1.1.post7 prometheus-fastapi-instrumentator==8.1.0 pybase64==1.5.1
pycountry==26.2.16 pydantic==2.14.3 pydantic-core==2.50.4 pydantic-extra-types==2.11.1
python-json-logger==4.2.0 python-multipart==0.0.34 pyzmq==27.3.0 referencing==0.37.0
rpds-py==2026.9.1 setproctitle==1.3.8 sniffio==1.3.1 starlette==1.10.0 supervisor==4.3.0
typing-inspection==0.4.5 watchfiles==1.3.0 xgrammar==0.2.8
"""
REQUIREMENTS = _LACKING.split()

# Other kernels of attention, a server in Rust, sources that compile kernels of other layers.
_DROPPED = re.compile(
    r"vllm/vllm_flash_attn/_vllm_fa2_C.*|vllm/vllm-rs|vllm/third_party/fmha_sm100/.*"
    r"|vllm/third_party/deep_gemm/(include/.*|_C\.cpython-31[0134].*)"
    r"|vllm/entrypoints/serve/instrumentator/static/.*|.*\.(hpp|cuh)"
)


def _extract(wheel: Path, folder: Path) -> None:
    is_vllm = wheel.name.startswith("vllm-")
    with zipfile.ZipFile(wheel) as contents:
        for path in contents.namelist():
            if path.endswith("/") or _DROPPED.fullmatch(path) or ".data/" in path:
                continue
            if is_vllm and "/fused_moe/configs/" in path and "NVIDIA_H200" not in path:
                continue
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            data = contents.read(path)
            if is_vllm and path.endswith(".so"):
                data = fatbin.prune(data, ARCH)[0]
            (folder / path).write_bytes(data)


def main() -> None:
    """Downloads, prunes and packs; prints the parts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    downloads = Path(tempfile.gettempdir()) / "tilewise-wheels"
    parser.add_argument("--downloads", type=Path, default=downloads)
    options = parser.parse_args()
    options.downloads.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        for requirement in (VLLM, *REQUIREMENTS):
            _extract(_download(requirement, options.downloads), Path(scratch))
        manifest = {"archive": "vllm", "wheels": [VLLM, *REQUIREMENTS]}
        Path(scratch, "vllm.manifest.json").write_text(json.dumps(manifest, indent=1))
        for part in archive.pack(Path(scratch), "vllm"):
            print(f"{part}  {part.stat().st_size / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
