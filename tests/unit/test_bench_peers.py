"""The code of peers around other libraries: in Triton's interpreter, on fakes of these."""

from __future__ import annotations

import os
import subprocess
import sys
import types

import pytest
import torch

from bench import prepare_peers, protocol
from bench.accuracy import make_reference
from bench.peers import archive, deep_gemm_jit, deep_gemm_moe, tritonmoe
from bench.protocol import Shape
from tilewise.moe.launch import INTERPRETED

SHAPE = Shape(5, 2, 48, 32)

interpreted = pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1")


def fake_deep_gemm():
    """Both grouped products by loops; padding must not be read, so it holds NaN."""
    module = types.ModuleType("deep_gemm")

    def contiguous(a, b, out, experts):
        assert a.shape[0] == experts.numel() and a.shape[0] % 128 == 0
        for row, expert in enumerate(experts.tolist()):
            if expert >= 0:
                block = experts[row // 128 * 128 : row + 1]
                assert (block == expert).all(), "a block of rows has one expert"
                out[row] = (a[row].float() @ b[expert].float().T).to(a.dtype)

    def masked(a, b, out, counts, expected):
        assert expected >= 1 and a.shape[1] % 128 == 0
        for expert, count in enumerate(counts.tolist()):
            product = a[expert, :count].float() @ b[expert].float().T
            out[expert, :count] = product.to(a.dtype)

    module.m_grouped_bf16_gemm_nt_contiguous = contiguous
    module.m_grouped_bf16_gemm_nt_masked = masked
    return module


class TestDeepGemm:
    @interpreted
    @pytest.mark.parametrize("masked", [False, True])
    @pytest.mark.parametrize(("tokens", "routing"), [(1, "zipf"), (70, "zipf"), (7, "hot")])
    def test_the_layer_around_the_products(self, masked, tokens, routing):
        w13, w2 = protocol.make_weights(SHAPE, device="cpu")
        (inputs, *_), _ = protocol.build_sets(routing, tokens, SHAPE, device="cpu")
        product = deep_gemm_moe.make_products(fake_deep_gemm(), masked=masked)
        layer = deep_gemm_moe.make_layer(w13, w2, product, 0 if masked else 128)
        reference = make_reference(*inputs, w13, w2, max_tokens=tokens)
        assert reference.error(layer(*inputs)) < 2 * reference.err_bf16

    @interpreted
    def test_rows_are_stable_beyond_one_block(self):
        gen = torch.Generator().manual_seed(0)
        ids, _ = protocol.make_routing("zipf", 700, 5, 2, gen)
        layout, rows = deep_gemm_moe.rows_of(ids, 5, 128, 0)
        assert rows.unique().numel() == rows.numel() == 1400
        assert torch.equal(layout[rows.long()], ids.flatten())
        assert int((layout >= 0).sum()) == 1400
        for expert in range(5):
            mine = rows[ids.flatten() == expert]
            assert mine[0] % 128 == 0 and torch.equal(mine, mine[0] + torch.arange(len(mine)))

    def test_masked_is_for_decoding(self):
        layer = deep_gemm_moe.make_layer(torch.empty(2, 4, 8), torch.empty(2, 8, 2), None, 0)
        with pytest.raises(ValueError, match="257 tokens"):
            layer(torch.empty(257, 8), torch.empty(257, 1), torch.empty(257, 1))

    def test_nvcc_is_taken_where_there_is_one(self, monkeypatch):
        monkeypatch.setattr(deep_gemm_jit, "preload", lambda: None)
        monkeypatch.setenv("DG_JIT_USE_NVRTC", "")
        monkeypatch.delenv("DG_JIT_USE_NVRTC")
        monkeypatch.setattr(deep_gemm_jit.shutil, "which", lambda *_, **__: "/opt/nvcc")
        assert deep_gemm_jit.prepare() == "nvcc: /opt/nvcc"

    def test_nvrtc_finds_the_unpacked_headers(self, monkeypatch, tmp_path):
        monkeypatch.setattr(deep_gemm_jit, "preload", lambda: None)
        monkeypatch.setenv("DG_JIT_USE_NVRTC", "1")
        monkeypatch.setenv("CUDA_HOME", "")
        with pytest.raises(ImportError, match="prepare_peers deepgemm"):
            deep_gemm_jit.prepare()
        include = tmp_path / archive.CUDA_HEADERS / "include"
        include.mkdir(parents=True)
        monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
        assert deep_gemm_jit.prepare() == "NVRTC"
        options = f"-I{os.environ['CUDA_HOME']}/include".split()
        assert options[0] == options[-1] == f"-I{include}"
        assert f"-I{include}/cccl" in options and len(options) == 4


SOURCES = {
    "fused_moe": """
from triton_kernels.moe.expert_gemm import _build_block_schedule, grouped

def fused_expert_ffn(rows, gate, up, down, offsets, experts, weights, order, tokens, top_k):
    first = _build_block_schedule(offsets, experts, BLOCK_M=64)
    return rows, gate, up, first, grouped(offsets, experts)
""",
    "permute": """
def permute_tokens(x, ids, experts):
    counts = ids.flatten().bincount(minlength=experts)
    return x, counts.cumsum(0), ids.flatten().argsort(stable=True), None
""",
    "expert_gemm": """
def _build_block_schedule(offsets, experts, BLOCK_M):
    return offsets.tolist(), experts, BLOCK_M

def grouped(offsets, experts):
    return _build_block_schedule(offsets, experts)
""",
}


class TestTritonMoe:
    @pytest.fixture
    def unpacked(self, tmp_path, monkeypatch):
        moe = tmp_path / archive.TRITONMOE / tritonmoe.PACKAGE / "moe"
        moe.mkdir(parents=True)
        for name, source in SOURCES.items():
            (moe / f"{name}.py").write_text(source)
        monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])

    def test_its_schedule_is_built_outside_of_a_capture(self, unpacked, monkeypatch):
        layer = tritonmoe.load().prepare(torch.arange(24.0).view(2, 4, 3), torch.zeros(2, 3, 2))
        ids = torch.tensor([[0], [1], [0]], dtype=torch.int32)
        call = (torch.zeros(3, 3), ids, torch.ones(3, 1))
        _, gate, up, first, second = layer(*call)
        assert gate.is_contiguous() and up.is_contiguous()
        assert gate[0, 1, 0] == 3 and up[0, 0, 0] == 6  # rows of gate, then of up
        assert first == second == ([2, 3], 2, 64)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        assert layer(*call)[3] is second
        with pytest.raises(KeyError):
            layer(call[0], ids.clone(), call[2])

    def test_another_package_of_its_name_stays(self, unpacked, monkeypatch):
        other = types.ModuleType(tritonmoe.PACKAGE)
        monkeypatch.setitem(sys.modules, tritonmoe.PACKAGE, other)
        tritonmoe.load()
        assert sys.modules[tritonmoe.PACKAGE] is other
        assert f"{tritonmoe.PACKAGE}.moe.fused_moe" not in sys.modules

    def test_without_sources_it_says_what_to_run(self):
        with pytest.raises(ImportError, match="prepare_peers tritonmoe"):
            tritonmoe.folder()


