"""vLLM's engine with Tilewise's experts, beside the same engine with its own.

Starts the engine in a process of its own for each run: `on` with the plug-in, `off` without, and
`eager`, without it and with vLLM's own kernels in another setting, which tells how far vLLM agrees
with itself. All get the same random weights and read the same texts; the log-probabilities that
they give those texts are compared, and decode steps are timed. The plug-in must have served, and
none of our kernels may have been compiled once the engine was up.

Commands, on a machine with a GPU:
    python -m bench.vllm_engine --unpack            # .peers/vllm.tar.xz.part* -> --site, once
    python -m bench.vllm_engine --model qwen3-30b-a3b
Anywhere:
    python -m bench.vllm_engine report FILE         # the plug-in's times by model and batch
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
OUTPUT = ROOT / "bench" / "results" / "h200_vllm_smoke.json"
RUNS = ("on", "off", "eager")
BATCHES = (1, 32, 128)
# Of one token, odd, above the captured batches, and together above one step's budget: chunked.
PROMPT_LENGTHS = (2, 17, 333, 1021, 4096, 6000)
TIMED_PROMPT, FEW_STEPS, MANY_STEPS = 32, 8, 72

COMMON = {
    "vocab_size": 32000,
    "max_position_embeddings": 16384,
    "torch_dtype": "bfloat16",
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MODELS: dict[str, dict[str, Any]] = {
    "qwen3-30b-a3b": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "attention_bias": False,
    },
    "olmoe-1b-7b": {
        "architectures": ["OlmoeForCausalLM"],
        "model_type": "olmoe",
        "hidden_size": 2048,
        "intermediate_size": 1024,
        "num_hidden_layers": 16,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "norm_topk_prob": False,
        "attention_bias": False,
        "clip_qkv": None,
    },
    # Half the layers of the real one, which would not leave room for the rest.
    "mixtral-8x7b": {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "sliding_window": None,
    },
    # For trying the script out.
    "tiny": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "hidden_size": 512,
        "intermediate_size": 1024,
        "moe_intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "num_experts": 16,
        "num_experts_per_tok": 4,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "attention_bias": False,
    },
}


# ---- the process that holds one engine ----


class CompileLog:
    """Counts what Triton compiles or loads anew in this process, ours and others' apart."""

    def __init__(self) -> None:
        self.ours: list[str] = []
        self.others: list[str] = []
        from triton import knobs

        knobs.runtime.jit_cache_hook = self._hook

    def _hook(self, **event: Any) -> bool:
        """Called where a variant is not in memory yet; must answer that it may be made."""
        try:
            fn = event.get("fn")
            name = f"{getattr(fn, 'module', '?')}.{getattr(fn, 'name', '?')}"
            (self.ours if "tilewise" in name else self.others).append(name)
        except Exception:
            self.others.append("?")
        return False

    def counts(self) -> dict[str, int]:
        return {"ours": len(self.ours), "others": len(self.others)}


def cached_variants() -> int:
    """Variants of our kernels that Triton holds in memory, without trusting any hook."""
    count = 0
    for name in [n for n in sys.modules if n.startswith("tilewise.moe.kernels")]:
        for kernel in list(vars(sys.modules[name]).values()):
            for cache in getattr(kernel, "device_caches", {}).values():
                count += len(cache[0])
    return count


def randomise(model: Any) -> int:
    """Gives every parameter values that matter, the same in every process; in place.

    The engine's own dummy weights are so small that every text is equally likely.
    """
    import torch

    count = 0
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if not parameter.is_floating_point():
                continue
            if parameter.dim() == 1:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
                continue
            generator = torch.Generator(device=parameter.device)
            generator.manual_seed(zlib.crc32(name.encode()))
            if "embed_tokens" in name:
                std = 1.0
            elif "lm_head" in name:
                std = 2.0 * parameter.shape[-1] ** -0.5
            else:
                std = parameter.shape[-1] ** -0.5
            # An expert at a time: the generator makes fp32 first.
            for part in parameter if parameter.dim() == 3 else [parameter]:
                noise = torch.randn(
                    part.shape, generator=generator, device=part.device, dtype=torch.float32
                )
                part.copy_(noise.mul_(std))
            count += 1
    return count


