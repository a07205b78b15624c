"""Benchmarks outside the listed cells, on the CPU: routings, interpolation, reports."""

from __future__ import annotations

import itertools
import json
import subprocess
import types

import pytest
import torch

from bench import measure, protocol, skew, unseen
from bench.peers import base
from bench.protocol import SHAPES, TOKENS, Shape
from bench.results import Results
from tests.unit import test_bench
from tests.unit.test_bench import (
    HERE,
    assert_is_routing,
    exact_layer,
    one_thread,  # noqa: F401
    time_nothing,
)

TINY = Shape(16, 3, 32, 16)


@pytest.fixture
def cpu(monkeypatch):
    """Tiny shapes, a timer that counts nothing, and a peer ``tilewise`` that is exact."""

    def load(names):
        return {"tilewise": base.Peer(exact_layer, "1.0")}, {
            n: "no" for n in names if n != "tilewise"
        }

    for name in SHAPES:
        monkeypatch.setitem(SHAPES, name, TINY)
    monkeypatch.setattr(unseen, "UNSEEN_SHAPES", {"other": TINY})
    time_nothing(monkeypatch)
    monkeypatch.setattr(base, "load", load)
    options = measure.Options
    monkeypatch.setattr(measure, "Options", lambda **given: options(**given, device="cpu"))


def make_row(shape, tokens, routing="uniform", **us):
    return test_bench.make_row(shape, tokens, routing, **us) | {"active": 8.0} | HERE


def write(path, rows):
    results = Results(path)
    results.meta = dict(HERE)
    results.rows = rows
    results.save()
    return str(path)


class TestRoutings:
    @pytest.mark.parametrize("kind", skew.ROUTINGS)
    @pytest.mark.parametrize(
        ("tokens", "experts", "top_k"), [(128, 64, 8), (37, 256, 8), (9, 4, 4)]
    )
    def test_distinct_per_token_and_sums_to_one(self, kind, tokens, experts, top_k):
        gen = torch.Generator().manual_seed(0)
        ids, weights = skew.make_routing(kind, tokens, experts, top_k, gen)
        assert_is_routing(ids, weights, tokens, experts, top_k)

    @staticmethod
    def _facts(kind, tokens=8192, experts=128, top_k=8):
        gen = torch.Generator().manual_seed(1)
        ids, weights = skew.make_routing(kind, tokens, experts, top_k, gen)
        facts = skew.histogram([(torch.empty(0), ids, weights)], experts)
        return ids, facts

    def test_zipf2_first_choices_follow_the_exponent(self):
        ids, facts = self._facts("zipf2")
        share = torch.bincount(ids[:, 0].long(), minlength=128).sort(descending=True).values / 8192
        rank = torch.arange(1.0, 6.0)
        wanted = rank.pow(-2) / torch.arange(1.0, 129.0).pow(-2).sum()
        torch.testing.assert_close(share[:5], wanted, atol=0.02, rtol=0)
        assert facts["first_of_tokens"] == pytest.approx(0.61, abs=0.02)
        assert facts["largest_of_tokens"] > 0.95

    def test_half_of_the_first_choices_are_one_expert(self):
        ids, facts = self._facts("half")
        first = torch.bincount(ids[:, 0].long(), minlength=128)
        assert first.max() >= 4096 and first.max() <= 4096 + 64  # the others choose it by chance
        others = torch.bincount(ids.flatten().long(), minlength=128)
        others[first.argmax()] = 0
        rest = others[others > 0]
        assert len(rest) == 127 and rest.max() < 1.3 * rest.float().mean()
        assert facts["largest_of_tokens"] == pytest.approx(0.5 + 0.5 * 8 / 128, abs=0.01)

    def test_all_tokens_share_their_first_choice_alone(self):
        ids, facts = self._facts("one")
        assert (ids[:, 0] == ids[0, 0]).all()
        rest = torch.bincount(ids[:, 1:].flatten().long(), minlength=128)
        assert rest[ids[0, 0]] == 0
        rest = rest[rest > 0]
        assert len(rest) == 127 and rest.max() < 1.3 * rest.float().mean()
        assert facts == {
            "active": 128,
            "largest_of_rows": 1 / 8,
            "largest_of_tokens": 1,
            "first_of_tokens": 1,
        }

    def test_histogram_counts(self):
        sets = [
            (torch.empty(0), torch.tensor(ids, dtype=torch.int32), torch.empty(0))
            for ids in ([[0, 1], [0, 2], [3, 0], [4, 5]], [[1, 2], [1, 2], [1, 2], [1, 2]])
        ]
        facts = skew.histogram(sets, 8)
        assert facts == {
            "active": (6 + 2) / 2,
            "largest_of_rows": (3 / 8 + 4 / 8) / 2,
            "largest_of_tokens": (3 / 4 + 1) / 2,
            "first_of_tokens": (2 / 4 + 1) / 2,
        }

    def test_the_protocol_knows_them_for_a_while_only(self):
        before = protocol.make_routing
        gen = torch.Generator().manual_seed(0)
        wanted = before("uniform", 5, 8, 2, torch.Generator().manual_seed(0))
        with skew.skewed():
            got = protocol.make_routing("uniform", 5, 8, 2, gen)
            sets, active = protocol.build_sets("one", 4, TINY, device="cpu")
        assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
        assert active == skew.histogram(sets, TINY.num_experts)["active"]
        assert protocol.make_routing is before
        with pytest.raises(ValueError, match="'one'"):
            protocol.make_routing("one", 1, 8, 2, gen)

    def test_an_unknown_routing_is_named(self):
        with pytest.raises(ValueError, match="'cold'"):
            skew.make_routing("cold", 1, 8, 2, torch.Generator())


