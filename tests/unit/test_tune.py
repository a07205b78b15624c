"""Profiles of a layer with made-up times: rows, files, choices made from them, hosts' files."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("scipy")
pytest.importorskip("typer")
from typer.testing import CliRunner

from tilewise.cli import app
from tilewise.cli.shapes import parse_shape
from tilewise.cli.tune import hinted, recorded
from tilewise.dispatch import profiles, select, table
from tilewise.dispatch.config import GroupedGemm, KernelConfig
from tilewise.dispatch.features import features
from tilewise.dispatch.histogram import Histogram
from tilewise.dispatch.select import choose
from tilewise.integrations.record import Call, Trace
from tilewise.models import MODELS, MoEShape
from tilewise.moe import schedule
from tilewise.target import CATALOGUE, CPU, Target
from tilewise.tune import interchange, measure, profile, store
from tilewise.tune.gain import gain
from tilewise.tune.routings import sizes_of
from tilewise.tune.workloads import named, token_counts, traced

H200 = Target.from_arch("sm_90")
SHAPE = MoEShape(16, 4, 512, 256)
FAST = KernelConfig.from_name("64x64x64 g8 w4 s4 D")  # A shipped variant, as its like is for down.
COEFFICIENTS = (3.0, 0.2, 1.0, 0.3, 0.1, 0.7, 0.5, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1)
RUNNER = CliRunner()


@dataclass
class Inputs:
    """What stands for measure.InputSet: the sizes, and rows that any kernel fills alike."""

    sizes: list[int]
    out: torch.Tensor


class Machine:
    """A GPU that takes as long as the model says; `FAST` takes a tenth on the first product."""

    def __init__(self) -> None:
        self.timed = self.compiled = 0
        self.stop_after = 10**9
        self.wrong: KernelConfig | None = None
        self.broken: KernelConfig | None = None

    def compile_one(self, job: tuple[str, MoEShape, KernelConfig]) -> str | None:
        self.compiled += 1
        return "out of registers" if job[2] == self.broken else None

    def input_sets(
        self, shape: MoEShape, stage: str, ids: Sequence[torch.Tensor], weights: Any
    ) -> list[Inputs]:
        return [
            Inputs(sizes_of(i, shape.num_experts), torch.empty(i.numel(), 2).bfloat16())
            for i in ids
        ]

    def capture(
        self, run: Any, sets: list[Inputs], config: KernelConfig, stage: str, *_: Any
    ) -> tuple[str, list[Inputs]]:
        sets[0].out[: sum(sets[0].sizes)] = 1.5 if config == self.wrong else 1.0
        return stage, sets

    def interleaved_us(
        self, graphs: dict[KernelConfig, tuple[str, list[Inputs]]]
    ) -> dict[KernelConfig, tuple[float, float]]:
        if self.timed == self.stop_after:
            raise KeyboardInterrupt
        self.timed += 1
        out = {}
        for config, (stage, sets) in graphs.items():
            gemm = measure.product(SHAPE, stage, 64)
            rows = [features(config, gemm, H200, Histogram.of(s.sizes)) for s in sets]
            us = sum(a * b for row in rows for a, b in zip(COEFFICIENTS, row, strict=True))
            us /= len(sets) * (10 if (config, stage) == (FAST, "gate_up") else 1)
            out[config] = (us, us * 1.001)
        return out


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    fake = Machine()
    for name in ("compile_one", "input_sets", "capture", "interleaved_us"):
        monkeypatch.setattr(measure, name, getattr(fake, name))
    weights = measure.Weights(torch.empty(1), torch.empty(1))
    monkeypatch.setattr(measure.Weights, "random", staticmethod(lambda *_: weights))
    monkeypatch.setattr(
        profile, "ProcessPoolExecutor", lambda jobs, mp_context: ThreadPoolExecutor(1)
    )
    for name, value in {
        "get_device_name": "NVIDIA H200 NVL", "mem_get_info": (10**11, 10**11), "Stream": None,
        "synchronize": None,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    monkeypatch.setattr(profile.gc, "collect", lambda: 0)  # With no graphs, it takes most time.
    monkeypatch.setattr(Target, "probe", staticmethod(lambda device=None: H200))
    return fake


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[[], Path]]:
    """Points the library to a folder; called, it forgets what it has read, as a new process."""

    def forget() -> Path:
        for cached in (profiles.installed, table.profiled, select._robust, schedule.schedule):
            cached.cache_clear()
        return tmp_path

    monkeypatch.setenv(profiles.VARIABLE, str(tmp_path))
    forget()
    yield forget
    monkeypatch.undo()
    forget()


def run(path: Path | None = None, **options: Any) -> store.Profile:
    return profile.profile_shape(SHAPE, H200, max_tokens=256, path=path, **options)


def gate_up(tokens: int) -> GroupedGemm:
    return measure.product(SHAPE, "gate_up", tokens)


# ---------------------------------------------------------------- what is measured


def test_workloads() -> None:
    assert token_counts(8192) == [4, 14, 56, 192, 768, 2560, 8192]
    names = [(one.routing, one.num_tokens) for one in named(8192)]
    assert len(names) == len(set(names)) == 22
    assert len(named(4)) == 6  # One batch size.
    with pytest.raises(ValueError, match="max_tokens=3 must be at least 4"):
        token_counts(3)
    for one in named(64):
        ids = one.routings(SHAPE, "down", "cpu")
        assert len(ids) == 8  # A small layer: else its weights stay in L2.
        assert all(i.shape == (one.num_tokens, 4) and i.dtype is torch.int32 for i in ids)


def test_workloads_of_traces() -> None:
    ids = torch.arange(40, dtype=torch.int32).view(10, 4) % 20
    calls = [ids, ids, torch.zeros(500, 4, dtype=torch.int32), torch.zeros(2, 4, dtype=torch.int32)]
    (one,) = traced(calls, SHAPE, 256)
    assert one.num_tokens == 10 and len(one.recorded) == 2 and one.routing.startswith("trace-")
    assert (one.recorded[0] == -1).sum() == (ids >= 16).sum()  # Held elsewhere.
    drawn = one.routings(SHAPE, "gate_up", "cpu")
    sizes = sorted(sizes_of(one.recorded[0], 16))
    assert len(drawn) == 8 and all(sorted(sizes_of(i, 16)) == sizes for i in drawn)
    with pytest.raises(
        ValueError, match=r"no call with top_k=4.*have \(top_k, tokens\) \[\(3, 9\)"
    ):
        traced([torch.zeros(9, 3, dtype=torch.int32)], SHAPE, 256)


def test_recorded_calls_come_from_files(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    ids = torch.zeros(9, 4, dtype=torch.int32)
    Trace([Call("a", 16, ids), Call("b", 8, ids.clone())]).save(tmp_path / "t")
    assert len(recorded([tmp_path / "t"], SHAPE)) == 1
    with pytest.raises(ValueError, match=r"layers of \[8, 16\] experts, not 128"):
        recorded([tmp_path / "t"], MODELS["qwen3-30b-a3b"])
    (tmp_path / "no").write_text("{}")
    with pytest.raises(ValueError, match="is no trace"):
        recorded([tmp_path / "no"], SHAPE)


def test_a_profile(machine: Machine, tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    machine.wrong = KernelConfig.from_name("128x128x64 g8 w8 s4 D t64")
    machine.broken = KernelConfig.from_name("64x32x64 g8 w4 s4 D")
    made = run(tmp_path / "deep" / "p.json", report=lambda *step: seen.append(step))
    assert len(made.rows) == 44 == machine.timed and machine.compiled >= 112
    assert made.table is not None and made.meta["device"] == "NVIDIA H200 NVL"
    for row in made.rows:
        names = set(row["times_us"])
        assert FAST.name in names or row["stage"] == "down"
        assert len(names | set(row["failed"])) >= 56
        if row["stage"] == "gate_up":
            assert row["failed"] == {
                machine.wrong.name: "its result differs by 0.5",
                machine.broken.name: "out of registers",
            }
    assert machine.wrong not in made.table.gate_up.coefficients
    assert seen[0] == ("compiling", 0, machine.compiled) and seen[-1] == ("timing", 44, 44)
    again = store.load(tmp_path / "deep" / "p.json")
    assert (again.key, again.rows, again.meta) == (made.key, made.rows, made.meta)
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["p.json"]
    worth = gain(made)
    assert worth is not None and worth.after < worth.before


def test_a_profile_with_a_trace(machine: Machine) -> None:
    ids = torch.full((32, 4), -1, dtype=torch.int32)  # Rows that no kernel writes.
    ids[:5] = torch.arange(4)
    made = run(calls=[ids])
    traces = [row for row in made.rows if row["routing"].startswith("trace-")]
    assert [row["sizes"][0] for row in traces] == [[5] * 4] * 2
    assert not any(row["failed"] for row in traces)


# ---------------------------------------------------------------- files


def test_a_stopped_run_is_continued(machine: Machine, tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    machine.stop_after = 9
    with pytest.raises(KeyboardInterrupt):
        run(path)
    assert len(store.load(path).rows) == 9 and store.load(path).table is None
    machine.stop_after = 10**9
    made = run(path)
    assert len(made.rows) == 44 == machine.timed and made.table is not None
    compiled = machine.compiled
    run(path)
    assert machine.timed == 44 and machine.compiled == compiled  # Nothing is left.
    hint = replace(FAST, num_warps=8)
    assert len(run(path, hints={"down": [hint]}).rows) == 44
    assert machine.timed == 66  # Rows of the product that has a new configuration.


def test_time_is_over_before_a_table(machine: Machine, tmp_path: Path) -> None:
    made = run(tmp_path / "p.json", seconds=0.0)
    assert made.rows == [] and made.table is None and gain(made) is None


def test_merge(machine: Machine) -> None:
    whole = run()
    halves = [store.Profile(whole.key, whole.rows[i::2], None, whole.meta) for i in (0, 1)]
    merged = store.merge(*halves)
    assert sorted(map(store.identity, merged.rows)) == sorted(map(store.identity, whole.rows))
    assert merged.table is not None and whole.table is not None
    assert set(merged.table.down.coefficients) == set(whole.table.down.coefficients)
    assert len(store.merge(whole, halves[0]).rows) == 44
    other = store.Profile({**whole.key, "triton": "9.9"})
    with pytest.raises(ValueError, match=r"differ in triton: .*9\.9"):
        store.merge(whole, other)


def test_staleness(machine: Machine, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    here = store.here(SHAPE, H200)
    assert here["shape"] == [16, 4, 512, 256] and len(here["kernels"]) == 16
    assert store.is_stale(here, here) == ()
    assert store.is_stale({**here, "triton": "0", "kernels": "0"}, here) == ("kernels", "triton")
    assert store.is_stale(here, store.here(SHAPE, replace(H200, num_sms=78))) == ("target",)
    path = tmp_path / "p.json"
    made = run(path)
    store.save(replace(made, key={**here, "kernels": "0"}), path)
    with caplog.at_level(logging.WARNING, "tilewise"):
        assert profile.resumed(path, here).rows == []
    assert "starts anew: kernels changed" in caplog.text
    store.save(replace(made, key={**here, "shape": [8, 4, 512, 256]}), path)
    with pytest.raises(ValueError, match=r"something else: shape is \[8, 4, 512, 256\], here"):
        profile.resumed(path, here)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"key": {}, "rows": [], "table": null}'])
def test_what_is_no_profile(tmp_path: Path, text: str) -> None:
    path = tmp_path / "p.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="is no profile"):
        store.load(path)


# ---------------------------------------------------------------- choices


@pytest.fixture
def profiled(machine: Machine, installed: Callable[[], Path]) -> tuple[store.Profile, Path]:
    path = store.default_path(SHAPE, H200)
    assert path.parent == installed()
    return run(path), path


def test_choices_follow_a_profile(
    profiled: tuple[store.Profile, Path],
    installed: Callable[[], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    installed()
    assert choose(gate_up(128), H200) == FAST
    others = [
        choose(replace(gate_up(128), num_segments=32), H200),
        choose(gate_up(128), replace(H200, num_sms=78)),
        choose(measure.product(SHAPE, "down", 128), H200),
    ]
    assert FAST not in others
    for off in ("0", "OFF"):
        assert choose(gate_up(128), H200) == FAST
        monkeypatch.setenv(profiles.VARIABLE, off)
        assert choose(gate_up(128), H200) == FAST  # Decided already.
        installed()
        assert choose(gate_up(128), H200) != FAST
        with pytest.raises(ValueError, match=f"TILEWISE_PROFILES='{off}' switches"):
            store.default_path(SHAPE, H200)
        monkeypatch.setenv(profiles.VARIABLE, str(profiled[1].parent))
        installed()


def test_the_nearest_top_k_speaks(
    profiled: tuple[store.Profile, Path], installed: Callable[[], Path]
) -> None:
    made, path = profiled
    far = replace(made, key={**made.key, "shape": [16, 8, 512, 256]})
    store.save(far, path.with_name("a.json"))
    installed()
    for top_k, wanted in ((2, path.name), (4, path.name), (7, "a.json")):
        found = profiles.find(16, 512, 256, top_k, H200)
        assert found is not None and found.path.name == wanted


def test_a_stale_profile_is_a_hint(
    profiled: tuple[store.Profile, Path],
    installed: Callable[[], Path],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    made, path = profiled
    store.save(replace(made, key={**made.key, "triton": "3.0"}), path)
    with caplog.at_level(logging.WARNING, "tilewise"):
        for shipped, message in (
            (table.shipped, "is not used: triton changed"),
            (lambda arch: None, "is used as a hint: triton changed"),
        ):
            caplog.clear()
            monkeypatch.setattr(table, "shipped", shipped)
            installed()
            for _ in range(3):
                hinted = choose(gate_up(128), H200) == FAST
                choose(measure.product(SHAPE, "down", 128), H200)
            assert hinted == ("hint" in message)
            assert len(caplog.records) == 1 and message in caplog.text


def test_files_that_cannot_speak_are_ignored(
    profiled: tuple[store.Profile, Path],
    installed: Callable[[], Path],
    caplog: pytest.LogCaptureFixture,
) -> None:
    made, path = profiled
    assert made.table is not None
    values = json.loads(path.read_text())
    for row in values["table"]["gate_up"]["coefficients"].values():
        row.pop()
    bad = {
        path: (json.dumps(values), "fitted on other features"),
        path.with_name("b.json"): ("{", "is no profile"),
        path.with_name("c.json"): (json.dumps({"key": {}, "table": {}}), "is no profile"),
        path.with_name("d.json"): (json.dumps({"key": values["key"], "table": None}), ""),
        path.with_name("e.json"): ('{"rows": []}', "it has no key and no table"),
    }
    strange = {"shape": [64, "8", 2048, 1024]}, {"shape": [64, 8]}, {"dtype": "fp32"}
    for letter, key, message in zip(
        "fgh", strange, ["not four whole numbers"] * 2 + ["its dtype is 'fp32'"], strict=True
    ):
        text = json.dumps(values | {"key": values["key"] | key})
        bad[path.with_name(f"{letter}.json")] = (text, message)
    for file, (text, _) in bad.items():
        file.write_text(text)
    installed()
    with caplog.at_level(logging.WARNING, "tilewise"):
        assert choose(gate_up(128), H200) != FAST
    assert len(caplog.records) == 7
    assert all(message in caplog.text for _, message in bad.values())


def test_a_folder_that_cannot_be_read_holds_no_profile(
    installed: Callable[[], Path],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def denied(self: Path) -> bool:
        raise PermissionError(13, "Permission denied", str(self))

    installed()
    monkeypatch.setattr(Path, "is_dir", denied)
    with caplog.at_level(logging.WARNING, "tilewise"):
        assert choose(gate_up(128), H200) != FAST
    assert "cannot be read, no profile is used" in caplog.text


def test_the_default_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(profiles.VARIABLE)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert profiles.folder() == tmp_path / ".cache" / "tilewise" / "profiles"


# ---------------------------------------------------------------- hosts


def test_vllm_round_trip(machine: Machine, tmp_path: Path) -> None:
    made = run()
    (path,) = interchange.export_vllm(made, tmp_path)
    assert path == tmp_path / "E=16,N=256,device_name=NVIDIA_H200.json"
    values = json.loads(path.read_text())
    assert values.pop("triton_version") == profiles.triton_version()
    assert [int(key) for key in values] == list(interchange.TOKENS)
    assert set(values["64"]) == {
        "BLOCK_SIZE_M", "BLOCK_SIZE_N", "BLOCK_SIZE_K", "GROUP_SIZE_M", "num_warps", "num_stages",
    }  # fmt: skip
    assert made.table is not None
    for first, second in interchange.import_vllm(path).values():
        assert second.block_n == 2 * first.block_n
        assert replace(first, descriptors=True) in interchange.plain(made.table.gate_up)
        names = [replace(second, descriptors=True, group_m=g) for g in (1, 8)]
        assert set(names) & set(interchange.plain(made.table.down))
    # The fast one has a like in the other product: it wins where that costs nothing.
    assert values["256"]["BLOCK_SIZE_M"] == 64


def test_sglang_round_trip(machine: Machine, tmp_path: Path) -> None:
    made = run()
    first, second = interchange.export_sglang(made, tmp_path, "NVIDIA H100 80GB HBM3")
    version = profiles.triton_version().replace(".", "_")
    assert first.parent == tmp_path / "configs" / f"triton_{version}"
    assert first.name == "E=16,N=256,device_name=NVIDIA_H100_80GB_HBM3.json"
    assert second.name == "E=16,N=256,device_name=NVIDIA_H100_80GB_HBM3_down.json"
    for path in (first, second):  # Its loader takes every key for a number.
        assert [int(key) for key in json.loads(path.read_text())] == list(interchange.TOKENS)
    pairs = interchange.import_sglang(first)
    assert made.table is not None
    for a, b in pairs.values():
        assert a.block_m == b.block_m
        assert replace(a, descriptors=True) in interchange.plain(made.table.gate_up)
        assert replace(b, descriptors=True) in interchange.plain(made.table.down)
    assert hinted([first], True)["down"] == interchange.hints(pairs, True)["down"]
    second.unlink()
    assert interchange.import_sglang(first) == interchange.import_vllm(first)
    with pytest.raises(ValueError, match="name the file without '_down'"):
        interchange.import_sglang(second)


def test_import_of_what_hosts_write(tmp_path: Path) -> None:
    path = tmp_path / "f.json"
    entry = {"BLOCK_SIZE_M": 16, "BLOCK_SIZE_N": 128, "BLOCK_SIZE_K": 64, "GROUP_SIZE_M": 1}
    path.write_text(json.dumps({"triton_version": "3.6.0", "1": entry | {"waves_per_eu": 2}}))
    assert interchange.import_vllm(path) == {
        1: (KernelConfig(16, 64, 64, 1, 4, 3), KernelConfig(16, 128, 64, 1, 4, 3))
    }
    for text in ("[]", "{}", '{"1": {}}', '{"a": 1}', json.dumps({"1": entry | {"num_warps": 3}})):
        path.write_text(text)
        with pytest.raises(ValueError, match="holds no configurations"):
            interchange.import_vllm(path)


def test_exports_refuse(machine: Machine, tmp_path: Path) -> None:
    made = run()
    with pytest.raises(ValueError, match="too few rows"):
        interchange.export_vllm(replace(made, table=None), tmp_path)
    with pytest.raises(ValueError, match="does not name its machine"):
        interchange.export_sglang(replace(made, meta={}), tmp_path)
    assert made.table is not None
    alone = {KernelConfig(16, 64, 64, descriptors=True, tail_m=0): COEFFICIENTS}
    other = replace(made.table, down=table.StageTable(alone, ()))
    with pytest.raises(ValueError, match="no two of the profiled variants"):
        interchange.export_vllm(replace(made, table=other), tmp_path)


# ---------------------------------------------------------------- refusals and the commands


@pytest.mark.parametrize(
    ("shape", "target", "message"),
    [
        (SHAPE, CPU, "measured on a GPU"),
        (SHAPE, CATALOGUE["sm_89"], "sm_89 cannot be profiled yet"),
        (SHAPE, CATALOGUE["gfx942"], "gfx942 cannot be profiled yet"),
        (MoEShape(8, 2, 100, 64), H200, "hidden_size=100 is no multiple of 8"),
    ],
)
def test_what_cannot_be_profiled(shape: MoEShape, target: Target, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        profile.profile_shape(shape, target)


def test_a_layer_that_does_not_fit(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (10**6, 10**6))
    with pytest.raises(ValueError, match=r"take 0\.0 GB.*profile the shard"):
        run()


def test_shapes_of_the_command() -> None:
    assert parse_shape("16, 4,512,256") == SHAPE
    assert parse_shape("qwen3-30b-a3b") == MODELS["qwen3-30b-a3b"]
    for text, words in {
        "1,2,3": "four positive integers",
        "128,8,2048,-768": "four positive integers",
        "8,2,64,0": "four positive integers",
        "128,8,2048,abc": "four positive integers",
        "8,9,64,64": "top_k=9 exceeds",
        "no-model": "its sizes E,K,H,I",
        "128x8x2048x768": "its sizes E,K,H,I",
        "deepseek-v3@tp7": "a shard needs a divisor",
    }.items():
        with pytest.raises(ValueError, match=words):
            parse_shape(text)


def test_an_older_profile_is_fitted_again(
    profiled: tuple[store.Profile, Path], machine: Machine
) -> None:
    """Its rows are what it is worth: a table that another version wrote is made anew."""
    made, path = profiled
    values = json.loads(path.read_text())
    for stage in ("gate_up", "down"):
        for exemplar in values["table"][stage]["exemplars"]:
            del exemplar["rest"]
    path.write_text(json.dumps(values))
    assert store.load(path).table is None
    timed = machine.timed
    again = run(path)
    assert machine.timed == timed and again.table == made.table
    assert store.load(path).table is not None


def text_of(output: str) -> str:
    return " ".join(output.replace("│", " ").split())


def test_the_commands(machine: Machine, installed: Callable[[], Path], tmp_path: Path) -> None:
    first, sizes = tmp_path / "x" / "p.json", ["16,4,512,256", "--max-tokens", "64"]
    result = RUNNER.invoke(app, ["tune", *sizes, "--out", str(first)])
    assert result.exit_code == 0, result.output
    assert re.search(r"\d\d rows, \d s: ", result.output)
    assert "cases:" in text_of(result.output)
    timed = machine.timed
    result = RUNNER.invoke(app, ["tune", *sizes, "--merge", str(first)])
    assert result.exit_code == 0 and machine.timed == timed, result.output
    (path,) = tmp_path.glob("*.json")
    assert path == store.default_path(SHAPE, H200)
    for host, count in (("vllm", 1), ("sglang", 2)):
        result = RUNNER.invoke(
            app, ["tune-export", str(path), "--to", host, "--out", str(tmp_path / host)]
        )
        assert result.exit_code == 0 and len(list((tmp_path / host).rglob("*.json"))) == count
        assert "own kernel was not timed" in result.output
    again = RUNNER.invoke(app, ["tune", *sizes, "--out", str(tmp_path / "z"), "--time-limit", "0"])
    assert again.exit_code == 1 and "Too few rows" in again.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no-model"], "unknown model"),
        (["16,4,512"], "E,K,H,I"),
        (["16,4,512,256", "--max-tokens", "2"], "--max-tokens"),
        (["16,4,512,256", "--traces", "/no/such"], "--traces"),
    ],
)
@pytest.mark.usefixtures("machine")
def test_tune_refuses(arguments: list[str], message: str) -> None:
    result = RUNNER.invoke(app, ["tune", *arguments])
    assert result.exit_code == 2 and message in text_of(result.output)


@pytest.mark.skipif(torch.cuda.is_available(), reason="states what a CPU gives")
def test_tune_needs_a_gpu(tmp_path: Path) -> None:
    result = RUNNER.invoke(app, ["tune", "qwen3-30b-a3b"])
    assert result.exit_code == 2 and "measured on a GPU" in text_of(result.output)
    (tmp_path / "f").write_text("{}")
    for host, message in (("vllm", "is no profile"), ("other", "use one of vllm, sglang")):
        result = RUNNER.invoke(app, ["tune-export", str(tmp_path / "f"), "--to", host])
        assert result.exit_code == 2 and message in text_of(result.output)