def model_of(llm: Any) -> Any:
    """The module in this process: the engine runs without processes of its own."""
    engine = llm.llm_engine
    for path in ("model_executor", "engine_core.engine_core.model_executor"):
        for tail in ("driver_worker.worker.model_runner", "driver_worker.model_runner"):
            found = engine
            try:
                for part in f"{path}.{tail}.get_model".split("."):
                    found = getattr(found, part)
            except AttributeError:
                continue
            return found()
    raise RuntimeError("no path to the model in this vLLM")


def with_model(llm: Any, function: Any) -> Any:
    try:
        return function(model_of(llm))
    except RuntimeError as error:
        if "no path" not in str(error):
            raise
        return llm.apply_model(function)[0]


def texts(lengths: tuple[int, ...], vocabulary: int, seed: int) -> list[list[int]]:
    import random

    source = random.Random(seed)
    return [[source.randrange(3, vocabulary) for _ in range(n)] for n in lengths]


def run_engine(folder: Path, mode: str, result_path: Path, options: dict[str, Any]) -> None:
    """One engine from start to end; leaves a JSON, written again after every step."""
    result: dict[str, Any] = {"mode": mode, "complete": False}

    def save() -> None:
        result_path.write_text(json.dumps(result))

    start = time.perf_counter()
    log = CompileLog()
    from vllm import LLM, SamplingParams

    result["import_s"] = round(time.perf_counter() - start, 1)
    arguments = {
        "model": str(folder),
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "max_model_len": 8192,
        "max_num_seqs": 128,
        "max_num_batched_tokens": 8192,
        "gpu_memory_utilization": options["memory"],
        "enable_prefix_caching": False,
        "enforce_eager": mode == "eager",
        "seed": 0,
        "kernel_config": {"enable_flashinfer_autotune": False},
    }
    llm = LLM(**arguments)
    result["start_s"] = round(time.perf_counter() - start, 1)
    config = llm.llm_engine.vllm_config
    result["cudagraph_mode"] = str(config.compilation_config.cudagraph_mode)
    result["compilation_mode"] = str(getattr(config.compilation_config, "mode", "?"))
    save()
    vocabulary = config.model_config.get_vocab_size()
    result["randomised"] = with_model(llm, randomise)
    result["ready"] = {**log.counts(), "in_memory": cached_variants()}
    ready_ours = len(log.ours)
    save()

    def prompts(tokens: list[list[int]]) -> list[dict[str, list[int]]]:
        return [{"prompt_token_ids": ids} for ids in tokens]

    def generate(tokens: list[list[int]], sampling: Any) -> Any:
        return llm.generate(prompts(tokens), sampling, use_tqdm=False)

    # Teacher-forced: how likely each next token of a fixed text is.
    scored = texts(PROMPT_LENGTHS, vocabulary, seed=1)
    score = SamplingParams(
        max_tokens=1, temperature=0.0, prompt_logprobs=1, detokenize=False, ignore_eos=True
    )
    result["logprobs"], result["best"] = [], []
    for ids, output in zip(scored, generate(scored, score), strict=True):
        rows, best = [], []
        for token, entry in zip(ids[1:], output.prompt_logprobs[1:], strict=True):
            rows.append(round(entry[token].logprob, 6))
            best.append(min(entry, key=lambda t: entry[t].rank or 1))
        result["logprobs"].append(rows)
        result["best"].append(best)
    save()

    # The same by way of decode steps, which is where graphs replay: many, odd and single batches.
    result["decoded"] = []
    decode = SamplingParams(
        max_tokens=24, temperature=0.0, logprobs=1, detokenize=False, ignore_eos=True
    )
    for batch in (1, 5, 128):
        for output in generate(texts((9,) * batch, vocabulary, seed=batch), decode)[:8]:
            (completion,) = output.outputs
            result["decoded"].append(list(completion.token_ids))
    save()

    if mode != "eager":
        time_steps(result, generate, vocabulary, options["repeats"], save)
    result["end"] = {**log.counts(), "in_memory": cached_variants()}
    result["compiled_while_serving"] = log.ours[ready_ours:]
    import torch

    result["versions"] = {
        "vllm": importlib.import_module("vllm").__version__,
        "transformers": importlib.import_module("transformers").__version__,
        "cuda": torch.version.cuda,
    }
    result["peak_GiB"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    result["complete"] = True
    save()


def time_steps(
    result: dict[str, Any], generate: Any, vocabulary: int, repeats: int, save: Any
) -> None:
    """Decode steps at each batch, and a prefill."""
    from vllm import SamplingParams

    # A step: the difference of many and few, so that the prompt and the start drop out.
    result["step_ms"] = {}
    for batch in BATCHES:
        tokens = texts((TIMED_PROMPT,) * batch, vocabulary, seed=99)
        steps = {}
        for count in (FEW_STEPS, MANY_STEPS):
            sampling = SamplingParams(
                max_tokens=count, temperature=0.0, detokenize=False, ignore_eos=True
            )
            generate(tokens, sampling)
            times = []
            for _ in range(repeats):
                begin = time.perf_counter()
                generate(tokens, sampling)
                times.append(time.perf_counter() - begin)
            steps[count] = min(times)
        per_step = (steps[MANY_STEPS] - steps[FEW_STEPS]) / (MANY_STEPS - FEW_STEPS)
        result["step_ms"][str(batch)] = round(per_step * 1e3, 3)
        save()
    tokens = texts((2048,) * 4, vocabulary, seed=7)
    one = SamplingParams(max_tokens=1, temperature=0.0, detokenize=False, ignore_eos=True)
    times = []
    for _ in range(repeats + 1):
        begin = time.perf_counter()
        generate(tokens, one)
        times.append(time.perf_counter() - begin)
    result["prefill_8192_ms"] = round(min(times) * 1e3, 2)
    save()


# ---- the process that compares ----


def unpack(site: Path, parts_folder: Path) -> None:
    from bench.peers import archive

    parts = sorted(parts_folder.glob("vllm.tar.xz.part*"))
    if not parts:
        raise SystemExit(f"no parts in {parts_folder}: python -m bench.prepare_vllm_engine")
    with tempfile.TemporaryDirectory() as folder:
        for part in parts:
            Path(folder, part.name).symlink_to(part.resolve())
        archive.unpack(site, Path(folder))
    print("unpacked to", site)


def write_distribution(folder: Path) -> None:
    """What an installed wheel leaves for vLLM to find: our name, version and entry points."""
    pyproject = (ROOT / "pyproject.toml").read_text()
    section = r'\[project\.entry-points\."vllm\.general_plugins"\]\n((?:[^\[\n].*\n)+)'
    found = re.search(section, pyproject)
    if found is None:
        raise SystemExit("pyproject.toml has no entry point for vLLM")
    points = found[1].replace('"', "")
    text = (ROOT / "src" / "tilewise" / "__init__.py").read_text()
    version = text.partition('__version__ = "')[2].partition('"')[0]
    info = folder / f"tilewise-{version}.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: tilewise\nVersion: {version}\n")
    (info / "entry_points.txt").write_text(f"[vllm.general_plugins]\n{points}")


