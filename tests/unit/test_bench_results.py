"""Results files: which are refused, what is said of where rows come from."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from bench import report
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
