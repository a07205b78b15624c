"""Who may import whom. Read from the sources, so that a lazy import counts like any other."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SRC = Path(__file__).resolve().parents[2] / "src" / "tilewise"

# Lower never imports higher. The package itself gathers the public names, so it stands above them.
LEVELS = {
    "target": 0, "models": 0, "ragged": 0,
    "dispatch": 1, "formats": 1,
    "moe": 2, "retrieval": 2,
    "checkpoints": 3, "parallel": 3, "tune": 3, "compress": 3,
    "": 4,
    "integrations": 5,
    "cli": 6, "__main__": 6,
}  # fmt: skip
HOSTS = {"transformers", "vllm", "sglang"}


def module_name(path: Path) -> str:
    """Dotted name below `tilewise`; "" for the package itself."""
    parts = path.relative_to(SRC).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(SRC.rglob("*.py"))}


def imports(module: str) -> set[str]:
    """Absolute names that a module imports; ours start with "tilewise"."""
    path = MODULES[module]
    package = ["tilewise", *(part for part in module.split(".") if part)]
    if path.name != "__init__.py":
        package.pop()
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                # `from . import x` names a module, `from .x import y` usually does not.
                full = f"{source}.{alias.name}"
                found.add(full if full.removeprefix("tilewise.") in MODULES else source)
    return found


def our_imports(module: str) -> set[str]:
    ours = {name for name in imports(module) if name.split(".")[0] == "tilewise"}
    return {name.removeprefix("tilewise").removeprefix(".") for name in ours}


def level(module: str) -> int:
    return LEVELS[module.split(".")[0]]


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down(module: str) -> None:
    assert module.split(".")[0] in LEVELS, "a new room: give it a level"
    for imported in our_imports(module):
        assert level(imported) <= level(module), f"{module or 'tilewise'} imports {imported}"


@pytest.mark.parametrize("module", [name for name in MODULES if "kernels" in name.split(".")])
def test_kernels_import_triton_alone(module: str) -> None:
    for imported in imports(module):
        ours = imported.startswith("tilewise.") and "kernels" in imported.split(".")
        assert imported.split(".")[0] in ("triton", "__future__") or ours, imported


@pytest.mark.parametrize("module", [name for name in MODULES if name.endswith("reference")])
def test_reference_reaches_no_kernel(module: str) -> None:
    reached, queue = {module}, [module]
    while queue:
        new = our_imports(queue.pop()) - reached
        reached |= new
        queue += new
    assert not [name for name in reached if "kernels" in name.split(".")]


@pytest.mark.parametrize(
    "module", [name for name in MODULES if name.split(".")[0] in ("target", "models", "dispatch")]
)
def test_decisions_need_no_torch(module: str) -> None:
    """What is imported with these modules; a function may still import torch when called."""
    for node in ast.parse(MODULES[module].read_text()).body:
        if isinstance(node, ast.Import):
            assert "torch" not in [alias.name.split(".")[0] for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            assert (node.module or "").split(".")[0] != "torch"


def test_import_brings_no_host() -> None:
    code = "import sys, tilewise; print(*sys.modules)"
    command = [sys.executable, "-c", code]
    env = {"PYTHONPATH": str(SRC.parent), "PATH": ""}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=env)
    loaded = set(done.stdout.split())
    assert "tilewise.moe.layer" in loaded
    assert not loaded & HOSTS
    assert not {name for name in loaded if name.startswith(("tilewise.integ", "tilewise.cli"))}


def test_nothing_is_autotuned_at_launch() -> None:
    """`triton.autotune` breaks graph capture, lets ranks disagree and dies in the interpreter."""
    for module, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            name = getattr(node, "attr", getattr(node, "id", ""))
            assert name not in ("autotune", "make_block_ptr"), f"{module}: {name}"
