"""Read YAML with the place of every value kept, so that an error can name the file and the line.

`extends:` names one parent (two levels at most); maps merge, lists replace; `--set` comes last.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from robustkd.catalog import Shelf
from robustkd.errors import ConfigError, nearest
from robustkd.resources import Kind, find

Key = tuple[str | int, ...]
M = TypeVar("M", bound=BaseModel)
MAX_LEVELS = 2
#: PyYAML lets a ValueError through for a date such as 2024-13-45, and a RecursionError for deep nesting
_NOT_YAML = (yaml.YAMLError, ValueError, RecursionError)


@dataclass
class Source:
    """Plain values, and where each came from: a key path -> "file.yaml, line 3"."""

    values: dict[str, Any] = field(default_factory=dict)
    origins: dict[Key, str] = field(default_factory=dict)

    def where(self, key: Key) -> str:
        """The origin of a key, or of the nearest part above it."""
        while key and key not in self.origins:
            key = key[:-1]
        return self.origins.get(key, "")


def read_yaml(path: Path) -> Source:
    """One file; no tags, no aliases, a mapping at the top.

    Raises:
        ConfigError: the file cannot be read, is not YAML, or repeats a key.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"cannot read {path.name}: {error}", where=str(path), fix="give a readable UTF-8 YAML file"
        ) from error
    try:
        _refuse_aliases(text, path)
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        values = yaml.safe_load(text)
    except _NOT_YAML as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise ConfigError(
            f"not valid YAML: {getattr(error, 'problem', error)}", where=f"{path}{line}", fix="mend this line"
        ) from error
    if not isinstance(values, dict) or not isinstance(node, yaml.MappingNode):
        raise ConfigError("the file holds no mapping", where=str(path), fix="write `key: value` lines")
    source = Source(values)
    _mark(node, (), path, source.origins)
    return source


def _refuse_aliases(text: str, path: Path) -> None:
    """An alias can name its own ancestor, or unfold to billions of values; `extends` does its work."""
    for token in yaml.scan(text, Loader=yaml.SafeLoader):
        if isinstance(token, yaml.AliasToken):
            line = token.start_mark.line + 1
            raise ConfigError(
                "YAML aliases are not read", where=f"{path}, line {line}", fix="write the value out, or use extends"
            )


def _mark(node: yaml.Node, key: Key, path: Path, origins: dict[Key, str]) -> None:
    origins.setdefault(key, f"{path}, line {node.start_mark.line + 1}")
    if isinstance(node, yaml.MappingNode):
        for name, child in node.value:
            inner = (*key, str(name.value))
            if inner in origins:
                raise ConfigError(
                    f"{'.'.join(map(str, inner))} is given twice",
                    where=f"{path}, line {name.start_mark.line + 1}",
                    fix="keep one of the two",
                )
            origins[inner] = f"{path}, line {name.start_mark.line + 1}"
            _mark(child, inner, path, origins)
    elif isinstance(node, yaml.SequenceNode):
        for index, child in enumerate(node.value):
            _mark(child, (*key, index), path, origins)


def read(kind: Kind, name: str) -> Source:
    """A shipped or user's file with its parents merged in.

    Raises:
        ConfigError: a file is missing or wrong, or `extends` goes in a circle or too deep.
    """
    path = find(kind, name)
    chain: list[Path] = []
    sources: list[Source] = []
    while True:
        if path.resolve() in chain:
            raise ConfigError(f"extends goes in a circle: {path.name}", where=str(path), fix="name another parent")
        chain.append(path.resolve())
        source = read_yaml(path)
        parent = source.values.pop("extends", None)
        sources.append(source)
        if parent is None:
            break
        if not isinstance(parent, str):
            raise ConfigError("extends names one parent", where=source.where(("extends",)), fix="extends: _cifar10")
        if len(chain) > MAX_LEVELS:
            raise ConfigError(
                "extends goes deeper than two levels", where=source.where(("extends",)), fix="extend a higher parent"
            )
        path = find(kind, parent, beside=path.parent)
    merged = Source()
    for source in reversed(sources):
        _merge(merged, source)
    merged.values.setdefault("name", find(kind, name).stem)
    return merged


def _merge(into: Source, child: Source) -> None:
    # the file's own `name` is no shelf entry's: it never replaces the parent
    replaced: list[Key] = []
    into.values |= {k: _merged(into.values.get(k), v, (k,), replaced) for k, v in child.values.items()}
    kept = {key: place for key, place in into.origins.items() if not any(key[: len(r)] == r for r in replaced)}
    into.origins = kept | child.origins


