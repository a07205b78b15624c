"""Runs a command in a Python that has what it needs; makes that Python if there is none.

    python3 scripts/bootstrap.py NEED ARGUMENT...     e.g.  test -m pytest tests/unit

The running Python is used as it is, without network, if it meets the need. Otherwise a virtual
environment is made once, and updated when pyproject.toml changes. Needs only the standard library.
"-n NUMBER" is left out where pytest-xdist, a convenience, is missing.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CONSTRAINTS = ROOT / "scripts" / "constraints.txt"
PROBE = ROOT / "scripts" / "probe_interpreter.py"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"

# Package -> oldest version. The ranges are those of pyproject.toml.
RUN = {"torch": "2.10", "triton": "3.6", "transformers": "5.10", "typer": "0.15", "rich": "13.7"}
NEEDS = {
    "run": RUN,
    "test-gpu": {**RUN, "pytest": "8.3"},
    "test": {**RUN, "pytest": "8.3"},
    "lint": {**RUN, "ruff": "0.17", "mypy": "2.4"},
    "bench": {"torch": "2.10", "triton": "3.6", "typer": "0.15", "rich": "13.7"},
    "triton-newest": {"triton": "3.9", "pytest": "8.3"},
}
NEWEST_TRITON = "triton==3.9.0"
# ROCm builds of torch bring Triton under other names.
ALIASES = {"triton": ("triton", "pytorch-triton-rocm", "triton-rocm", "pytorch-triton")}


def version_of(package: str) -> tuple[int, ...] | None:
    """The installed version's leading numbers, or None."""
    for name in ALIASES.get(package, (package,)):
        try:
            return numbers(importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def numbers(version: str) -> tuple[int, ...]:
    found = re.match(r"[0-9.]+", version)
    return tuple(int(part) for part in found.group().strip(".").split(".")) if found else ()


def missing(need: str) -> list[str]:
    """What the running Python lacks for `need`."""
    lacking = []
    for package, oldest in NEEDS[need].items():
        version = version_of(package)
        if version is None or version < numbers(oldest):
            lacking.append(f"{package}>={oldest}")
    if need == "test" and not lacking and not interpreter_works():
        lacking.append("a NumPy that suits Triton's interpreter")
    return lacking


def interpreter_works() -> bool:
    command = [sys.executable, str(PROBE)]
    return subprocess.run(command, capture_output=True).returncode == 0


def say(text: str) -> None:
    print(f"[setup] {text}", file=sys.stderr, flush=True)


def install(python: Path, *arguments: str) -> bool:
    """Runs pip in the environment; True if it went well."""
    say("pip install " + " ".join(arguments))
    command = [str(python), "-m", "pip", "install", "--disable-pip-version-check"]
    # Python compiles what it imports; all of torch would take it half a minute here.
    command += ["--no-compile"]
    command += [] if sys.stderr.isatty() else ["--quiet", "--quiet", "--progress-bar=off"]
    return subprocess.run([*command, *arguments], stdout=sys.stderr, cwd=ROOT).returncode == 0


def require(ok: bool, what: str) -> None:
    if not ok:
        raise SystemExit(f"[setup] could not install {what}; pip's message is above")


def create(home: Path) -> None:
    """A fresh environment with pip, also where Python lacks ensurepip."""
    say(f"creating {home.relative_to(ROOT)} with Python {sys.version.split()[0]}")
    shutil.rmtree(home, ignore_errors=True)
    python = home / "bin" / "python"
    bare = importlib.util.find_spec("ensurepip") is None
    options = ["--without-pip"] if bare else []
    subprocess.run([sys.executable, "-m", "venv", *options, str(home)], check=True)
    if bare:
        pip = importlib.util.find_spec("pip")
        if pip is None or pip.origin is None:
            raise SystemExit("[setup] this Python has neither ensurepip nor pip: install one")
        # The system's pip, run by the new interpreter, installs a pip for it.
        env = {**os.environ, "PYTHONPATH": str(Path(pip.origin).parents[1])}
        pip_install = [str(python), "-m", "pip", "install", "--quiet", "--ignore-installed", "pip"]
        require(subprocess.run(pip_install, env=env).returncode == 0, "pip")


def has_nvidia_gpu() -> bool:
    return any(Path(device).exists() for device in ("/dev/nvidiactl", "/dev/dxg"))


def install_torch(python: Path) -> tuple[str, ...]:
    """Installs torch; returns what the other packages must keep to."""
    constraints = ("--constraint", str(CONSTRAINTS.relative_to(ROOT)))
    pins = re.findall(r"^[\w-]+==.+$", CONSTRAINTS.read_text(), re.MULTILINE)
    others = tuple(pin for pin in pins if not pin.startswith(("torch==", "triton==")))
    triton = tuple(pin for pin in pins if pin.startswith("triton=="))
    if has_nvidia_gpu():
        say("NVIDIA GPU found: installing torch with CUDA, several GB")
        require(install(python, "torch>=2.10"), "torch")
        return others  # This torch has brought a Triton of its own.
    if Path("/dev/kfd").exists():
        say("to use an AMD GPU, install torch for ROCm and start again; going on without")
    torch = next((pin for pin in pins if pin.startswith("torch==")), None)
    assert torch, "constraints.txt pins torch"
    cpu = f"{torch}+cpu"
    pytorch_org = ("--index-url", CPU_INDEX, "--timeout", "10", "--retries", "0")
    say("no NVIDIA GPU: looking for a CPU build of torch; pip may fail once or twice on the way")
    if install(python, cpu) or install(python, cpu, *pytorch_org):
        return constraints
    if install(python, "torch>=2.10", *pytorch_org):
        return others + triton
    say("no CPU build found: installing the default one, which can be several GB")
    require(install(python, "torch>=2.10"), "torch")
    return others


def update(need: str, python: Path) -> None:
    """Installs what `need` and pyproject.toml ask for."""
    if need == "triton-newest":
        require(install(python, NEWEST_TRITON, "numpy", "pytest", "pytest-xdist"), "Triton")
    else:
        constraints = install_torch(python)
        require(install(python, "--editable", ".[dev]", *constraints), "the dependencies")


def interpreter(need: str) -> Path:
    """A Python that meets `need`."""
    lacking = missing(need)
    if not lacking:
        return Path(sys.executable)
    home = ROOT / (".venv-triton-newest" if need == "triton-newest" else ".venv")
    # Settings of tools, which come last, ask for no package.
    project = (ROOT / "pyproject.toml").read_text().split("\n[tool.")[0]
    sources = project + CONSTRAINTS.read_text() + Path(__file__).read_text()
    key = hashlib.sha256(sources.encode()).hexdigest()
    stamp, python = home / "stamp", home / "bin" / "python"
    if not (python.exists() and stamp.exists() and stamp.read_text() == key):
        say(f"{sys.executable} lacks {', '.join(lacking)}")
        start = time.monotonic()
        # Without a stamp it was never finished.
        if not (python.exists() and stamp.exists()):
            create(home)
        update(need, python)
        stamp.write_text(key)
        say(f"ready in {time.monotonic() - start:.0f} s")
    return python


def main() -> None:
    if len(sys.argv) < 3 or sys.argv[1] not in NEEDS:
        raise SystemExit(f"usage: bootstrap.py {{{','.join(NEEDS)}}} ARGUMENT...")
    if sys.version_info < (3, 10):  # noqa: UP036 Nothing has checked it yet.
        raise SystemExit(f"[setup] Python {sys.version.split()[0]} is too old: 3.10 is needed")
    python, arguments = interpreter(sys.argv[1]), sys.argv[2:]
    if python == Path(sys.executable) and "-n" in arguments and not version_of("pytest-xdist"):
        at = arguments.index("-n")
        del arguments[at : at + 2]
    path = os.pathsep.join(filter(None, [str(ROOT / "src"), os.environ.get("PYTHONPATH")]))
    os.chdir(ROOT)
    os.execve(python, [str(python), *arguments], {**os.environ, "PYTHONPATH": path})


if __name__ == "__main__":
    main()
