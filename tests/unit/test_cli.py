"""The commands: doctor, explain, bench; the page of supported machines; the Hub's package."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
import signal
import subprocess
import sys
from dataclasses import astuple, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

pytest.importorskip("typer")
from typer.testing import CliRunner

import tilewise
from tilewise.cli import app, limit
from tilewise.cli import bench as bench_module
from tilewise.cli import doctor as doctor_module
from tilewise.cli.shapes import parse_shape
from tilewise.target import CATALOGUE, CPU, Target

ROOT = Path(__file__).resolve().parents[2]
# The command has its module's name, so an attribute of the package is the function.
bench = sys.modules["tilewise.cli.bench"]
doctor = sys.modules["tilewise.cli.doctor"]
RUNNER = CliRunner()
GOOD = {
    "torch": "2.11.0+cu130", "triton": "3.6.0", "numpy": "2.3.5", "cuda": "13.0",
    "driver": "580.1.2", "hip": "", "python": "3.12.3",
}  # fmt: skip


def load(path: Path, name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


# ---------------------------------------------------------------- doctor


@pytest.fixture
def compiled_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """As without TRITON_INTERPRET: in the interpreter a full self-test takes minutes."""
    monkeypatch.setattr(doctor, "INTERPRETED", False)


@pytest.mark.usefixtures("compiled_path")
@pytest.mark.skipif(torch.cuda.is_available(), reason="states what a CPU gives")
def test_doctor_on_a_cpu() -> None:
    result = RUNNER.invoke(app, ["doctor", "--device", "cpu"])
    assert result.exit_code == 0, result.output
    assert "no kernel runs without a GPU" in result.output
    assert "checks passed" in result.output


@pytest.mark.usefixtures("compiled_path")
@pytest.mark.skipif(torch.cuda.is_available(), reason="states what a CPU gives")
def test_doctor_json() -> None:
    result = RUNNER.invoke(app, ["doctor", "--device", "cpu", "--json"])
    report = json.loads(result.output)
    assert report["ok"] and result.exit_code == 0
    assert {check["kernel"] for check in report["checks"]} == {"route", "plan", "layer"}
    assert {check["dtype"] for check in report["checks"]} >= set(doctor.DTYPES)
    assert report["machine"]["arch"] == "cpu"


@pytest.mark.usefixtures("compiled_path")
def test_doctor_fails_on_a_wrong_result(monkeypatch: pytest.MonkeyPatch) -> None:
    original = doctor.cpu.fused_experts
    monkeypatch.setattr(
        doctor.cpu, "fused_experts", lambda *args, **kwargs: original(*args, **kwargs) * 1.05
    )
    result = RUNNER.invoke(app, ["doctor", "--device", "cpu", "--json"])
    assert result.exit_code == 1
    bad = [check for check in json.loads(result.output)["checks"] if not check["ok"]]
    assert {check["kernel"] for check in bad} == {"layer"}


@pytest.mark.usefixtures("compiled_path")
def test_doctor_survives_a_check_that_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("out of registers\nmore")

    monkeypatch.setattr(doctor.cpu, "plan", fail)
    result = RUNNER.invoke(app, ["doctor", "--device", "cpu", "--json"])
    assert result.exit_code == 1
    bad = [check for check in json.loads(result.output)["checks"] if not check["ok"]]
    assert {check["detail"] for check in bad} == {"RuntimeError: out of registers"}
    assert {check["error"] for check in bad} == {None}


@pytest.mark.skipif(not doctor.INTERPRETED, reason="needs TRITON_INTERPRET=1")
@pytest.mark.parametrize("kernel", ["route", "plan", "grouped", "decode", "combine"])
def test_self_test_of_kernels(kernel: str) -> None:
    """The checks that a GPU would run, one or two of each kernel, in the interpreter."""
    jobs = [job for job in doctor.self_test("cpu", CPU) if job.args[0] == kernel]
    chosen = [job for job in jobs if dtype_of(job) in ("fp32", "int32")]
    if kernel == "grouped":
        chosen = [job for job in chosen if job.args[1] in ("pointers", "descriptors, pair")]
    assert chosen
    for job in chosen:
        result = job()
        assert result.ok, result


def dtype_of(job: Any) -> str:
    return job.keywords["dtype"] if "dtype" in job.keywords else job.args[2]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("arch", list(CATALOGUE))
def test_self_test_is_legal_everywhere(arch: str, dtype: torch.dtype) -> None:
    from tilewise.dispatch.config import GroupedGemm, KernelConfig, why_illegal

    target = Target.from_arch(arch)
    variants = doctor.layer_variants(target)
    assert ("descriptors, pair" in variants) == target.tensor_descriptors
    for config, tokens, _ in variants.values():
        if config is None or config.path == "decode":
            continue
        for n, k, weights in ((96, 128, 2), (128, 96, 1)):
            gemm = GroupedGemm(tokens * 2, tokens, 6, n, k, weights, dtype.itemsize, weights == 2)
            assert isinstance(config.gate_up, KernelConfig)
            assert why_illegal(config.gate_up, gemm, target) is None


def levels(target: Target, **versions: str) -> dict[str, str]:
    found = doctor.known(target, {**GOOD, **versions})
    return {finding.text: finding.level for finding in found}


def test_known_facts() -> None:
    hopper = Target.from_arch("sm_90")
    assert "bad" not in levels(hopper).values()
    assert any("ran on an NVIDIA H200" in text for text in levels(hopper))
    assert "bad" in levels(hopper, torch="2.8.0").values()
    assert "bad" in levels(hopper, triton="").values()
    assert "bad" in levels(hopper, driver="535.1").values()
    numpy = levels(hopper, numpy="2.4.0")
    assert any("interpreter fails with numpy 2.4.0" in text for text in numpy)
    assert not any("interpreter fails" in text for text in levels(hopper, triton="3.7.0"))
    assert any("one accumulator" in text for text in levels(Target.from_arch("sm_100")))
    assert "bad" in levels(replace(hopper, arch="sm_75")).values()
    assert any("not in the catalogue" in text for text in levels(replace(hopper, arch="sm_130")))
    # A driver without a GPU that torch sees is a broken installation, no CPU machine.
    assert "bad" in levels(CPU).values()
    assert "bad" not in levels(CPU, driver="", cuda="").values()


def test_only_measured_machines_are_said_to_have_run() -> None:
    assert doctor.RAN == {"sm_90": "NVIDIA H200"}
    for arch, target in CATALOGUE.items():
        claims = [text for text in levels(target) if "the test suite ran" in text]
        assert bool(claims) == (arch == "sm_90")


# ---------------------------------------------------------------- explain


def test_explain() -> None:
    result = RUNNER.invoke(
        app, ["explain", "deepseek-v3@tp8", "--tokens", "1,64", "--arch", "gfx942"]
    )
    assert result.exit_code == 0, result.output
    assert "256 experts, top 8, 7168 x 256" in result.output
    assert "decode on gfx942" in result.output and "grouped on gfx942" in result.output


def test_explain_takes_a_chip() -> None:
    result = RUNNER.invoke(app, ["explain", "qwen3-30b-a3b", "--arch", "h100"])
    assert result.exit_code == 0, result.output
    assert "sm_90: sizes and rates are those of the h200, not of the h100.\n" in result.output
    refused = RUNNER.invoke(app, ["explain", "qwen3-30b-a3b", "--arch", "h300"])
    assert refused.exit_code == 2 and "unknown architecture 'h300'" in refused.output


@pytest.mark.parametrize("name", ["sm_90", "sm90", "sm_90a", "SM90", "H200"])
def test_explain_takes_no_spelling_for_another_chip(name: str) -> None:
    result = RUNNER.invoke(app, ["explain", "qwen3-30b-a3b", "--target", name])
    assert result.output.startswith("sm_90: sizes and rates are those of the h200.\n")


def test_explain_without_a_gpu_names_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = RUNNER.invoke(app, ["explain", "qwen3-30b-a3b"])
    assert result.exit_code == 0, result.output
    assert "No GPU here: calls on this machine run plain torch and no kernel" in result.output
    assert "another machine, sm_90, with sizes and rates of the h200" in result.output
    assert "--target: h100" in result.output and "grouped on sm_90" in result.output
    named = RUNNER.invoke(app, ["explain", "qwen3-30b-a3b", "--target", "sm_90"])
    assert "No GPU" not in named.output and "grouped on sm_90" in named.output


def test_explain_of_a_cpu_shows_no_kernel() -> None:
    result = RUNNER.invoke(app, ["explain", "qwen3-30b-a3b", "--tokens", "1,64", "--target", "CPU"])
    assert result.exit_code == 0, result.output
    assert result.output.count("plain torch on cpu: no kernel runs") == 2
    assert "Config" not in result.output and "floor" not in result.output


@pytest.mark.parametrize(
    ("model", "sizes"),
    [("qwen3-235b-a22b-tp8", "128 experts, top 8, 4096 x 192"),
     ("kimi-k2-ep8", "48 experts, top 8, 7168 x 2048"),
     ("Qwen/Qwen3-30B-A3B-ep4-tp2", "32 experts, top 8, 2048 x 384")],
)  # fmt: skip
def test_explain_takes_shards(model: str, sizes: str) -> None:
    result = RUNNER.invoke(app, ["explain", model, "--arch", "h200"])
    assert result.exit_code == 0 and f"{model}: {sizes}" in result.output, result.output


@pytest.mark.parametrize("command", ["explain", "bench"])
@pytest.mark.parametrize(
    ("model", "said"),
    [("qwen3-30b-a3b-tp5", "intermediate_size=768 does not divide by 5"),
     ("qwen3-30b-a3b-ep3", "num_experts=128 does not divide by 3: a shard needs a divisor"),
     ("qwen3-235b-a2b-tp8", "did you mean 'qwen3-235b-a22b-tp8'"),
     ("qwen3-30b-a3b-tp", "A shard is NAME-tpN or NAME-epN")],
)  # fmt: skip
def test_shards_that_are_none_are_said(command: str, model: str, said: str) -> None:
    result = RUNNER.invoke(app, [command, model])
    assert result.exit_code == 2
    assert said in " ".join(result.output.replace("│", " ").split())


def test_the_benchmarks_names_are_the_commands() -> None:
    from bench.protocol import SHAPES
    from bench.regret import SHAPES as REGRET
    from bench.unseen import UNSEEN_SHAPES

    shapes = {**SHAPES, **UNSEEN_SHAPES, **{name: astuple(s) for name, s in REGRET.items()}}
    # No shard, and no model.
    others = {"qwen3-235b-full", "gpt-oss-120b-like"}
    assert others < set(shapes)
    for name in set(shapes) - others:
        assert astuple(parse_shape(name)) == shapes[name], name


@pytest.mark.parametrize(
    "arguments",
    [["nothing"], ["qwen3-30b-a3b", "--arch", "sm_1"], ["qwen3-30b-a3b", "--tokens", "0"],
     ["qwen3-30b-a3b", "--tokens", "many"], ["qwen3-30b-a3b", "--dtype", "int4"]],
    ids=lambda a: a[-1],
)  # fmt: skip
def test_explain_refuses(arguments: list[str]) -> None:
    assert RUNNER.invoke(app, ["explain", *arguments]).exit_code == 2


# ---------------------------------------------------------------- bench


def test_bench_on_a_cpu(tmp_path: Path) -> None:
    out = tmp_path / "new" / "results.json"
    result = RUNNER.invoke(
        app,
        ["bench", "mixtral-8x7b", "--tokens", "1,4096", "--routings", "uniform,hot", "--peers",
         "torch", "--rounds", "1", "--device", "cpu", "--out", str(out)],
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "CPU numbers mean nothing" in result.output
    assert "On a CPU 4096 tokens run as 32." in result.output and "left out" not in result.output
    written = json.loads(out.read_text())
    assert written["meta"]["meaningless"]
    assert [(row["T"], row["routing"]) for row in written["rows"]] == [
        (1, "uniform"), (1, "hot"), (32, "uniform"), (32, "hot"),
    ]  # fmt: skip
    for row in written["rows"]:
        assert row["shape"] == "mixtral-8x7b (tiny)" and row["floor_us"] > 0
        assert row["peers"]["tilewise"]["us"] > 0
    again = RUNNER.invoke(app, ["bench", "--from", str(out)])
    assert again.exit_code == 0 and "mixtral-8x7b (tiny)" in again.output


def test_quick_bench_is_a_few_cells(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(bench.time, "process_time", lambda: 0.0)
    out = tmp_path / "r.json"
    command = ["bench", "--quick", "--device", "cpu", "--peers", "torch", "--out", str(out)]
    result = RUNNER.invoke(app, command)
    said = result.output.splitlines()
    assert result.exit_code == 0 and "On a CPU 64, 4096 tokens run as 32." in said, result.output
    assert said[-1] == "--quick left out: 8, 512 tokens; 2 of 3 rounds"
    written = json.loads(out.read_text())
    assert [row["T"] for row in written["rows"]] == [1, 32] and "left_out" not in written["meta"]
    assert all(len(row["peers"]["torch"]["us_rounds"]) == 1 for row in written["rows"])


@pytest.mark.parametrize(
    ("given", "left"),
    [(["--rounds", "2"], "8, 512 tokens"), (["--tokens", "1,8"], "2 of 3 rounds"),
     (["--rounds", "3", "--tokens", bench.TOKENS], None)],
    ids=str,
)  # fmt: skip
def test_quick_bench_keeps_what_is_given(
    given: list[str], left: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: dict[str, Any] = {}

    def measure(console: Any, cells: Any, dtype: Any, peers: Any, rounds: int, *_: Any) -> Any:
        measured.update(rounds=rounds, tokens={cell[2] for cell in cells})
        return {"rows": []}

    monkeypatch.setattr(bench, "measure", measure)
    result = RUNNER.invoke(app, ["bench", "--quick", "--device", "cpu", *given])
    assert result.exit_code == 0, result.output
    assert measured["rounds"] == (int(given[1]) if "--rounds" in given else 1)
    assert (8 in measured["tokens"]) == ("--tokens" in given)
    last = result.output.splitlines()[-1]
    assert last == f"--quick left out: {left}" if left else "left out" not in result.output


def test_quick_bench_stops_and_says_what_it_left(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def slow(gate_up: torch.Tensor, down: torch.Tensor) -> Any:
        def layer(x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
            try:
                bench.time.sleep(60 if len(x) > 1 else 0)
            except Exception as error:
                raise AssertionError("taken for a failure of the peer") from error
            return torch.zeros_like(x)

        return layer

    monkeypatch.setattr(bench.time, "process_time", lambda: bench.QUICK_SECONDS - 1.5)
    monkeypatch.setitem(bench.PEERS, "torch", slow)
    out = tmp_path / "r.json"
    command = ["bench", "--quick", "--device", "cpu", "--peers", "torch", "--out", str(out)]
    start = bench.time.monotonic()
    result = RUNNER.invoke(app, [*command, "--charts", str(tmp_path)])
    assert result.exit_code == 0 and bench.time.monotonic() - start < 20
    assert "left out, the time is over: qwen3-30b-a3b (tiny) 32 uniform" in result.output
    written = json.loads(out.read_text())
    assert written["meta"]["left_out"] == ["qwen3-30b-a3b (tiny) 32 uniform"]
    assert [row["T"] for row in written["rows"]] == [1]


def test_no_limit_leaves_the_alarm_alone() -> None:
    before = signal.getsignal(signal.SIGALRM)
    with limit.time_limit(math.inf):
        assert signal.getsignal(signal.SIGALRM) is before
    with pytest.raises(limit.OutOfTime), limit.time_limit(-1.0):
        bench.time.sleep(5)
    assert signal.getsignal(signal.SIGALRM) is before
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_bench_times_no_wrong_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(gate_up: torch.Tensor, down: torch.Tensor) -> Any:
        return lambda x, ids, weights: torch.zeros_like(x)

    def broken(gate_up: torch.Tensor, down: torch.Tensor) -> Any:
        raise RuntimeError("no such layer")

    monkeypatch.setitem(bench.PEERS, "torch", wrong)
    monkeypatch.setitem(bench.PEERS, "json", broken)
    result = RUNNER.invoke(
        app, ["bench", "--tokens", "4", "--rounds", "1", "--device", "cpu", "--peers", "torch,json"]
    )
    assert result.exit_code == 0, result.output
    assert "torch: ValueError: its result differs" in result.output
    assert "json: RuntimeError: no such layer" in result.output


@pytest.mark.parametrize(
    "arguments",
    [["nothing"], ["--tokens", "0"], ["--tokens", "x"], ["--routings", "odd"], ["--peers", "odd"],
     ["--dtype", "fp32"]],
    ids=lambda a: "".join(a),
)  # fmt: skip
def test_bench_refuses(arguments: list[str]) -> None:
    assert RUNNER.invoke(app, ["bench", "--device", "cpu", *arguments]).exit_code == 2


def test_bench_names_an_absent_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    result = RUNNER.invoke(app, ["bench", "--device", "cpu", "--peers", "torch,vllm"])
    assert result.exit_code == 2
    assert "--peers vllm: it cannot be imported here" in result.output
    assert "vllm" not in bench._chosen("")  # Not asked for: what is there is compared.


def test_bench_makes_folders_before_it_measures(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder, file = tmp_path / "a" / "b", tmp_path / "file"
    file.touch()

    def measure(*_: Any) -> Any:
        assert folder.is_dir()
        raise KeyboardInterrupt

    monkeypatch.setattr(bench, "measure", measure)
    reached = RUNNER.invoke(app, ["bench", "--device", "cpu", "--out", str(folder / "r.json")])
    assert reached.exit_code == 130
    for place in (tmp_path, file / "r.json"):
        result = RUNNER.invoke(app, ["bench", "--device", "cpu", "--out", str(place)])
        assert result.exit_code == 2 and "--out" in result.output


@pytest.mark.parametrize("kind", bench.ROUTINGS)
def test_routing(kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    shape = bench.MoEShape(32, 4, 16, 16)
    ids, weights = bench.make_routing(kind, 200, shape, generator)
    assert ids.dtype is torch.int32 and ids.shape == (200, 4)
    assert all(len(set(row)) == 4 for row in ids.tolist())
    torch.testing.assert_close(weights.sum(-1), torch.ones(200))
    assert len(ids.unique()) == (4 if kind == "hot" else 32)


def test_protocol_is_that_of_the_repository() -> None:
    """The same routings and floors as bench/protocol.py, so that files can be compared."""
    from bench import protocol

    shape = bench.MoEShape(32, 4, 64, 48)
    for kind in bench.ROUTINGS:
        ours = bench.make_routing(kind, 50, shape, torch.Generator().manual_seed(3))
        theirs = protocol.make_routing(kind, 50, 32, 4, torch.Generator().manual_seed(3))
        assert torch.equal(ours[0], theirs[0])
        torch.testing.assert_close(ours[1], theirs[1])
    row = {"T": 50, "topk": 4, "H": 64, "I": 48, "active": 31.0}
    target = replace(
        Target.from_arch("sm_90"), memory_gbs=protocol.COPY_GBS, bf16_tflops=protocol.BF16_TFLOPS
    )
    expected = protocol.floors_us(50, protocol.Shape(32, 4, 64, 48), 31.0)[0]
    assert math.isclose(bench.floor_us(row, target), expected)


def test_charts_of_committed_results(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    committed = ROOT / "bench" / "results" / "h200_bf16_moe.json"
    result = RUNNER.invoke(app, ["bench", "--from", str(committed), "--charts", str(tmp_path)])
    assert result.exit_code == 0, result.output
    for name in ("speedup.png", "roofline.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(bench, "measure", None)  # What is missing is said before hours of it.
    result = RUNNER.invoke(app, ["bench", "--device", "cpu", "--charts", str(tmp_path)])
    assert result.exit_code == 2
    assert "pip install matplotlib" in result.output


META = {"hardware": "a GPU", "torch": "2", "triton": "3"}
CELL = {
    "shape": "s", "routing": "hot", "T": 1, "topk": 1, "H": 1, "I": 1, "active": 1.0,
    "floor_us": 1.0, "peers": {"tilewise": {"us": 2.0}, "vllm": {"error": "none"}},
}  # fmt: skip


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "No such file"),
        ("{", "is not JSON"),
        (b"\xff\xfe", "is not JSON"),
        *(
            (json.dumps(document), "holds no times of layers")
            for document in (
                [1], {"rows": [CELL]}, {"meta": META, "rows": []}, {"meta": META, "rows": [{}]},
                {"meta": META, "rows": [CELL | {"peers": {"vllm": {"us": "fast"}}}]},
                {"meta": META, "rows": [CELL, CELL | {"floor_us": 0}]},
            )
        ),
    ],
    ids=str,
)  # fmt: skip
def test_bench_from_what_is_no_results_file(
    tmp_path: Path, text: str | bytes | None, message: str
) -> None:
    path = tmp_path / "f.json"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    result = RUNNER.invoke(app, ["bench", "--from", str(path)])
    assert result.exit_code == 2, result.output
    assert message in " ".join(result.output.replace("│", " ").split())


def test_bench_from_the_least_that_is_one(tmp_path: Path) -> None:
    path = tmp_path / "f.json"
    path.write_text(json.dumps({"meta": META, "rows": [CELL]}))
    assert RUNNER.invoke(app, ["bench", "--from", str(path)]).exit_code == 0
    pytest.importorskip("matplotlib")
    path.write_text(json.dumps({"meta": META, "rows": [CELL | {"peers": {}}]}))
    result = RUNNER.invoke(app, ["bench", "--from", str(path), "--charts", str(tmp_path)])
    assert result.exit_code == 2 and "needs times of Tilewise" in result.output


def test_docs_install_what_their_commands_need() -> None:
    extras = pytest.importorskip("tomllib").loads((ROOT / "pyproject.toml").read_text())
    extras = extras["project"]["optional-dependencies"]
    text = (ROOT / "docs" / "quickstart.md").read_text()
    installed = re.search(r"pip install '\.\[(.*)\]'", text)
    assert installed is not None and "--charts" in text
    needs = " ".join(line for extra in installed[1].split(",") for line in extras[extra])
    assert all(package in needs for package in ("typer", "rich", "matplotlib"))


@pytest.mark.parametrize("module", ["tilewise", "tilewise.cli"])
def test_the_command_runs_as_a_module(module: str) -> None:
    command = [sys.executable, "-m", module, "--version"]
    env = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"tilewise {tilewise.__version__}\n"


def test_commands_are_functions_of_their_modules() -> None:
    assert bench_module is bench.bench and doctor_module is doctor.doctor


# ---------------------------------------------------------------- the page, and the Hub's package


def test_support_page_is_current() -> None:
    matrix = load(ROOT / "scripts" / "support_matrix.py", "tilewise_support_matrix")
    assert matrix.PAGE.read_text() == matrix.page(), "run python scripts/support_matrix.py"


CHECK = """
import importlib.util, json, sys
from pathlib import Path
import torch