class TestPrepare:
    def test_a_commit_is_packed_by_its_paths(self, tmp_path, monkeypatch):
        source = tmp_path / "source"
        (source / "triton_kernels" / "moe").mkdir(parents=True)
        (source / "triton_kernels" / "moe" / "router.py").write_text("x = 1\n")
        (source / "README.md").write_text("no\n")
        git = ["git", "-C", str(source), "-c", "user.name=a", "-c", "user.email=a@b"]
        for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "one"]):
            subprocess.run([*git, *command], check=True)
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True).stdout
        monkeypatch.setattr(
            archive,
            "pack",
            lambda folder, name: sorted(
                path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()
            ),
        )
        place = prepare_peers._place_tritonmoe
        checkout = prepare_peers.Checkout(source.as_uri(), head.strip(), place)
        packed = prepare_peers.prepare("tritonmoe", (checkout,), tmp_path)
        assert packed == ["tritonmoe.manifest.json", "tritonmoe/triton_kernels/moe/router.py"]

    def test_of_deep_gemm_this_python_is_kept(self):
        place = prepare_peers._place_deep_gemm
        folder = "vllm/third_party/deep_gemm"
        assert place(f"{folder}/_C.cpython-312-x86_64-linux-gnu.so").startswith("deep_gemm/_C")
        assert place(f"{folder}/_C.cpython-313-x86_64-linux-gnu.so") is None
        assert place(f"{folder}/include/cute/config.hpp") == "deep_gemm/include/cute/config.hpp"
        assert place("vllm/third_party/flash/x.py") is None
        headers = prepare_peers._place_cuda_headers
        assert (
            headers("nvidia/cu13/include/cccl/nv/target") == "cuda_headers/include/cccl/nv/target"
        )
        assert headers("nvidia/cu13/include/cccl/cub/cub.cuh") is None
        assert headers("nvidia/cu13/lib/libcudart.so.13") is None