def write_model(folder: Path, name: str, layers: int | None) -> None:
    config = {**COMMON, **MODELS[name]}
    if layers:
        config["num_hidden_layers"] = layers
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1))


def environment(mode: str, site: Path, work: Path) -> dict[str, str]:
    path = [str(ROOT / "src"), str(work / "dist"), str(site), str(ROOT)]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path),
        "PYTHONUNBUFFERED": "1",
        "TILEWISE_VLLM": "1" if mode == "on" else "0",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_USE_FLASHINFER_SAMPLER": "0",
        "VLLM_HOST_IP": "127.0.0.1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_DO_NOT_TRACK": "1",
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
        "VLLM_CACHE_ROOT": str(work / "cache"),
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


def start_run(mode: str, options: argparse.Namespace, work: Path) -> dict[str, Any]:
    """One engine in a process of its own; what it left, and what its log says."""
    result_path, log_path = work / f"{mode}.json", work / f"{mode}.log"
    result_path.unlink(missing_ok=True)
    child = {"memory": options.memory, "repeats": options.repeats}
    command = [
        *(sys.executable, "-m", "bench.vllm_engine", "--child", mode, "--work", str(work)),
        *("--child-options", json.dumps(child)),
    ]
    begin = time.perf_counter()
    with log_path.open("w") as log:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment(mode, options.site, work), stdout=log, stderr=log,
            start_new_session=True,
        )  # fmt: skip
        try:
            code: int | str = process.wait(options.timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            code = "timeout"
    result = json.loads(result_path.read_text()) if result_path.exists() else {"mode": mode}
    text = log_path.read_text(errors="replace")
    result["wall_s"] = round(time.perf_counter() - begin, 1)
    result["exit"] = code
    result["tilewise_log"] = sorted({m[0].strip() for m in re.finditer(r"tilewise: .*", text)})
    result["vllm_backend"] = sorted(set(re.findall(r"Using (\S+) Unquantized MoE", text)))
    if code != 0 or not result.get("complete"):
        result["log_tail"] = text[-6000:]
        print(f"--- {mode} failed ({code}); the end of its log:\n{text[-6000:]}", flush=True)
    print(
        f"{mode}: exit {code}, {result['wall_s']} s, engine up after {result.get('start_s')} s, "
        f"steps {result.get('step_ms')}",
        flush=True,
    )
    return result


def compare(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any] | None:
    """How far two runs' log-probabilities of the same texts are apart."""
    if not (a.get("logprobs") and b.get("logprobs")):
        return None
    gaps = [
        abs(x - y)
        for first, second in zip(a["logprobs"], b["logprobs"], strict=True)
        for x, y in zip(first, second, strict=True)
    ]
    best = [
        x == y
        for first, second in zip(a["best"], b["best"], strict=True)
        for x, y in zip(first, second, strict=True)
    ]
    gaps.sort()
    report = {
        "tokens": len(gaps),
        "mean": round(statistics.fmean(gaps), 6),
        "median": round(statistics.median(gaps), 6),
        "p99": round(gaps[int(0.99 * (len(gaps) - 1))], 6),
        "max": round(gaps[-1], 6),
        "same_best_token": round(statistics.fmean(best), 5),
    }
    if a.get("decoded") and b.get("decoded"):
        pairs = list(zip(a["decoded"], b["decoded"], strict=True))
        same = [sum(x == y for x, y in zip(p, q, strict=True)) / len(p) for p, q in pairs]
        report["same_decoded_tokens"] = round(statistics.fmean(same), 4)
    return report


def judge(runs: dict[str, dict[str, Any]]) -> tuple[dict[str, Any], list[str]]:
    on, off, eager = (runs.get(mode, {}) for mode in RUNS)
    report: dict[str, Any] = {"on_off": compare(on, off), "off_eager": compare(off, eager)}
    spread = [p for rows in off.get("logprobs", []) for p in rows]
    if len(spread) > 1:
        report["stdev_of_logprobs"] = round(statistics.stdev(spread), 3)
    problems = [f"{mode} did not finish" for mode in runs if not runs[mode].get("complete")]
    if not any("serving" in line for line in on.get("tilewise_log", [])):
        problems.append("the log does not say that Tilewise served")
    if any("serving" in line for line in off.get("tilewise_log", [])):
        problems.append("Tilewise served although it was switched off")
    if on.get("compiled_while_serving"):
        problems.append(f"compiled while serving: {on['compiled_while_serving']}")
    ready, end = on.get("ready", {}), on.get("end", {})
    if end and ready.get("in_memory") != end.get("in_memory"):
        problems.append(f"variants in memory grew: {ready['in_memory']} -> {end['in_memory']}")
    if end and not end.get("in_memory"):
        problems.append("no kernel of ours was ever compiled")
    ours, theirs = report["on_off"], report["off_eager"]
    if ours and theirs and ours["mean"] > 1.5 * theirs["mean"] + 1e-3:
        problems.append(f"apart by {ours['mean']} where vLLM is from itself by {theirs['mean']}")
    return report, problems


def print_report(arguments: Sequence[str]) -> None:
    """Prints the times of a results file, with the plug-in and without, as Markdown."""
    from bench.report import Table, show

    parser = argparse.ArgumentParser(prog="python -m bench.vllm_engine report")
    parser.add_argument("file", type=Path, nargs="?", default=OUTPUT)
    path = parser.parse_args(arguments).file
    body, lines = [], []
    try:
        for model, entry in json.loads(path.read_text()).items():
            on, off = (entry["runs"][mode] for mode in ("on", "off"))
            times = {
                f"decode, batch {batch}": (ms, off["step_ms"][batch])
                for batch, ms in on["step_ms"].items()
            }
            times["prefill, 4 x 2048 tokens"] = on["prefill_8192_ms"], off["prefill_8192_ms"]
            for step, (ours, theirs) in times.items():
                numbers = [f"{ours:.2f}", f"{theirs:.2f}", f"{theirs / ours:.3f}"]
                body.append([model, step, *numbers])
            meta = entry["meta"]
            versions = f"vLLM {meta['vllm']}, torch {meta['torch']}, triton {meta['triton']}"
            lines.append(f"{model}: {meta['hardware']}, {versions}, commit {meta['commit']}")
            lines += [f"{model}: {problem}" for problem in entry["problems"]]
    except OSError as error:
        parser.error(f"{path} cannot be read: {error.strerror}")
    except (ValueError, KeyError, TypeError, AttributeError):
        parser.error(f"{path} holds no engine's times: bench/README.md lists the files")
    header = ["model", "step", "with the plug-in, ms", "without, ms", "without over with"]
    show([Table("A whole vLLM engine, random weights", header, body)], lines)


def main(arguments: Sequence[str]) -> int:
    if arguments[:1] == ["report"]:
        print_report(arguments[1:])
        return 0
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    scratch = Path(tempfile.gettempdir())
    parser.add_argument("--unpack", action="store_true", help="unpack vLLM and stop")
    parser.add_argument("--parts", type=Path, default=ROOT / ".peers", help="what to unpack")
    parser.add_argument("--site", type=Path, default=scratch / "tilewise-vllm")
    parser.add_argument("--work", type=Path, default=scratch / "tilewise-vllm-work")
    parser.add_argument("--model", choices=MODELS, default="qwen3-30b-a3b")
    parser.add_argument("--layers", type=int, help="fewer layers than the model has")
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=list(RUNS))
    parser.add_argument("--memory", type=float, default=0.75)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--timeout", type=float, default=185, help="seconds for one engine")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--child", choices=RUNS, help=argparse.SUPPRESS)
    parser.add_argument("--child-options", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.unpack:
        unpack(options.site, options.parts)
        return 0
    if options.child:
        try:
            result = options.work / f"{options.child}.json"
            run_engine(
                options.work / "model", options.child, result, json.loads(options.child_options)
            )
        except BaseException:
            traceback.print_exc()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(1)
        sys.stdout.flush()
        os._exit(0)  # The engine's own end can hang; everything is written.
    from bench import machine

    machine.require_gpu()
    options.work = options.work / options.model
    options.work.mkdir(parents=True, exist_ok=True)
    write_distribution(options.work / "dist")
    write_model(options.work / "model", options.model, options.layers)
    known = json.loads(options.output.read_text()) if options.output.exists() else {}
    # What an earlier call left of the other runs, so that a call may make some of them only.
    left = {mode: options.work / f"{mode}.whole" for mode in RUNS if mode not in options.runs}
    runs = {mode: json.loads(path.read_text()) for mode, path in left.items() if path.exists()}
    for mode in options.runs:
        runs[mode] = start_run(mode, options, options.work)
        (options.work / f"{mode}.whole").write_text(json.dumps(runs[mode]))
        report, problems = judge(runs)
        kept = {
            mode: {k: v for k, v in run.items() if k not in ("logprobs", "best", "decoded")}
            for mode, run in runs.items()
        }
        entry = {"config": json.loads((options.work / "model" / "config.json").read_text())}
        entry |= {"agreement": report, "problems": problems, "runs": kept}
        known[options.model] = {"meta": machine.describe(), **entry}
        known[options.model]["meta"].update(runs[mode].get("versions", {}))
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(known, indent=1) + "\n")
        if not runs[mode].get("complete"):
            break  # The machine's time is scarce, and what is missing would be compared with.
    print(json.dumps(report, indent=1))
    print("batch   tilewise ms/step   vLLM ms/step   ratio")
    steps = [runs.get(mode, {}).get("step_ms", {}) for mode in ("on", "off")]
    for batch in map(str, BATCHES):
        a, b = (step.get(batch) for step in steps)
        ratio = f"{b / a:.3f}x" if a and b else "-"
        print(f"{batch:>5}   {a!s:>16}   {b!s:>12}   {ratio:>5}")
    prefill = [runs.get(mode, {}).get("prefill_8192_ms") for mode in ("on", "off")]
    print("prefill of 4 x 2048 tokens:", *prefill, "ms")
    for line in runs.get("on", {}).get("tilewise_log", []):
        print("log:", line)
    print("PROBLEMS:" if problems else "no problems", *problems, sep="\n  ")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