# As `kernels` imports it: under its id, from outside sys.path, two versions side by side.
def load(folder):
    identity = json.loads((folder / "metadata.json").read_text())["id"]
    spec = importlib.util.spec_from_file_location(identity, folder / "__init__.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[identity] = module
    spec.loader.exec_module(module)
    return identity, module

outputs = []
for folder in map(Path, sys.argv[1:]):
    identity, kernel = load(folder)
    assert hasattr(getattr(torch.ops, identity), "fused_experts")
    torch.manual_seed(0)
    layer = kernel.FusedMoE(kernel.MoEShape(4, 2, 32, 16), dtype=torch.float32)
    x = torch.randn(5, 32)
    with torch.no_grad():
        outputs.append(layer(x))
        # Stateless: the class's forward runs on the module that it replaces.
        weights, ids = kernel.route(x @ layer.router_weight.T, 2)
        layer.act_fn = torch.nn.SiLU()
        forward = kernel.layers.TilewiseExperts.forward
        torch.testing.assert_close(forward(layer, x, ids.long(), weights), outputs[-1])
        layer.act_fn = torch.nn.GELU()
        try:
            forward(layer, x, ids, weights)
        except NotImplementedError:
            pass
        else:
            raise AssertionError("another activation was taken for SiLU")
assert torch.equal(*outputs)
assert kernel.layers.TilewiseExperts.__init__ is torch.nn.Module.__init__
assert "tilewise" not in sys.modules, "the kernel imports the installed package"
"""


def test_hub_package_runs(tmp_path: Path) -> None:
    build = load(ROOT / "hub" / "build.py", "tilewise_hub_build")
    folders = build.build(tmp_path)
    assert [folder.name for folder in folders] == ["torch-cuda", "torch-rocm", "torch-cpu"]
    identities = set()
    for folder in folders:
        metadata = json.loads((folder / "metadata.json").read_text())
        assert metadata["name"] == "tilewise" and metadata["id"].isidentifier()
        identities.add(metadata["id"])
        assert not (folder / "__main__.py").exists()
        assert not (folder / "cli").exists() and not (folder / "integrations").exists()
    assert len(identities) == len(folders)
    arguments = [sys.executable, "-c", CHECK, str(folders[2]), str(folders[0])]
    done = subprocess.run(arguments, capture_output=True, text=True, cwd=tmp_path, env={"PATH": ""})
    assert done.returncode == 0, done.stderr


def test_hub_build_is_repeatable(tmp_path: Path) -> None:
    build = load(ROOT / "hub" / "build.py", "tilewise_hub_build")
    texts = []
    for name in ("a", "b"):
        folders = build.build(tmp_path / name)
        texts.append([(folder / "metadata.json").read_text() for folder in folders])
    assert texts[0] == texts[1]


@pytest.mark.parametrize(
    "line", ["import tilewise", "from tilewise.moe import cpu", "from ... import models",
             'torch.ops.tilewise.route(x)'],
)  # fmt: skip
def test_hub_build_refuses_what_cannot_move(line: str) -> None:
    build = load(ROOT / "hub" / "build.py", "tilewise_hub_build")
    assert build.problems({"moe/bad.py": line})
    assert not build.problems({"moe/good.py": "from ..models import MoEShape"})


def test_kernels_loads_the_package(tmp_path: Path) -> None:
    """With Hugging Face's own loader, where it is installed."""
    kernels = pytest.importorskip("kernels")
    build = load(ROOT / "hub" / "build.py", "tilewise_hub_build")
    build.build(tmp_path / "build")
    kernel = kernels.get_local_kernel(tmp_path, backend="cpu")
    layer = kernel.FusedMoE(kernel.MoEShape(4, 2, 32, 16), dtype=torch.float32)
    with torch.no_grad():
        assert layer(torch.randn(3, 32)).isfinite().all()


@pytest.mark.parametrize(
    "arguments",
    [
        ["doctor", "--device", "foo"],
        ["demo", "--device", "cuda:99"],
        ["bench", "--device", "tpu"],
        ["bench", "--tokens", "abc"],
        ["bench", "--tokens", "1,,2"],
        ["bench", "--tokens", "0"],
        ["explain", "kimi-k2", "--tokens", "1.5"],
        ["explain", "kimi-k2", "--tokens", "1 2"],
        ["explain", "kimi-k2", "--tokens", "99999999999"],
        ["explain", "kimi-k2", "--tokens", "-3"],
    ],
    ids=" ".join,
)
def test_what_is_not_there_is_said_in_words(arguments: list[str]) -> None:
    result = RUNNER.invoke(app, arguments)
    assert result.exit_code == 2
    assert "use one of cpu" in result.output or "integers with commas" in result.output