class TestCells:
    def test_what_is_measured_is_not_listed(self):
        assert not SHAPES.keys() & unseen.UNSEEN_SHAPES.keys()
        assert not set(SHAPES.values()) & set(unseen.UNSEEN_SHAPES.values())
        options = measure.Options(
            shapes=(*SHAPES, *unseen.UNSEEN_SHAPES), tokens=(*TOKENS, *unseen.UNSEEN_TOKENS)
        )
        listed, others = unseen.split(options)
        assert listed.shapes == tuple(SHAPES) and listed.tokens == unseen.UNSEEN_TOKENS
        assert others.shapes == tuple(unseen.UNSEEN_SHAPES) and others.tokens == TOKENS
        assert sum(len(p.shapes) * len(p.tokens) * len(p.routings) for p in (listed, others)) == 270
        one = measure.Options(shapes=("mixtral-8x7b",), tokens=TOKENS)
        assert unseen.split(one) == []
        (neighbours,) = unseen.split(one, beside=True)
        assert neighbours.tokens == TOKENS

    def test_other_shapes_are_known_for_a_while_only(self):
        before = dict(SHAPES)
        with pytest.raises(RuntimeError, match="stop"), unseen.known({"other": TINY}):
            assert measure.SHAPES["other"] == TINY
            raise RuntimeError("stop")
        assert before == SHAPES

    def test_a_run_measures_both_kinds_and_resumes(self, cpu, tmp_path, capsys):
        out = tmp_path / "r.json"
        command = ["--out", str(out), "--shapes", "mixtral-8x7b", "other"]
        command += ["--tokens", "3", "8", "--routings", "uniform", "hot"]
        unseen.main([*command, "--time-limit", "0"])
        assert "4 cells are left" in capsys.readouterr().out and "other" not in SHAPES
        unseen.main(command)
        printed = capsys.readouterr().out
        assert "missing peer vllm: no" in printed and "| tilewise |" in printed
        rows = json.loads(out.read_text())["rows"]
        cells = {(row["shape"], row["T"], row["routing"]) for row in rows}
        kinds = itertools.product([("mixtral-8x7b", 3), ("other", 8)], ("uniform", "hot"))
        assert cells == {(*cell, routing) for cell, routing in kinds}
        assert all(row["commit"] == "c" and len(row["peers"]) == 1 for row in rows)
        assert all(len(row["peers"]["tilewise"]["us_rounds"]) == 3 for row in rows)
        unseen.main(command)
        assert "over the floor; us" not in capsys.readouterr().out

    def test_only_shapes_with_cells_left_are_compiled(self, cpu, tmp_path, monkeypatch):
        commands = []

        def record(command, **_):
            commands.append(command)
            return types.SimpleNamespace(returncode=0)

        monkeypatch.setattr(subprocess, "run", record)
        options = measure.Options(
            shapes=("mixtral-8x7b", "deepseek-v3"), tokens=(3,), routings=("hot",)
        )
        done = make_row("mixtral-8x7b", 3, "hot", tilewise=1.0)
        results = Results(write(tmp_path / "r.json", [done]))
        unseen.warm_pending([options], results, ["tilewise"], "bench.unseen", 2)
        (command,) = commands
        assert command[1:6] == ["-m", "bench.unseen", "--warm-only", "--shapes", "deepseek-v3"]
        assert command[6:] == ["--tokens", "3", "--routings", "hot", "--peers", "tilewise"]

    def test_a_skewed_run_writes_its_histograms(self, cpu, tmp_path, capsys):
        out = tmp_path / "r.json"
        command = ["--out", str(out), "--shapes", "olmoe-1b-7b", "--tokens", "128"]
        skew.main(command)
        rows = {row["routing"]: row for row in Results(out).rows}
        assert set(rows) == set(skew.ROUTINGS)
        assert rows["one"]["histogram"]["first_of_tokens"] == 1
        assert rows["half"]["histogram"]["first_of_tokens"] >= 0.5
        for row in rows.values():
            assert row["histogram"]["active"] == row["active"]
        assert "100.0%" in capsys.readouterr().out
        rows["one"]["active"] += 1
        del rows["one"]["histogram"]
        with pytest.raises(RuntimeError, match="other inputs"), skew.skewed():
            skew.add_histograms(Results(write(out, list(rows.values()))), "cpu")


