"""The README's numbers are those of the committed results."""

from pathlib import Path

from bench import readme


def test_readme_matches_the_results() -> None:
    text = (Path(__file__).parents[2] / "README.md").read_text()
    assert text == readme.updated(text), "run `python -m bench.readme`"
