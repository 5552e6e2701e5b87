"""The console script ``controlnet-worker``."""

from __future__ import annotations

import typer

from experimance_controlnet import __version__, model_server

app = typer.Typer(
    help="Makes images steered by depth maps, over HTTP.",
    no_args_is_help=True,
    add_completion=False,
)


@app.command(
    add_help_option=False,  # --help goes on too: the flags are defined in one place
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def serve(context: typer.Context) -> None:
    """Start the model server; `serve --help` lists its flags."""
    model_server.main(context.args)


@app.command()
def version() -> None:
    """Print the version."""
    typer.echo(__version__)


if __name__ == "__main__":
    app()
