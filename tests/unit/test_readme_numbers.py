"""The README's numbers are those of the committed results."""

from pathlib import Path
from statistics import median
from typing import Any

from bench import readme


def test_readme_matches_the_results() -> None:
    text = (Path(__file__).parents[2] / "README.md").read_text()
    assert text == readme.updated(text), "run `python -m bench.readme`"


def test_losses_by_rounds_and_by_time() -> None:
    """Slower by rounds is not slower by time where one round of three was cold."""

    def row(routing: str, ours: list[float], theirs: list[float]) -> dict[str, Any]:
        peers = {
            name: {"us": median(rounds), "us_rounds": rounds}
            for name, rounds in (("tilewise", ours), ("triton_kernels", theirs))
        }
        return {"routing": routing, "peers": peers}

    rows = [
        row("hot", [11.0, 11.0, 11.0], [10.0, 10.0, 10.0]),
        row("uniform", [12.0, 12.5, 10.0], [9.0, 10.0, 20.0]),
        row("hot", [12.0, 9.0, 10.0], [9.0, 9.5, 10.5]),  # ratios 0.75, 1.06, 1.05
    ]
    rows[0]["peers"]["vllm"] = {"us": 10.5, "us_rounds": [10.5] * 3}
    said = readme._losses(rows)
    assert said.startswith("2 of 3 cells by rounds, by up to 25% (3 by time, by up to 20%): ")
    assert said.endswith("triton_kernels 3.5.1 in 2; 1 of the 2 with few experts (`hot`)")
