"""Growth with tokens, experts and top-k, on the CPU: cells, memory's place in a row, the charts."""

from __future__ import annotations

import json

import pytest
import torch

from bench import growth, growth_chart, machine, measure, protocol
from bench.growth_axes import AXES, all_cells, along, name_of, shape_of
from bench.peers import base
from bench.protocol import SHAPES, Captured, Shape
from bench.results import Results

HERE = {"hardware": "a GPU", "driver": "1", "torch": "2.1+x", "triton": "3", "commit": "c"}


def make_row(tokens, experts, top_k):
    shape = shape_of(experts, top_k)
    floor = protocol.floors_us(tokens, shape, min(experts, tokens * top_k))[0]
    peers = {}
    for name, slower in (("tilewise", 1.2), ("vllm", 1.5)):
        peers[name] = {"us": slower * floor, "us_rounds": [slower * floor] * 3, "err": 0.004}
        peers[name]["peak_bytes"] = int(slower * tokens * top_k * 4000)
    row = {"shape": name_of(experts, top_k), "T": tokens, "routing": "uniform", "peers": peers}
    row |= {"E": experts, "topk": top_k, "H": shape.hidden_size, "I": shape.intermediate_size}
    sizes = {"output_bytes": tokens * 4096, "workspace_bytes": tokens * top_k * 3500}
    return row | sizes | {"floor_us": floor, "active": 8.0} | HERE


@pytest.fixture
def synthetic(tmp_path):
    results = Results(tmp_path / "growth.json")
    results.meta = dict(HERE)
    results.rows = [make_row(*cell) for cell in all_cells()]
    results.save()
    return results


@pytest.fixture
def cpu(monkeypatch):
    """Small layers, a timer and a memory counter that count calls, one peer of two."""

    def prepare(w13, w2):
        def layer(x, ids, weights):
            reference = measure.make_reference(x, ids, weights, w13, w2, max_tokens=len(x))
            return reference.expected.to(x.dtype)

        return layer

    def load(names):
        return {"tilewise": base.Peer(prepare, "1.0")}, {n: "no" for n in names if n != "tilewise"}

    options = measure.Options
    monkeypatch.setattr(machine, "require_gpu", lambda: None)
    monkeypatch.setattr(base, "load", load)
    monkeypatch.setattr(measure, "Options", lambda **given: options(**given, device="cpu"))
    monkeypatch.setattr(growth, "shape_of", lambda experts, top_k: Shape(experts, top_k, 16, 8))
    monkeypatch.setattr(protocol, "REPLAY_BYTES", 1.0)
    monkeypatch.setattr(
        protocol, "capture", lambda calls: Captured(None, [call() for call in calls])
    )
    monkeypatch.setattr(
        protocol, "paired_us", lambda peers, rounds, **_: {n: [50.0] * rounds for n in peers}
    )
    monkeypatch.setattr(machine, "describe", lambda: dict(HERE))
    monkeypatch.setattr(machine, "ceilings", lambda: {"copy_GBs": 1.0, "bf16_TFLOPs": 1.0})
    monkeypatch.setattr(growth, "peak_bytes", lambda call: call().nbytes + 1000)


class TestCells:
    def test_one_thing_varies_at_a_time_and_a_shared_cell_is_measured_once(self):
        cells = all_cells()
        assert len(cells) == len(set(cells)) == sum(map(len, AXES.values())) - 2
        assert (1024, 128, 8) in cells and (16384, 128, 8) in cells
        for tokens, experts, top_k in cells:
            assert (tokens != 1024) + (experts != 128) + (top_k != 8) <= 1
            assert top_k <= experts

    def test_every_cell_has_a_place(self, synthetic):
        for axis, values in AXES.items():
            points = along(axis, synthetic.rows)
            assert [value for value, _ in points] == list(values)
        assert along("top_k", synthetic.rows[:3]) == []


class TestRun:
    def test_rows_hold_time_memory_and_where_they_come_from(self, cpu, tmp_path, capsys):
        out = tmp_path / "r.json"
        command = ["--out", str(out), "--tokens", "1", "4", "1024", "--shapes", "e128-k8", "e8-k8"]
        with pytest.raises(SystemExit):
            growth.main([*command, "--time-limit", "0"])
        assert "4 cells are left" in capsys.readouterr().out
        growth.main(command)
        rows = {(row["shape"], row["T"]): row for row in json.loads(out.read_text())["rows"]}
        layers = {("e128-k8", 1), ("e128-k8", 4), ("e128-k8", 1024), ("e8-k8", 1024)}
        assert set(rows) == layers and not set(SHAPES) & {"e128-k8", "e8-k8"}
        row = rows["e8-k8", 1024]
        assert row["commit"] == "c" and row["E"] == 8
        assert row["output_bytes"] == 1024 * 16 * 2 and row["workspace_bytes"] >= 0
        assert row["peers"]["tilewise"]["us"] == 50
        assert row["peers"]["tilewise"]["peak_bytes"] == row["output_bytes"] + 1000
        assert "Growth with experts: 1,024 tokens, top 8" in capsys.readouterr().out
        # Nothing is left: the second run reads what the first has written.
        growth.main(command)
        assert "over the floor; us" not in capsys.readouterr().out

    def test_cells_that_are_none_of_the_axes_are_refused(self, capsys):
        with pytest.raises(SystemExit):
            growth.main(["--shapes", "e8-k8", "--tokens", "4"])
        assert "one of tokens, experts and top-k" in capsys.readouterr().err

    def test_memory_is_what_a_second_call_adds_at_most(self, monkeypatch):
        held = [100]  # the weights
        calls = []

        def call():
            calls.append(1)
            if len(calls) == 1:
                held.append(7)  # kept for later calls

        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: sum(held))
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: sum(held) + 42)
        assert growth.peak_bytes(call) == 42 and len(calls) == 2


class TestReport:
    def test_a_file_is_read_and_drawn(self, synthetic, tmp_path, capsys, monkeypatch):
        pytest.importorskip("matplotlib")
        monkeypatch.setattr(base, "load", None)  # measures nothing
        charts = tmp_path / "charts"
        growth.main(["--from", str(synthetic.path), "--charts", str(charts)])
        out = capsys.readouterr().out
        assert "Growth with tokens: 128 experts, top 8" in out
        assert "| 16,384 |" in out and "| 512 |" in out
        assert (charts / "growth.png").read_bytes().startswith(b"\x89PNG")

    def test_half_a_file_is_drawn(self, synthetic, tmp_path):
        pytest.importorskip("matplotlib")
        synthetic.rows = synthetic.rows[:4]
        del synthetic.rows[0]["peers"]["vllm"]
        synthetic.rows[1]["peers"]["vllm"] = {"error": "RuntimeError: no"}
        for row in synthetic.rows:
            row.pop("workspace_bytes")
        assert growth_chart.draw(synthetic, tmp_path).stat().st_size > 10_000

    def test_a_file_that_is_not_there_is_an_error(self, tmp_path, capsys):
        with pytest.raises(SystemExit):
            growth.main(["--from", str(tmp_path / "none.json")])
        assert "none.json does not exist" in capsys.readouterr().err
