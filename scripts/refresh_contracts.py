"""Reads from vLLM's sources what the plug-in relies on, for tests/integrations/vllm_contract.json.

Command: ``python scripts/refresh_contracts.py WHEEL_OR_FOLDER...``; a wheel comes from
``pip download --no-deps vllm==VERSION``. Nothing of vLLM is imported or run, and of its text only
names are kept.
"""

from __future__ import annotations

import argparse
import ast
import json
import re
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CONTRACT = ROOT / "tests" / "integrations" / "vllm_contract.json"
sys.path.insert(0, str(ROOT / "src"))

from tilewise.integrations.vllm import FUNCTIONS, MEMBERS  # noqa: E402

EXPERTS = "vllm.model_executor.layers.fused_moe.modular_kernel:FusedMoEExpertsModular"
ACTIVATION = "vllm.model_executor.layers.fused_moe.activation:MoEActivation"


class Sources:
    """The Python files of a wheel, or of a folder with its contents."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.archive = zipfile.ZipFile(place) if place.is_file() else None
        names = self.archive.namelist() if self.archive else [p.name for p in place.iterdir()]
        found = {
            match[1] for name in names if (match := re.match(r"vllm-([^/]+)\.dist-info", name))
        }
        (self.version,) = found

    def module(self, name: str) -> ast.Module:
        path = name.replace(".", "/") + ".py"
        text = self.archive.read(path) if self.archive else (self.place / path).read_bytes()
        return ast.parse(text)

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
    owner, _, method = name.rpartition(".")
    for node in sources.classes(owner):
        for item in node.body:
            if isinstance(item, ast.FunctionDef) and item.name == method:
                a = item.args
                return [arg.arg for arg in (*a.posonlyargs, *a.args, *a.kwonlyargs)]
    return None


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


def contract(sources: Sources) -> dict[str, object]:
    return {
        "functions": {name: parameters(sources, name) for name in FUNCTIONS},
        "members": {
            name: sorted({m for node in sources.classes(name) for m in members(node)} & set(wanted))
            for name, wanted in MEMBERS.items()
        },
        "abstract": abstract(sources, EXPERTS),
        "activations": activations(sources),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("sources", nargs="+", type=Path, help="wheels, or what was in them")
    known = json.loads(CONTRACT.read_text()) if CONTRACT.exists() else {}
    for place in parser.parse_args().sources:
        sources = Sources(place)
        known[sources.version] = contract(sources)
        print("read vLLM", sources.version)
    CONTRACT.write_text(json.dumps(dict(sorted(known.items())), indent=1) + "\n")


if __name__ == "__main__":
    main()
