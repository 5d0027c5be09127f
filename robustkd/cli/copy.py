"""`robustkd copy`: hand over a recipe, target profile or policy as one file that stands on its own."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from robustkd import __version__
from robustkd.cli._print import say
from robustkd.errors import ArtifactError, ConfigError, nearest

if TYPE_CHECKING:
    from robustkd.resources import Kind

_KINDS: dict[str, Kind] = {"recipe": "recipe", "target": "target", "policy": "policy"}


def copy(
    kind: Annotated[str, typer.Argument(metavar="KIND", help="recipe, target or policy.")],
    name: Annotated[str, typer.Argument(metavar="NAME", help="A shipped name, or a path to a YAML file.")],
    dest: Annotated[Path, typer.Argument(metavar="DEST", help="A folder, or the new file's name.")],
    force: Annotated[bool, typer.Option("--force", help="Overwrite a file that is there.")] = False,
) -> None:
    """Copy a recipe, target profile or policy out, to edit it. Parents it extends are merged in, so that one file is enough."""
    if kind not in _KINDS:
        raise ConfigError(f"there is no {kind} to copy", fix=nearest(kind, _KINDS))
    text = flattened(_KINDS[kind], name)
    file = dest / f"{Path(name).stem}.yaml" if dest.is_dir() else dest
    if file.suffix not in (".yaml", ".yml"):
        raise ConfigError(
            f"{file.name} is no YAML file name",
            where=str(file),
            fix="end it with .yaml, or name a folder that exists",
        )
    if file.exists() and not force:
        raise ArtifactError("there is a file here already", where=str(file), fix="choose another DEST, or add --force")
    if not file.parent.is_dir():
        raise ArtifactError("the folder does not exist", where=str(file.parent), fix=f"mkdir -p {file.parent}")
    from robustkd.bundle import write_atomic

    write_atomic(file, text.encode())
    say(f"wrote {file}")
    if kind == "recipe":
        say(f"run it with: robustkd run --recipe {file if file.parent != Path() else f'./{file}'}")


def flattened(kind: Kind, name: str) -> str:
    """The text of a file with its parents merged in: byte for byte if it has none."""
    import yaml

    from robustkd.cli._stock import head
    from robustkd.recipe.reading import read, read_yaml
    from robustkd.resources import find

    path = find(kind, name)
    text = path.read_text(encoding="utf-8")
    own = read_yaml(path).values
    if "extends" not in own:
        return text
    values = read(kind, name).values
    if "name" not in own:
        del values["name"]  # the reader's fallback is the file's name, and the copy may have another
    note = f"# Copied from robustkd {__version__}: {path.stem}, with the parents it extends merged in.\n"
    return head(text) + note + "\n" + yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=110)
