"""Find the recipes, target profiles and policies that ship with robustkd, in a wheel or in a checkout."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from robustkd.errors import ConfigError, nearest

Kind = Literal["recipe", "target", "policy"]

_PACKAGE = Path(__file__).parent
_FOLDERS: dict[Kind, tuple[Path, ...]] = {
    "recipe": (_PACKAGE / "_recipes", _PACKAGE.parent / "recipes"),
    "target": (_PACKAGE / "_targets", _PACKAGE.parent / "export"),
    "policy": (_PACKAGE / "auditing" / "policies",),
}


def shipped(kind: Kind) -> dict[str, Path]:
    """Every shipped file of a kind by name; files that begin with an underscore are parents only."""
    for folder in _FOLDERS[kind]:
        if folder.is_dir():
            return {f.stem: f for f in sorted(folder.glob("*.yaml")) if not f.stem.startswith("_")}
    return {}


def find(kind: Kind, name: str, *, beside: Path | None = None) -> Path:
    """The file of a shipped name, or the user's own file.

    A path wins over a name; a parent named by `extends` is looked for beside its child first.

    Raises:
        ConfigError: there is no such file.
    """
    given = Path(name).expanduser()
    if given.suffix in (".yaml", ".yml") or given.parent != Path():
        if beside is not None and (beside / given).is_file():
            return beside / given
        if given.is_file():
            return given
        raise ConfigError(f"there is no {kind} file {name}", where=str(Path.cwd()), fix=_known(kind, given.stem))
    if beside is not None and (near := beside / f"{name}.yaml").is_file():
        return near
    for folder in _FOLDERS[kind]:
        if (file := folder / f"{name}.yaml").is_file():
            return file
    raise ConfigError(
        f"{name} is not a shipped {kind}", where=f"{kind} {name}", fix=_known(kind, name) + "; or give a path to a .yaml file"
    )


def _known(kind: Kind, name: str) -> str:
    names = shipped(kind)
    return nearest(name, names) if names else f"no {kind} files are installed"
