"""YAML with the origin of each value as a trailing comment."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from robustkd.recipe.reading import Key, Source

_MISSING = object()


def annotated(values: dict[str, Any], source: Source) -> str:
    """A resolved mapping as YAML; each line ends with where its value came from, or `default`."""
    lines = [*_mapping(values, (), 0, source)]
    width = min(max((len(text) for text, _ in lines), default=0), 60)
    return "\n".join(f"{text.ljust(width)}  # {origin}" if origin else text for text, origin in lines)


def _mapping(values: dict[str, Any], key: Key, depth: int, source: Source) -> Iterator[tuple[str, str]]:
    for name, value in values.items():
        inner = (*key, name)
        start = f"{'  ' * depth}{scalar(name)}:"
        if isinstance(value, dict) and value:
            yield start, ""
            yield from _mapping(value, inner, depth + 1, source)
        elif isinstance(value, (list, tuple)) and any(isinstance(item, dict) for item in value):
            yield start, ""
            for index, item in enumerate(value):
                yield from _item(item, (*inner, index), depth + 1, source)
        else:
            yield f"{start} {scalar(value)}", origin(inner, source)


def _item(item: dict[str, Any], key: Key, depth: int, source: Source) -> Iterator[tuple[str, str]]:
    lines = _mapping(item, key, depth + 1, source)
    text, where = next(lines)
    yield f"{'  ' * depth}- {text.lstrip()}", where
    yield from lines


def scalar(value: Any) -> str:
    """One value on one line of YAML."""
    import yaml

    plain = list(value) if isinstance(value, tuple) else value
    text = yaml.safe_dump(plain, default_flow_style=True, width=10**6, allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...")


def origin(key: Key, source: Source) -> str:
    """Where a resolved value was written, `default` if nowhere. A shorthand (`method: dgad`) counts for its name."""
    given: Any = source.values
    for depth, part in enumerate(key):
        if not isinstance(given, (dict, list)):
            # the file gave a bare name where the resolved recipe has a mapping
            return _written(key[:depth], source) if part == "name" else "default"
        given = _child(given, part)
        if given is _MISSING:
            return "default"
    return _written(key, source)


def _written(key: Key, source: Source) -> str:
    """The origin of a value that is in the files; one inside `--set a={b: 1}` has that of `a`."""
    while key and key not in source.origins:
        key = key[:-1]
    return _short(source.origins[key]) if key else "from the file's name"


def _child(given: Any, part: str | int) -> Any:
    if isinstance(given, dict):
        return given.get(part, _MISSING)
    return given[part] if isinstance(part, int) and part < len(given) else _MISSING


def _short(where: str) -> str:
    """`/long/path/x.yaml, line 3` -> `x.yaml, line 3`."""
    path, comma, line = where.rpartition(", line ")
    return f"{Path(path).name}{comma}{line}" if comma else where
