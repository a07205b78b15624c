"""`python -m tilewise`, the command where its folder is not on the path."""

from .cli import app

app(prog_name="tilewise")
