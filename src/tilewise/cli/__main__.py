"""`python -m tilewise.cli`."""

from . import app

app(prog_name="tilewise")
