"""The smallest Typer program: what a command line costs before it does anything."""

import typer

app = typer.Typer()


@app.callback()
def entry() -> None:
    """A program that does nothing."""


@app.command()
def nothing() -> None:
    """Nothing."""


if __name__ == "__main__":
    app()
