"""Builds hub/build/torch-{cuda,rocm,cpu}/: what a kernel repository on the Hugging Face Hub holds.

    python hub/build.py [--out FOLDER]

A kernel is imported from outside `sys.path`, several versions of it side by side. So sources are
copied with relative imports only, and operators move to a namespace of their own, the kernel's id.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import re
import shutil
from pathlib import Path

HUB = Path(__file__).resolve().parent
SRC = HUB.parent / "src" / "tilewise"
# Hosts, command line and what needs another package stay behind.
LEFT_OUT = ("__main__.py", "cli", "integrations", "py.typed", "tune")
# Where ops.py and layer.py name their namespace.
NAMESPACE = re.compile(r'torch\.ops\.tilewise\.|Library\("tilewise"|"tilewise::')


def general() -> dict[str, str]:
    """Name, version and license of build.toml; Python 3.10 has no TOML reader."""
    text = (HUB / "build.toml").read_text()
    return dict(re.findall(r'^(name|version|license) = "?([^"\n]+)"?$', text, re.MULTILINE))


def backends() -> list[str]:
    """The backends that build.toml lists."""
    match = re.search(r"^backends = \[(.*)\]$", (HUB / "build.toml").read_text(), re.MULTILINE)
    assert match is not None
    return re.findall(r'"(\w+)"', match.group(1))


def sources() -> dict[str, str]:
    """Text of each file by path in the kernel, with the operators' namespace still ours."""
    files: dict[str, str] = {}
    for path in sorted([*SRC.rglob("*.py"), *SRC.rglob("tables/*.json")]):
        relative = path.relative_to(SRC)
        if relative.parts[0] not in LEFT_OUT and "__pycache__" not in relative.parts:
            files[relative.as_posix()] = path.read_text()
    files["layers.py"] = (HUB / "layers.py").read_text()
    files["__init__.py"] = _with_layers(files["__init__.py"])
    return files


def _with_layers(text: str) -> str:
    """`kernels` looks for layers in the module itself."""
    first = text.index("\nfrom .")
    text = text[: first + 1] + "from . import layers\n" + text[first + 1 :]
    return text.replace('    "fused_experts",\n', '    "fused_experts",\n    "layers",\n')


def renamed(files: dict[str, str], namespace: str) -> dict[str, str]:
    """The files with every operator in `namespace`."""

    def rename(match: re.Match[str]) -> str:
        return match.group().replace("tilewise", namespace)

    return {name: NAMESPACE.sub(rename, text) for name, text in files.items()}


def problems(files: dict[str, str]) -> list[str]:
    """What would not survive being loaded from another place under another name."""
    found = []
    for name, text in files.items():
        depth = len(Path(name).parts)
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Import):
                if any(alias.name.split(".")[0] == "tilewise" for alias in node.names):
                    found.append(f"{name}:{node.lineno} imports tilewise by name")
            elif isinstance(node, ast.ImportFrom):
                if node.level == 0 and (node.module or "").split(".")[0] == "tilewise":
                    found.append(f"{name}:{node.lineno} imports from tilewise by name")
                if node.level > depth:
                    found.append(f"{name}:{node.lineno} imports from above the kernel")
        if NAMESPACE.search(text):
            found.append(f"{name} still names our operators")
    return found


def build(out: Path) -> list[Path]:
    """Writes one folder for each backend; returns them."""
    about, files = general(), sources()
    digest = hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()[:12]
    folders = []
    for backend in backends():
        # Unique for every content and backend, and a Python name: torch needs that.
        identity = f"_{about['name']}_{backend}_{digest}"
        contents = renamed(files, identity)
        wrong = problems(contents)
        if wrong:
            raise SystemExit("cannot be packaged:\n" + "\n".join(wrong))
        folder = out / f"torch-{backend}"
        shutil.rmtree(folder, ignore_errors=True)
        for name, text in contents.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        metadata = {
            "id": identity,
            "name": about["name"],
            "version": int(about["version"]),
            "license": about["license"],
            "python-depends": [],
            "backend": {"type": backend},
        }
        (folder / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")
        shutil.copy(HUB.parent / "LICENSE", folder / "LICENSE")
        folders.append(folder)
    return folders


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=HUB / "build")
    for folder in build(parser.parse_args().out):
        print(folder)


if __name__ == "__main__":
    main()
