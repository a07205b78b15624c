"""The command line: a module for each command, which imports what it needs when it runs."""

from __future__ import annotations

import sys

try:
    import typer
except ModuleNotFoundError:
    print("the command line needs typer and rich: pip install '.[cli]'", file=sys.stderr)
    raise SystemExit(2) from None

from .. import __version__
from .bench import bench
from .demo import demo
from .doctor import doctor
from .explain import explain
from .tune import tune
from .tune_export import tune_export

app = typer.Typer(
    name="tilewise",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"tilewise {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: bool = typer.Option(
        False, "--version", callback=_show_version, is_eager=True, help="Print the version."
    ),
) -> None:
    """Mixture-of-Experts layers at hardware speed, in portable Triton."""


for command in (demo, doctor, explain, bench, tune, tune_export):
    app.command()(command)