def _merged(base: Any, child: Any, key: Key, replaced: list[Key]) -> Any:
    """Maps merge; everything else of the child replaces, and its key is noted."""
    if isinstance(base, str) and isinstance(child, dict) and "name" not in child:
        base = {"name": base}  # `method: dgad` is short for `method: {name: dgad}`
    same = isinstance(base, dict) and isinstance(child, dict)
    if same and "name" in child and "name" in base and child["name"] != base["name"]:
        same = False  # another shelf entry: the parent's knobs are not its knobs
    if not same:
        replaced.append(key)
        return child
    return {**base, **{k: _merged(base.get(k), v, (*key, k), replaced) for k, v in child.items()}}


def override(source: Source, settings: Iterable[str]) -> Source:
    """Apply `--set key.path=value` settings; the value is YAML.

    Raises:
        ConfigError: a setting is not of that form, or walks through a value that is no mapping.
    """
    for setting in settings:
        dotted, equals, text = setting.partition("=")
        if not equals or not dotted:
            raise ConfigError(f"{setting!r} is not a setting", where="--set", fix="write --set train.epochs=2")
        try:
            value = yaml.safe_load(text)
        except _NOT_YAML as error:
            raise ConfigError(f"{text!r} is not YAML", where=f"--set {setting}", fix="quote the value") from error
        keys = dotted.split(".")
        nested: Any = value
        for part in reversed(keys):
            nested = {part: nested}
        child = Source(nested, {key: f"--set {setting}" for key in _paths(nested, ())})
        if keys[0] == "teachers" and len(keys) > 1:
            raise ConfigError("teachers is a list", where=f"--set {setting}", fix="--set 'teachers=[{id: NAME}]'")
        _merge(source, child)
    return source


def _paths(value: Any, key: Key) -> Iterator[Key]:
    """Every key path of nested maps and lists."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, inner in items:
        yield (*key, name)
        yield from _paths(inner, (*key, name))


def validate(model: type[M], source: Source) -> M:
    """Frozen pydantic from plain values; the first error names key, file, line and the nearest valid name.

    Raises:
        ConfigError: an unknown key, a missing one, a wrong type or a value out of range.
    """
    try:
        return model.model_validate(source.values)
    except ValidationError as error:
        raise _explain(model, error, source) from None


def _explain(model: type[BaseModel], error: ValidationError, source: Source) -> ConfigError:
    first = error.errors()[0]
    location: Key = tuple(first["loc"])
    key = ".".join(str(part) for part in location)
    cause = first.get("ctx", {}).get("error")
    message = first["msg"].removeprefix("Value error, ")
    fix = getattr(cause, "fix", "")
    about: Key = (*location, *getattr(cause, "key", ()))
    if first["type"] == "extra_forbidden":
        owner = field_names(model, source.values, location[:-1])
        message, fix = f"{key} is not a field", nearest(str(location[-1]), owner) if owner else ""
    elif first["type"] == "missing":
        message, fix = f"{key} is missing", f"add {location[-1]} to the file, or --set {key}=..."
    elif first["type"] == "literal_error":
        message, fix = f"{key}: {message[0].lower()}{message[1:]}", _choice(first)
    elif key:
        message = f"{key}: {message[0].lower()}{message[1:]}"
        shown = json.dumps(first.get("input"), default=str)
        fix = fix or f"it is {shown[:80]}"
    return ConfigError(message, where=source.where(about), fix=fix)


def _choice(error: Any) -> str:
    """The nearest of the words a field takes."""
    words = re.findall(r"'([^']*)'", str(error["ctx"]["expected"]))
    return nearest(str(error.get("input")), words) if words else f"it is {error.get('input')!r}"


def field_names(model: type[BaseModel], values: Any, location: Key) -> list[str]:
    """The valid names beside an unknown key: the fields of the model that `location` leads to."""
    for part in location:
        if isinstance(values, dict):
            values = values.get(part)
        elif isinstance(values, list) and isinstance(part, int):
            values = values[part]
        if isinstance(part, int):
            continue
        found = _model_of(model.model_fields[part], values) if part in model.model_fields else None
        if found is None:
            return []
        model = found
    return list(model.model_fields)


def _inside(annotation: Any) -> Iterator[Any]:
    """An annotation and all that it is made of, `Annotated` extras included."""
    yield annotation
    for part in (*get_args(annotation), *getattr(annotation, "__metadata__", ())):
        yield from _inside(part)


def _model_of(info: FieldInfo, values: Any) -> type[BaseModel] | None:
    """The model behind a field: its annotation, or the shelf entry that the value's `name` selects."""
    candidates = list(_inside(info.annotation))
    model = next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), None)
    shelf = next((c.shelf for c in (*info.metadata, *candidates) if hasattr(c, "shelf")), None)
    if shelf is not None and isinstance(values, dict) and isinstance(values.get("name"), str):
        entry = Shelf(shelf).get(values["name"].partition(":")[0])
        return entry.Config if shelf == "methods" else entry  # type: ignore[no-any-return]
    return model
