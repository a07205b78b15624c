"""Reads from vLLM's and SGLang's sources what the plug-ins rely on, for tests/integrations/*.json.

Command: ``python scripts/refresh_contracts.py WHEEL_OR_FOLDER...``; a wheel comes from
``pip download --no-deps vllm==VERSION`` (or ``sglang``). Nothing of a host is imported or run, and
of its text only names are kept.
"""

from __future__ import annotations

import argparse
import ast
import json
import re
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "src"))

from tilewise.integrations import sglang, vllm  # noqa: E402

EXPERTS = "vllm.model_executor.layers.fused_moe.modular_kernel:FusedMoEExpertsModular"
ACTIVATION = "vllm.model_executor.layers.fused_moe.activation:MoEActivation"


class Sources:
    """The Python files of a wheel, or of a folder with its contents."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.archive = zipfile.ZipFile(place) if place.is_file() else None
        names = self.archive.namelist() if self.archive else [p.name for p in place.iterdir()]
        matches = (re.match(r"(vllm|sglang)-([^/]+)\.dist-info", name) for name in names)
        found = {(match[1], match[2]) for match in matches if match}
        ((self.host, self.version),) = found

    def file(self, module: str) -> str:
        """The path of a module, or of a package's ``__init__``."""
        path = module.replace(".", "/")
        held = (self.place / f"{path}.py").exists() if self.archive is None else (
            f"{path}.py" in self.archive.namelist()
        )  # fmt: skip
        return f"{path}.py" if held else f"{path}/__init__.py"

    def module(self, name: str) -> ast.Module:
        path = self.file(name)
        text = self.archive.read(path) if self.archive else (self.place / path).read_bytes()
        return ast.parse(text)

    def definition(self, name: str) -> ast.ClassDef | ast.FunctionDef | None:
        """What ``module:Name`` or ``module:Class.method`` is, imports of the module followed."""
        module, _, path = name.partition(":")
        tree = self.module(module)
        body = tree.body
        found: ast.ClassDef | ast.FunctionDef | None = None
        for part in path.split("."):
            named = (
                node
                for node in body
                if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == part
            )
            found = next(named, None)
            if found is None:
                break
            body = found.body
        if found is not None:
            return found
        owner, _, method = path.partition(".")
        for origin in self.origins(module, tree, owner, path):
            return self.definition(origin)
        bases = self.classes(f"{module}:{owner}")[1:] if method else []
        for base in bases:
            return self.definition(f"{module}:{base.name}.{method}")
        return None

    def origins(self, module: str, tree: ast.Module, owner: str, path: str) -> Iterator[str]:
        """Where a module imports ``owner`` from."""
        for node in tree.body:
            if isinstance(node, ast.ImportFrom) and any(a.name == owner for a in node.names):
                parts = module.split(".")
                if self.file(module).endswith("/__init__.py"):
                    parts.append("")
                parents = parts[: -node.level] if node.level else []
                yield ".".join([*parents, node.module or ""]) + f":{path}"

    def classes(self, name: str) -> list[ast.ClassDef]:
        """A class and its bases in the same module, in order of lookup."""
        module, _, wanted = name.partition(":")
        here = {
            node.name: node for node in self.module(module).body if isinstance(node, ast.ClassDef)
        }
        found = []
        while wanted in here:
            found.append(here[wanted])
            bases = [base.id for base in here[wanted].bases if isinstance(base, ast.Name)]
            wanted = bases[0] if bases else ""
        return found


def parameters(sources: Sources, name: str) -> list[str] | None:
    node = sources.definition(name)
    if not isinstance(node, ast.FunctionDef):
        return None
    return [arg.arg for arg in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]


def members(node: ast.ClassDef) -> list[str]:
    names: list[str] = []
    for item in node.body:
        if isinstance(item, ast.FunctionDef):
            names.append(item.name)
        elif isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
            names.append(item.target.id)
        elif isinstance(item, ast.Assign):
            names += [target.id for target in item.targets if isinstance(target, ast.Name)]
    return names


def fields(node: ast.ClassDef) -> list[str]:
    """The fields of a dataclass or a named tuple, in order."""
    annotated = (item for item in node.body if isinstance(item, ast.AnnAssign))
    return [item.target.id for item in annotated if isinstance(item.target, ast.Name)]


def abstract(sources: Sources, name: str) -> list[str]:
    """Methods that a subclass must define."""
    decided: dict[str, bool] = {}
    for node in sources.classes(name):
        for item in node.body:
            if isinstance(item, ast.FunctionDef):
                marks = {mark.id for mark in item.decorator_list if isinstance(mark, ast.Name)}
                decided.setdefault(item.name, "abstractmethod" in marks)
    return sorted(method for method, is_abstract in decided.items() if is_abstract)


def activations(sources: Sources) -> list[str]:
    (node,) = sources.classes(ACTIVATION)
    return [
        str(item.value.value)
        for item in node.body
        if isinstance(item, ast.Assign) and isinstance(item.value, ast.Constant)
    ]


def public(sources: Sources, name: str) -> list[str]:
    """A dataclass's fields, or what another class and its bases offer: all, so that more shows."""
    of = fields if name.endswith("Config") else members
    names = {m for node in sources.classes(name) for m in of(node)}
    return sorted(name for name in names if not name.startswith("_"))


def of_vllm(sources: Sources) -> dict[str, object]:
    return {
        "functions": {name: parameters(sources, name) for name in vllm.FUNCTIONS},
        "members": {
            name: sorted({m for node in sources.classes(name) for m in members(node)} & set(wanted))
            for name, wanted in vllm.MEMBERS.items()
        },
        "public": {name: public(sources, name) for name in vllm.KNOWN},
        "abstract": abstract(sources, EXPERTS),
        "activations": activations(sources),
    }


def of_sglang(sources: Sources) -> dict[str, object]:
    owners = {name: sources.definition(name) for name in sglang.MEMBERS}
    return {
        "functions": {name: parameters(sources, name) for name in sglang.FUNCTIONS},
        "members": {
            name: fields(node) for name, node in owners.items() if isinstance(node, ast.ClassDef)
        },
    }


def order(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version)]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("sources", nargs="+", type=Path, help="wheels, or what was in them")
    for place in parser.parse_args().sources:
        sources = Sources(place)
        path = ROOT / "tests" / "integrations" / f"{sources.host}_contract.json"
        known = json.loads(path.read_text()) if path.exists() else {}
        known[sources.version] = {"vllm": of_vllm, "sglang": of_sglang}[sources.host](sources)
        in_order = {version: known[version] for version in sorted(known, key=order)}
        path.write_text(json.dumps(in_order, indent=1) + "\n")
        print("read", sources.host, sources.version)


if __name__ == "__main__":
    main()
