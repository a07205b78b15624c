"""The benchmark's own arithmetic, on the CPU: nothing here is timed."""

from __future__ import annotations

import importlib
import itertools
import json
import math
import struct
import sys
import time
import types
from dataclasses import dataclass, replace

import pytest
import torch

import bench
from bench import batch_invariant, fatbin, machine, measure, protocol, quick, report
from bench.__main__ import main
from bench.accuracy import make_reference
from bench.peers import archive, base, stubs
from bench.protocol import ROUTINGS, SHAPES, TOKENS, Captured, Shape
from bench.results import Results
from bench.unseen import UNSEEN_SHAPES

ALL_SHAPES = SHAPES | UNSEEN_SHAPES
TINY = Shape(8, 2, 32, 16)


@dataclass(frozen=True)
class OnCpu(measure.Options):
    device: str = "cpu"


HERE = {"hardware": "a GPU", "driver": "1", "torch": "2", "triton": "3", "commit": "c"}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """These tensors are too small to share among threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_row(shape="qwen2-moe-57b", tokens=8, routing="uniform", **us):
    peers = {name: {"us": t, "us_rounds": [t] * 3, "err": 0.004} for name, t in us.items()}
    sizes = dict(zip(("E", "topk", "H", "I"), ALL_SHAPES[shape], strict=True))
    return {
        "shape": shape,
        "T": tokens,
        "routing": routing,
        "floor_us": 100.0,
        "peers": peers,
    } | sizes


def exact_layer(w13, w2):
    """What a peer that is exact prepares."""

    def layer(x, ids, weights):
        every = make_reference(x, ids, weights, w13, w2, max_tokens=len(x))
        return every.expected.to(x.dtype)

    return layer


def time_nothing(monkeypatch):
    """A machine without a GPU, on which every call takes 50 us."""
    monkeypatch.setattr(machine, "require_gpu", lambda: None)
    monkeypatch.setattr(protocol, "REPLAY_BYTES", 1.0)
    monkeypatch.setattr(machine, "describe", lambda: dict(HERE))
    monkeypatch.setattr(machine, "ceilings", lambda: {"copy_GBs": 1.0, "bf16_TFLOPs": 1.0})
    monkeypatch.setattr(
        protocol, "capture", lambda calls: Captured(None, [call() for call in calls])
    )
    monkeypatch.setattr(
        protocol, "paired_us", lambda peers, rounds, **_: {n: [50.0] * rounds for n in peers}
    )


def assert_is_routing(ids, weights, tokens, experts, top_k):
    """Experts that are distinct within a token, and weights that sum to one."""
    assert ids.shape == weights.shape == (tokens, top_k)
    assert ids.dtype == torch.int32 and ids.is_contiguous()
    assert ids.min() >= 0 and ids.max() < experts
    assert all(len(set(row)) == top_k for row in ids.tolist())
    torch.testing.assert_close(weights.sum(-1), torch.ones(tokens))


class TestProtocol:
    def test_the_whole_run_has_168_cells(self):
        assert len(SHAPES) * len(TOKENS) * len(ROUTINGS) == 168

    @pytest.mark.parametrize(
        ("shape", "tokens", "active", "floor"),
        [
            ("mixtral-8x7b", 128, 8.0, 669.2635912622791),  # bound by memory
            ("mixtral-8x7b", 8192, 8.0, 7346.7),  # bound by arithmetic
            ("qwen3-235b-tp8", 1, 8.0, 8.96),
        ],
    )
    def test_floors_are_those_of_the_published_baseline(self, shape, tokens, active, floor):
        ours, ours2 = protocol.floors_us(tokens, SHAPES[shape], active)
        assert ours == pytest.approx(floor, rel=1e-3)
        assert ours2 >= ours

    def test_no_floor_is_below_the_limit(self):
        for shape in SHAPES.values():
            for tokens in TOKENS:
                limit = protocol.limit_us(tokens, shape, 8)
                assert limit < protocol.floors_us(tokens, shape, 8)[0]

    @pytest.mark.parametrize("kind", ROUTINGS)
    @pytest.mark.parametrize(("tokens", "experts", "top_k"), [(1, 8, 2), (37, 64, 8), (9, 4, 4)])
    def test_routing_is_distinct_per_token_and_sums_to_one(self, kind, tokens, experts, top_k):
        gen = torch.Generator().manual_seed(0)
        ids, weights = protocol.make_routing(kind, tokens, experts, top_k, gen)
        assert_is_routing(ids, weights, tokens, experts, top_k)
        if kind == "hot":
            assert (ids == ids[0]).all()

    def test_an_unknown_routing_is_named(self):
        with pytest.raises(ValueError, match="'cold'"):
            protocol.make_routing("cold", 1, 8, 2, torch.Generator())

    def test_sets_move_more_weights_than_the_cache_holds(self):
        sets, active = protocol.build_sets("hot", 4, TINY, device="cpu")
        assert len(sets) == 8 and active == 2
        large = Shape(8, 2, 512, 65536)
        sets, _ = protocol.build_sets("hot", 4, large, device="cpu")
        assert len(sets) == 2
        assert not torch.equal(sets[0][0], sets[1][0])


class TestAccuracy:
    def test_reference_is_the_layer(self):
        w13, w2 = protocol.make_weights(TINY, device="cpu", dtype=torch.float32)
        (x, ids, weights), *_ = protocol.build_sets(
            "uniform", 20, TINY, device="cpu", dtype=torch.float32
        )[0]
        expected = torch.zeros_like(x)
        for t in range(20):
            for k in range(2):
                gate, up = (w13[ids[t, k]] @ x[t]).chunk(2)
                expected[t] += weights[t, k] * (w2[ids[t, k]] @ (gate * gate.sigmoid() * up))
        reference = make_reference(x, ids, weights, w13, w2, max_tokens=7)
        assert len(reference.tokens) == 7 and reference.tokens[-1] == 19
        assert reference.error(expected) < 1e-6
        assert reference.error(2 * expected) == pytest.approx(1, abs=1e-5)

    def test_one_unwritten_element_is_never_right(self):
        w13, w2 = protocol.make_weights(TINY, device="cpu")
        (inputs, *_), _ = protocol.build_sets("zipf", 50, TINY, device="cpu")
        reference = make_reference(*inputs, w13, w2)
        output = torch.zeros(50, TINY.hidden_size)
        output[1, 1] = math.nan
        assert math.isnan(reference.error(output))
        assert 1e-4 < reference.err_bf16 < 2e-2


class TestResults:
    def test_a_file_is_resumed(self, tmp_path):
        path = tmp_path / "a" / "r.json"
        results = Results(path)
        results.put(make_row(tilewise=1.0))
        results.save()
        again = Results(path)
        cell = ("qwen2-moe-57b", 8, "uniform")
        assert again.is_done(cell, ["tilewise"])
        assert not again.is_done(cell, ["tilewise", "vllm"])
        assert not again.is_done(("qwen2-moe-57b", 8, "hot"), ["tilewise"])

    def test_a_cell_has_one_row(self, tmp_path):
        results = Results(tmp_path / "r.json")
        results.put(make_row(tilewise=1.0))
        results.put(make_row(tilewise=1.0, vllm=2.0))
        assert len(results.rows) == 1 and set(results.rows[0]["peers"]) == {"tilewise", "vllm"}


@pytest.mark.parametrize(
    "program",
    [
        *("__main__", "skew", "unseen", "host_cost", "sweep", "batch_invariant", "vllm_engine"),
        *("select_cost", "tune_cost", "warmup_cost", "growth"),
    ],
)
def test_without_a_gpu_programs_end_in_one_line(program, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", [program])
    main = importlib.import_module(f"bench.{program}").main
    with pytest.raises(SystemExit) as end:
        main([]) if main.__code__.co_argcount else main()
    printed = capsys.readouterr()
    assert end.value.code == 2 and not printed.out
    assert printed.err.count("\n") == 1 and "needs a CUDA GPU" in printed.err


class TestPeers:
    def test_a_missing_peer_is_named_with_its_reason(self, monkeypatch):
        monkeypatch.setitem(base.LOADERS, "gone", "bench.peers.no_such_module:load")
        peers, missing = base.load(["gone", "gone_again", "nonsense"])
        assert not peers
        assert "no_such_module" in missing["gone"]
        assert missing["gone_again"] == missing["gone"]
        assert "unknown peer" in missing["nonsense"]

    def test_a_stubbed_package_has_every_name(self):
        assert stubs.install(["json", "no_such_package_at_all"]) == ["no_such_package_at_all"]
        from no_such_package_at_all.deep.down import Name

        assert isinstance(Name, type) and Name[int] is Name

    def test_an_archive_comes_back_whole(self, tmp_path, monkeypatch):
        monkeypatch.setattr(archive, "PART_BYTES", 100)
        source = tmp_path / "source"
        (source / "package").mkdir(parents=True)
        content = bytes(torch.randint(256, (1000,)).tolist())
        (source / "package" / "data").write_bytes(content)
        assert len(archive.pack(source, "base", tmp_path / "archives")) > 10
        assert archive.unpack(tmp_path / "out", tmp_path / "archives") == ["base"]
        assert (tmp_path / "out" / "package" / "data").read_bytes() == content
        with pytest.raises(FileNotFoundError, match="prepare_peers"):
            archive.unpack(tmp_path / "out", tmp_path)


class TestFatbin:
    def test_only_one_architecture_stays(self):
        def entry(kind, arch, payload):
            head = struct.pack("<HHIQ", kind, 1, 64, len(payload)).ljust(28, b"\0")
            return (head + struct.pack("<I", arch)).ljust(64, b"\0") + payload

        def container(*entries):
            body = b"".join(entries)
            return struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(body)) + body

        mine, other, ptx = entry(2, 90, b"m" * 24), entry(2, 80, b"o" * 40), entry(1, 80, b"p" * 8)
        section = container(other, mine, ptx) + bytes(8) + container(other, ptx)
        names = b"\0.nv_fatbin\0.shstrtab\0"
        header = bytearray(64)
        struct.pack_into("<Q", header, 0x28, 64 + len(section) + len(names))
        struct.pack_into("<HHH", header, 0x3A, 64, 2, 1)
        table = struct.pack("<IIQQQQ", 1, 1, 0, 0, 64, len(section)).ljust(64, b"\0")
        table += struct.pack("<IIQQQQ", 12, 3, 0, 0, 64 + len(section), len(names)).ljust(64, b"\0")
        image = bytes(header) + section + names + table

        out, kept = fatbin.prune(image, 90)
        assert kept == 1 and len(out) == len(image)
        first = container(mine)
        second = 64 + len(container(other, mine, ptx)) + 8
        assert out[64:].startswith(first) and not any(out[64 + len(first) : second])
        assert out[second:].startswith(container(ptx))

    def test_an_image_without_device_code_stays_as_it_is(self):
        header = bytearray(64)
        struct.pack_into("<Q", header, 0x28, 64)
        struct.pack_into("<HHH", header, 0x3A, 64, 1, 0)
        image = bytes(header) + bytes(64)
        assert fatbin.prune(image, 90) == (image, 0)


class TestMeasure:
    @pytest.fixture
    def cpu(self, monkeypatch):
        """One tiny shape, timers that count calls, and two peers of which one cannot run."""
        monkeypatch.setattr(protocol, "SHAPES", {"tiny": TINY})
        monkeypatch.setattr(measure, "SHAPES", {"tiny": TINY})
        time_nothing(monkeypatch)
        module = types.ModuleType("bench_test_peers")
        module.right = lambda: base.Peer(exact_layer, "1.0")
        module.broken = lambda: base.Peer(lambda w13, w2: self._raise, "1.0")
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setitem(base.LOADERS, "right", "bench_test_peers:right")
        monkeypatch.setitem(base.LOADERS, "broken", "bench_test_peers:broken")
        return measure.Options(
            shapes=("tiny",), tokens=(1, 5), peers=("right", "right_again", "broken"), device="cpu"
        )

    @staticmethod
    def _raise(*_, **__):
        raise RuntimeError("out of\nluck")

    def _run(self, options, path):
        results = Results(path)
        peers, missing = base.load(options.peers)
        measure.describe_run(options, results, peers, missing)
        return list(measure.measure(options, results, peers)), Results(path)

    def test_every_cell_has_every_peer_by_time_or_error(self, cpu, tmp_path):
        rows, saved = self._run(cpu, tmp_path / "r.json")
        assert rows == saved.rows and len(rows) == 2 * len(ROUTINGS)
        for row in rows:
            assert row["peers"]["broken"] == {"error": "RuntimeError: out of luck"}
            entry = row["peers"]["right"]
            assert entry["us"] == 50 and entry["us_rounds"] == [50.0] * 3
            assert entry["err"] < row["err_bf16_torch"] and "flags" not in entry
            assert row["commit"] == "c" and row["hardware"] == "a GPU"
        assert saved.meta["noise"]["right"] == {"median": 0, "p95": 0, "max": 0}

    def test_only_what_is_pending_is_measured(self, cpu, tmp_path):
        path = tmp_path / "r.json"
        self._run(cpu, path)
        assert self._run(cpu, path)[0] == []
        saved = json.loads(path.read_text())
        saved["rows"].pop()
        path.write_text(json.dumps(saved))
        assert len(self._run(cpu, path)[0]) == 1

    def test_the_time_limit_stops_before_the_next_cell(self, cpu, tmp_path, monkeypatch):
        ticks = itertools.count()
        monkeypatch.setattr(time, "monotonic", lambda: next(ticks))
        rows, saved = self._run(replace(cpu, time_limit=3.5), tmp_path / "r.json")
        assert 0 < len(rows) < 6 and rows == saved.rows

    def test_a_failure_while_timing_is_an_error_of_the_cell(self, cpu, tmp_path, monkeypatch):
        monkeypatch.setattr(protocol, "paired_us", self._raise)
        rows, _ = self._run(cpu, tmp_path / "r.json")
        assert rows[0]["peers"]["right"] == {"error": "while timing: RuntimeError: out of luck"}

    def test_a_peer_that_breaks_cuda_ends_the_run_behind_its_cell(self, cpu, tmp_path, monkeypatch):
        monkeypatch.setattr(measure, "_cuda_works", lambda device: False)
        options = replace(cpu, peers=("right", "broken", "right_again"))
        with pytest.raises(measure.CudaFailure, match="broken"):
            self._run(options, tmp_path / "r.json")
        (row,) = Results(tmp_path / "r.json").rows
        for name in ("right", "right_again"):
            assert row["peers"][name] == {"error": "not measured: broken broke the CUDA context"}

    def test_other_hardware_needs_another_file(self, cpu, tmp_path, monkeypatch):
        self._run(cpu, tmp_path / "r.json")
        monkeypatch.setattr(machine, "describe", lambda: HERE | {"hardware": "another"})
        with pytest.raises(ValueError, match="another file"):
            self._run(cpu, tmp_path / "r.json")

    @pytest.fixture
    def quick_run(self, cpu, monkeypatch, tmp_path, capsys):
        """Runs `python -m bench --quick` on the CPU, with so many seconds left."""
        monkeypatch.setattr(measure, "Options", OnCpu)
        monkeypatch.setattr(quick, "OUT", tmp_path / "quick.json")
        defaults = quick.DEFAULTS | {"shapes": ["tiny"], "tokens": [1, 5], "peers": ["right"]}
        monkeypatch.setattr(quick, "DEFAULTS", defaults | {"out": quick.OUT})

        def run(seconds):
            monkeypatch.setattr(bench, "STARTED", time.monotonic() - quick.SECONDS + seconds)
            main(["--quick"])
            return Results(quick.OUT).rows, " ".join(capsys.readouterr().out.split())

        return run

    def test_a_quick_run_is_a_few_cells(self, quick_run):
        quick.OUT.write_text("of an earlier run")
        rows, printed = quick_run(30.0)
        assert [(row["T"], row["routing"]) for row in rows] == [(1, "uniform"), (5, "uniform")]
        assert "--quick: 2 cells in" in printed and "all its cells are done" in printed
        assert "The whole run has 168 cells" in printed

    def test_a_quick_run_leaves_out_what_takes_too_long(self, quick_run, monkeypatch):
        monkeypatch.setattr(measure, "_time", lambda captured, options: time.sleep(60))
        start = time.monotonic()
        rows, printed = quick_run(0.5)
        assert rows == [] and time.monotonic() - start < 20
        assert "no time was left for 2 cells: tiny T=1 uniform, tiny T=5 uniform" in printed

    def test_a_quick_run_waits_for_no_other_processes(self, capsys):
        with pytest.raises(SystemExit):
            main(["--quick", "--warm-jobs", "2"])
        assert "--warm-jobs" in capsys.readouterr().err

    def test_what_is_too_fast_or_inexact_is_flagged(self):
        entry = measure._judge({"err": 0.004}, [9.0, 11.0, 10.0], limit=12.0, err_bf16=0.004)
        assert entry["us"] == 10 and "wrong" in entry["flags"][0] and len(entry["flags"]) == 1
        entry = measure._judge({"err": 0.007}, [20.0], limit=12.0, err_bf16=0.004)
        assert "error above" in entry["flags"][0]
        entry = measure._judge({"err": math.nan}, [20.0], limit=12.0, err_bf16=0.004)
        assert entry["err"] is None and entry["flags"]


class TestReport:
    def test_geomean(self):
        assert report.geomean([1.0, 4.0]) == pytest.approx(2)
        assert math.isnan(report.geomean([]))

    def test_speedup_is_paired_by_round(self):
        row = make_row(tilewise=1.0, vllm=1.0)
        row["peers"]["tilewise"]["us_rounds"] = [10.0, 20.0, 40.0]
        row["peers"]["vllm"]["us_rounds"] = [20.0, 30.0, 48.0]
        assert report.speedup(row, "vllm") == pytest.approx(1.5)
        assert report.speedup(row, "absent") is None

    def test_tables(self):
        rows = [
            make_row(tokens=1, tilewise=200.0, vllm=100.0, torch_gmm=400.0, vllm_again=101.0),
            make_row(tokens=8, tilewise=50.0, vllm=200.0),
        ]
        rows[1]["peers"]["torch_gmm"] = {"error": "RuntimeError: no"}
        floor = {line[0]: line[1:] for line in report.over_floor(rows).body}
        assert floor["tilewise"] == ["2.00", "0.50", "1.00"]
        assert floor["torch_gmm"] == ["4.00", "-", "4.00"]
        assert floor["best of the others"] == ["1.00", "2.00", "1.41"]
        assert "vllm_again" not in floor
        against = {line[0]: line[1:] for line in report.against_peers(rows).body}
        assert against["vllm"] == ["0.50", "4.00", "1.41", "1 of 2"]
        assert against["best of the others"] == ["0.50", "4.00", "1.41", "1 of 2"]
        (line,) = report.cells(rows).body
        assert line[1:] == ["uniform", "100 · vllm 1.00 · 2.00", "100 · vllm 2.00 · 0.50"]
        (loss,) = report.losses(rows).body
        assert loss == ["qwen2-moe-57b", "T=1", "uniform", "200.0", "vllm", "100.0", "0.50"]

    def test_tritonmoe_losses_come_from_the_committed_times(self):
        cells = json.loads(report.TRITONMOE.read_text())["cells"]
        assert len({(c["shape"], c["T"], c["routing"]) for c in cells}) == 168
        cell = cells[0]
        slow = make_row(cell["shape"], cell["T"], cell["routing"], tilewise=cell["us"] * 2)
        table = report.losses_to_tritonmoe([slow])
        assert table.body[0][-1] == "0.50" and "2026-11-20" in table.title
        slow["peers"]["tilewise"]["us"] = cell["us"] / 2
        assert report.losses_to_tritonmoe([slow]).body == []

    def test_the_command_prints_markdown_and_what_is_missing(self, tmp_path, capsys):
        results = Results(tmp_path / "r.json")
        results.meta = HERE | {"missing": {"sonic": "ModuleNotFoundError: no module"}}
        results.put(make_row(tilewise=150.0, vllm=100.0))
        results.rows[0]["peers"]["torch_gmm"] = {"error": "RuntimeError: no"}
        results.save()
        main(["report", str(results.path)])
        out = capsys.readouterr().out
        assert "| tilewise | 1.50 | 1.50 |" in out
        assert "missing peer sonic: ModuleNotFoundError" in out
        assert "torch_gmm: RuntimeError: no" in out

    def test_batch_invariant_cost(self):
        rows = [
            make_row(tokens=t, tilewise=10.0, tilewise_invariant=us)
            for t, us in [(1, 10.0), (8, 40.0)]
        ]
        assert batch_invariant.cost(rows) == pytest.approx({"all": 2.0, "1": 1.0, "8": 4.0})
