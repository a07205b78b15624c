"""What people copy runs: examples, Python blocks of every page, links between pages."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), ROOT / "bench" / "README.md"])
EXAMPLES = sorted(ROOT.glob("examples/*.py"))


def blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny random model, in the place of the one that a page names."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("model")
    config = transformers.Qwen3MoeConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, num_experts=4, num_experts_per_tok=2,
        moe_intermediate_size=16,
    )  # fmt: skip
    transformers.Qwen3MoeForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=name)
def test_python_of_page(page: Path, tiny_model: Path) -> None:
    """The blocks of a page run one after the other, in one namespace."""
    namespace: dict[str, Any] = {"__name__": "__page__"}
    for number, block in enumerate(blocks(page)):
        source = block.replace("Qwen/Qwen3-30B-A3B", str(tiny_model))
        exec(compile(source, f"{name(page)} block {number}", "exec"), namespace)
    if page.name == "README.md" and page.parent == ROOT:
        ids = torch.tensor([[1, 2, 3]])
        with torch.no_grad():
            assert namespace["model"](ids).logits.isfinite().all()
        assert namespace["model"].config._experts_implementation == "tilewise"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_link_of_page(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        file = target.split("#")[0]
        if file and "://" not in file:
            assert (page.parent / file).exists(), f"{name(page)} links to {target}"


@pytest.mark.parametrize("path", EXAMPLES, ids=name)
def test_example(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main()
    printed = capsys.readouterr().out
    assert printed
    if path.stem == "transformers_qwen3":
        assert "the same tokens: True" in printed


def test_demo_command(capsys: pytest.CaptureFixture[str]) -> None:
    """One short run of what `make demo` runs."""
    pytest.importorskip("typer")
    from typer.testing import CliRunner

    from tilewise.cli import app

    result = CliRunner().invoke(app, ["demo", "--tokens", "4", "--batch", "1", "--device", "cpu"])
    assert result.exit_code == 0, result.output
    assert "4/4" in result.output


def test_demo_notices_other_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo's verdict is worth something: experts that are off by a little fail it."""
    pytest.importorskip("typer")
    from typer.testing import CliRunner

    from tilewise.cli import app
    from tilewise.integrations import transformers as integration

    original = integration.fused_experts
    monkeypatch.setattr(
        integration, "fused_experts", lambda *args, **kwargs: original(*args, **kwargs) * 1.1
    )
    arguments = ["demo", "--tokens", "16", "--batch", "2", "--device", "cpu"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1, result.output
    assert "differ first at sequence" in result.output


def test_cli_help_and_version() -> None:
    pytest.importorskip("typer")
    from typer.testing import CliRunner

    import tilewise
    from tilewise.cli import app

    runner = CliRunner()
    assert "demo" in runner.invoke(app, ["--help"]).output
    assert runner.invoke(app, ["--version"]).output == f"tilewise {tilewise.__version__}\n"
