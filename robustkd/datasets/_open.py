"""A data set from what a user types: a name on the shelf, a folder in ImageFolder layout, or an .npz file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from robustkd.catalog import Shelf
from robustkd.datasets._base import DatasetConfig
from robustkd.errors import ArtifactError, ConfigError


def open_dataset(spec: str | dict[str, Any], root: Path | None = None) -> DatasetConfig:
    """The config of a data set; `root` overrides its folder.

    Raises:
        ConfigError: no data set has this name, or its options are wrong.
        ArtifactError: the path given does not exist.
    """
    values = spec if isinstance(spec, dict) else _values(spec)
    if root is not None:
        values = {**values, "root": str(root)}
    entry = Shelf("datasets").get(str(values.get("name", "")))
    try:
        config: DatasetConfig = entry.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(
            f"dataset.{'.'.join(map(str, first['loc']))}: {first['msg']}", where=str(spec), fix="see `robustkd list datasets`"
        ) from error
    return config


def _values(spec: str) -> dict[str, Any]:
    path = Path(spec).expanduser()
    if path.suffix == ".npz":
        if not path.is_file():
            raise ArtifactError("there is no such .npz file", where=spec, fix="check the path")
        return {"name": "npz", "train": [str(path.resolve())], "test": [str(path.resolve())]}
    if path.is_dir() and spec not in Shelf("datasets").names():
        return {"name": "folder", "path": str(path.resolve())}
    if path.parent != Path():
        raise ArtifactError("there is no such folder or .npz file", where=spec, fix="check the path, or name a data set")
    return {"name": spec}
