"""Whether kernels are interpreted: said once by Triton, and the same everywhere."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SOURCES = Path(__file__).resolve().parents[2] / "src"
CHECK = """
from triton.runtime.interpreter import InterpretedFunction
from tilewise.moe.kernels.combine import combine_kernel
from tilewise.moe.launch import INTERPRETED
assert isinstance(combine_kernel, InterpretedFunction) is INTERPRETED
print(INTERPRETED)
"""


@pytest.mark.parametrize(("word", "said"), [("TRUE", "True"), ("on", "True"), ("2", "False")])
def test_the_interpreter_by_any_word_of_tritons(word: str, said: str) -> None:
    path = os.pathsep.join([str(SOURCES), os.environ.get("PYTHONPATH", "")])
    env = os.environ | {"TRITON_INTERPRET": word, "PYTHONPATH": path}
    run = subprocess.run([sys.executable, "-c", CHECK], env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == said