class TestReport:
    @pytest.mark.parametrize(
        ("tokens", "around"),
        [
            *((3, (1, 8)), (24, (8, 32)), (96, (32, 128)), (300, (128, 512))),
            *((1500, (512, 2048)), (5000, (2048, 8192)), (8, None), (10000, None)),
        ],
    )
    def test_neighbours(self, tokens, around):
        assert unseen.neighbours(tokens) == around

    def test_interpolation_is_geometric_in_log_tokens(self):
        assert unseen.interpolate(64, (32, 2.0), (128, 8.0)) == pytest.approx(4)
        assert unseen.interpolate(2, (1, 1.0), (8, 8.0)) == pytest.approx(2)
        assert unseen.interpolate(8, (8, 3.0), (32, 5.0)) == pytest.approx(3)
        assert unseen.interpolate(32, (8, 3.0), (32, 5.0)) == pytest.approx(5)

    @pytest.fixture
    def files(self, tmp_path):
        """At 16 tokens one shape is on the interpolation of 8 and 32, the other half above it."""
        tuned = [
            make_row("mixtral-8x7b", 8, tilewise=100.0, vllm=150.0, sonic=50.0),
            make_row("mixtral-8x7b", 32, tilewise=400.0, vllm=600.0),
            make_row("deepseek-v3", 8, tilewise=100.0, vllm=100.0),
            make_row("deepseek-v3", 32, tilewise=100.0, vllm=100.0),
            make_row("deepseek-v3", 8, "hot", tilewise=9999.0),
        ]
        measured = [
            make_row("mixtral-8x7b", 16, tilewise=200.0, vllm=100.0),
            make_row("deepseek-v3", 16, tilewise=150.0, vllm=300.0),
            make_row("deepseek-v3", 16, "hot", tilewise=1.0),  # 32 tokens were not measured
            make_row("phi-3.5-moe", 8, tilewise=300.0, vllm=600.0),
            make_row("kimi-k2-ep8", 8, tilewise=300.0, vllm=150.0, triton_kernels=2400.0),
        ]
        measured[-1]["commit"] = "d"
        return write(tmp_path / "a.json", measured), write(tmp_path / "b.json", tuned)

    def test_token_counts_beside_their_interpolation(self, files):
        rows, tuned = (Results(path).rows for path in files)
        (line,) = unseen.token_table(rows, tuned).body
        measured, wanted = (2.0 * 1.5) ** 0.5, 2.0**0.5
        numbers = [f"{measured:.3f}", "8: 1.000", "32: 2.000", f"{wanted:.3f}"]
        assert line == ["16", "2", *numbers, f"{measured / wanted:.3f}", "no"]
        (cell,) = unseen.worst_table(rows, tuned).body
        assert cell == ["deepseek-v3", "T=16", "uniform", "1.500", "1.000", "1.500"]
        assert unseen.worst_table(rows, tuned, count=0).title.endswith("1, the worst 0")

    def test_neighbours_of_the_same_run_are_a_table_of_their_own(self, files):
        rows, tuned = (Results(path).rows for path in files)
        assert not any("same run" in table.title for table in unseen.full(rows, tuned))
        hot = [make_row("mixtral-8x7b", t, tilewise=us) for t, us in ((8, 125.0), (32, 500.0))]
        tables = {table.title: table for table in unseen.full([*rows, *hot], tuned)}
        (line,) = next(t for title, t in tables.items() if title.endswith("same run")).body
        assert line == ["16", "1", "2.000", "8: 1.250", "32: 5.000", "2.500", "0.800", "yes"]
        cool = next(iter(tables.values()))
        assert cool.body == unseen.token_table(rows, tuned).body
        # What is listed is no cell outside the list.
        against = next(
            t for title, t in tables.items() if "counts outside the list. Speed" in title
        )
        assert "32" not in against.header

    def test_shapes_beside_the_listed_ones_over_the_peers_of_both(self, files):
        rows, tuned = (Results(path).rows for path in files)
        others = [row for row in rows if row["shape"] in unseen.UNSEEN_SHAPES]
        table = unseen.shape_table(others, tuned)
        assert table.title.endswith("in both: vllm")  # not sonic: only the listed cells have it
        line, every = table.body
        speed = 1.5**0.5  # of 1.5 and 1: neither sonic nor the other routing counts
        numbers = ["3.000", "1.000", "3.000", "1.000", f"{speed:.3f}", f"{1 / speed:.3f}"]
        assert line == ["8", "2, 2", *numbers]
        assert every == ["all", *line[1:]]

    def test_the_unseen_report_prints(self, files, capsys):
        unseen.main(["report", files[0], "--tuned", files[1]])
        out = capsys.readouterr().out
        assert "| 16 | 2 |" in out and "| 8 | 2, 2 |" in out
        assert "Listed shapes, token counts outside the list. Speed of tilewise" in out
        assert "| kimi-k2-ep8 | T=8 | uniform | 300.0 | vllm | 150.0 | 0.50 |" in out
        assert "| kimi-k2-ep8 | 1 | 3.000 | 1.000 | 3.000 | d |" in out
        assert "commit: c, d here, c in the listed cells" in out

    def test_a_file_that_is_not_there_is_an_error(self, files, tmp_path, capsys):
        with pytest.raises(SystemExit):
            unseen.main(["report", files[0], "--tuned", str(tmp_path / "none.json")])
        with pytest.raises(SystemExit):
            skew.main(["report", str(tmp_path / "none.json")])
        assert "none.json does not exist" in capsys.readouterr().err

    def test_the_skew_report_prints(self, tmp_path, capsys):
        rows = [
            make_row("olmoe-1b-7b", 128, "one", tilewise=100.0, vllm=200.0),
            make_row("deepseek-v3", 128, "zipf2", tilewise=100.0, vllm=50.0, sonic=400.0),
        ]
        shares = {"first_of_tokens": 1.0, "largest_of_tokens": 1.0, "largest_of_rows": 0.125}
        rows[0]["histogram"] = shares | {"active": 8.0}
        skew.main(["report", write(tmp_path / "r.json", rows)])
        out = capsys.readouterr().out
        assert "| vllm | 1.00 | 1.00 | 1 of 2 |" in out
        assert "(above 1: tilewise is faster): one" in out
        assert "| deepseek-v3 | T=128 | zipf2 | 100.0 | vllm | 50.0 | 0.50 |" in out
        assert "| olmoe-1b-7b | 64 | T=128 | one | 8.0 | 100.0% | 100.0% | 12.5% |" in out
