"""Results files: which are refused, what is said of where rows come from."""

from __future__ import annotations

import argparse
import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from bench import compare, report
from bench.results import LAYER, Results, commits, load

ROW = {"shape": "olmoe-1b-7b", "T": 8, "routing": "hot", "E": 64, "floor_us": 9.0, "peers": {}}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "is no JSON"),
        ("[]", "holds no rows"),
        ('{"rows": []}', "holds no rows"),
        ('{"rows": [1]}', "holds no rows"),
        ('{"rows": [{"shape": "x", "T": 1, "routing": "hot"}]}', "without peers, E, floor_us"),
        (json.dumps({"rows": [ROW | {"routing": "zipf2"}]}), "routings zipf2"),
    ],
)
def test_other_files_are_refused_by_name(
    text: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(SystemExit):
        load(argparse.ArgumentParser(), path, LAYER, ("hot",))
    message = capsys.readouterr().err
    assert said in message and "other.json" in message


def test_commits_of_earlier_runs_are_named() -> None:
    rows = [{"commit": name} for name in ("b", "a", "b", "b", "a", "c")]
    assert commits({"commit": "b"}, rows) == "b (2 of its rows at a, 1 of its rows at c)"
    assert commits({"commit": "b"}, rows[:1]) == "b"


def test_a_problem_of_many_cells_is_said_once(tmp_path: Path) -> None:
    results = Results(tmp_path / "r.json")
    broken = {"vllm": {"error": "no kernel"}}
    results.rows = [ROW | {"T": tokens, "peers": broken} for tokens in (1, 2, 3, 4, 5, 6)]
    results.rows[0] = results.rows[0] | {"peers": broken | {"tilewise": {"flags": ["wrong"]}}}
    lines = report.remarks(results)
    assert "olmoe-1b-7b T=1 hot: tilewise: wrong" in lines
    said = [line for line in lines if "no kernel" in line]
    assert said == ["olmoe-1b-7b T=1 hot, T=2 hot, T=3 hot, T=4 hot and 2 more: vllm: no kernel"]


COSTS = {
    "host_cost": (
        "h200_host_cost.json",
        r"\| qwen3-30b-a3b \| 1 \| uniform \| [\d.]+ \| [\d.]+ \|",
    ),
    "select_cost": (
        "h200_select_cost.json",
        r"\| [\d.]+ \| [\d.]+ \| [\d.]+ \| -?[\d.]+ \| -?[\d.]+% \|",
    ),
    "tune_cost": ("h200_tune.json", r"\| \d+ \| 44 \| 44 \| 1\.\d+ \| 1\.\d+ \| 1\.\d+ \|"),
    "warmup_cost": ("h200_warmup.json", r"\| mixtral-8x7b \| 8192 \| \d+ \| [\d.]+ \| 0 \|"),
}


@pytest.mark.parametrize("program", COSTS)
def test_reports_of_committed_costs(program: str, capsys: pytest.CaptureFixture[str]) -> None:
    main, (name, line) = importlib.import_module(f"bench.{program}").main, COSTS[program]
    path = report.TRITONMOE.parents[1] / "results" / name
    main(["report"])
    usual = capsys.readouterr().out
    main(["report", str(path)])
    printed = capsys.readouterr().out
    assert printed == usual and re.search(line, printed)
    document = json.loads(path.read_text())
    assert sum(text.startswith("| ") for text in printed.splitlines()) == len(document["rows"]) + 2
    assert f"- unit: {document['meta']['unit']}" in printed and "commit" in printed


def test_who_reads_a_report_may_leave_early() -> None:
    command = [sys.executable, "-m", "bench", "report"]
    root = Path(__file__).parents[2]
    with subprocess.Popen(
        command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as program:
        assert program.stdout is not None and program.stderr is not None
        program.stdout.close()
        assert b"Traceback" not in program.stderr.read()
        assert program.wait() == 0


def test_report_of_batch_invariance(capsys: pytest.CaptureFixture[str]) -> None:
    from bench import batch_invariant

    batch_invariant.main(["report"])
    printed = capsys.readouterr().out
    document = json.loads(batch_invariant.OUT.read_text())
    costs = document["meta"]["batch_invariant_over_default"]
    for name, cost in costs.items():
        assert re.search(rf"\| {name} \| \d+ \| {cost:.3f} \| [\d.]+ \|", printed)
    assert f"{len(document['rows'])} cells, routings uniform, hot" in printed


def test_report_of_an_engine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from bench import vllm_engine

    vllm_engine.main(["report"])
    printed = capsys.readouterr().out
    for model, entry in json.loads(vllm_engine.OUTPUT.read_text()).items():
        on, off = (entry["runs"][mode]["step_ms"] for mode in ("on", "off"))
        for batch in on:
            line = f"| {model} | decode, batch {batch} | {on[batch]:.2f} | {off[batch]:.2f} |"
            assert line in printed
    other = tmp_path / "r.json"
    for text in ('{"rows": []}', "no JSON"):
        other.write_text(text)
        with pytest.raises(SystemExit):
            vllm_engine.main(["report", str(other)])
        assert "holds no engine's times" in capsys.readouterr().err


@pytest.mark.parametrize("program", [*COSTS, "batch_invariant"])
def test_reports_of_costs_refuse_other_files(
    program: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main, results = importlib.import_module(f"bench.{program}").main, Results(tmp_path / "r.json")
    results.put(ROW | {"peers": {"tilewise": {"us": 9.0}}})
    results.save()
    for path, said in (
        (results.path, "holds other rows, without"),
        (tmp_path, "cannot be read"),
        (tmp_path / "none.json", "does not exist"),
    ):
        with pytest.raises(SystemExit):
            main(["report", str(path)])
        message = capsys.readouterr().err
        assert f"python -m bench.{program} report" in message
        assert said in message and path.name in message


def test_a_peer_without_a_time_is_a_gap(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from bench import host_cost

    peers = {"tilewise": {"host_us": 34.0}, "vllm": {"error": "no kernel"}}
    results = Results(tmp_path / "r.json")
    results.put(ROW | {"peers": peers})
    results.save()
    host_cost.main(["report", str(results.path)])
    printed = capsys.readouterr().out
    assert "| olmoe-1b-7b | 8 | hot | 34.0 | - |" in printed
    assert "- olmoe-1b-7b T=8 hot: vllm: no kernel" in printed


def test_runs_are_compared_by_what_peers_did_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Everything a tenth slower on the newer unit, ours a fifth faster beside that."""
    times = {"tilewise": 100.0, "vllm": 200.0, "sonic": 50.0}
    old = [ROW | {"commit": "a", "peers": {n: {"us": us} for n, us in times.items()}}]
    slower = {n: {"us": us * (1.1 * 0.8 if n == "tilewise" else 1.1)} for n, us in times.items()}
    new = [old[0] | {"commit": "b", "peers": slower}]
    cell = (ROW["shape"], ROW["T"], ROW["routing"])
    assert compare.changes(old, new) == {cell: pytest.approx(0.8)}
    assert compare.changes(old, old) == {}  # Not measured again.
    assert compare.changes(old, [new[0] | {"peers": {"tilewise": {"us": 1.0}}}]) == {}
    paths = [tmp_path / "old.json", tmp_path / "new.json"]
    for path, rows in zip(paths, (old, new), strict=True):
        results = Results(path)
        results.rows = rows
        results.save()
    compare.main([str(path) for path in paths])
    assert f"| {ROW['T']} | {ROW['shape']} |" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        compare.main([*map(str, paths), "--tokens", "12345"])
