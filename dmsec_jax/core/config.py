"""Frozen dataclass configs that are pytrees, and their strict reading from YAML.

`float` fields are traced leaves, so a sweep over them does not recompile and `vmap` over configs works; all others
(`float | None` and `tuple[float, ...]` too) are static. Therefore never branch in Python on a float field, and validate
floats where the config is read, not in `__post_init__` (jax re-runs it with tracers).
"""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import yaml

from dmsec_jax.core.checks import fail, require

T = TypeVar("T")


@typing.dataclass_transform(frozen_default=True, kw_only_default=True)
def config(cls: type[T]) -> type[T]:
    """Class decorator: frozen keyword-only dataclass and pytree; its `float` and nested config fields are the leaves.

    Raises:
        ValueError: if an annotation is a string (as under `from __future__ import annotations`), since every field
            would silently become static.
    """
    cls = dataclasses.dataclass(frozen=True, kw_only=True)(cls)
    fields = dataclasses.fields(cls)
    for f in fields:
        cure = "remove the quotes or `from __future__ import annotations`"
        require(not isinstance(f.type, str), f"{cls.__name__}.{f.name}", "annotated with a type", repr(f.type), cure)
    traced = [f.name for f in fields if f.type is float or dataclasses.is_dataclass(f.type)]
    static = [f.name for f in fields if f.name not in traced]
    cls.__no_type_check__ = (
        True  # jax rebuilds configs with tracers, axes or sentinels where floats stood; `from_dict` checks the types
    )
    return jax.tree_util.register_dataclass(cls, data_fields=traced, meta_fields=static)


def to_dict(cfg: Any) -> dict[str, Any]:
    """Plain Python values (tuples become lists, paths strings, batched floats nested lists), ready for JSON or YAML."""

    def plain(value):
        if dataclasses.is_dataclass(value):
            return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        if isinstance(value, (list, tuple)):
            return [plain(item) for item in value]
        if isinstance(value, (str, bool, int, float, type(None))):
            return value
        return str(value) if isinstance(value, Path) else value.tolist()

    return plain(cfg)


def from_dict(cls: type[T], values: object, where: str = "config") -> T:
    """Builds `cls` from a mapping; nested mappings fill nested configs.

    Raises:
        ValueError: on an unknown key (names the nearest known one), a missing key without a default, or a value of the
            wrong type (names the expected one).
    """
    if not isinstance(values, Mapping):
        raise fail(where, "a mapping of option to value", type(values).__name__, "write `name: value` lines")
    known = {f.name: f for f in dataclasses.fields(cls) if f.init}
    kinds = {name: f.type for name, f in known.items()}
    if any(isinstance(kind, str) for kind in kinds.values()):
        kinds = typing.get_type_hints(cls)
    filled = {}
    for name, value in values.items():
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            cure = f"did you mean {near[0]!r}?" if near else f"known keys are {', '.join(sorted(known))}"
            raise fail(where, f"made of keys of {cls.__module__}.{cls.__name__}", f"unknown key {name!r}", cure)
        filled[name] = _convert(kinds[name], value, f"{where}.{name}")
    unset = dataclasses.MISSING
    missing = [n for n, f in known.items() if n not in filled and f.default is unset and f.default_factory is unset]
    require(not missing, where, f"complete for {cls.__name__}", f"no {', '.join(missing)}", "add the missing keys")
    return cls(**filled)


def load(cls: type[T], path: str | Path, overrides: Sequence[str] = ()) -> T:
    """Reads a YAML file of values; `overrides` are `key=value` strings (dots for nested keys) that win over the file.

    Raises:
        ValueError: on unreadable YAML, unknown, repeated or missing keys, or wrong types.
        FileNotFoundError: if there is no such file.
    """
    contract, cure = "a YAML file", "correct the path"
    if not Path(path).exists():
        raise FileNotFoundError(str(fail(str(path), contract, "nothing", cure)))
    require(not Path(path).is_dir(), str(path), contract, "a folder", cure)
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise fail(str(path), "UTF-8 text", str(error), "save it as UTF-8") from error
    values = _read_yaml(text, str(path))
    values = {} if values is None else values
    require(
        isinstance(values, dict), str(path), "a mapping of option to value", repr(values), "write `name: value` lines"
    )
    _override(values, overrides)
    return from_dict(cls, values, str(path))


def override(cfg: T, overrides: Sequence[str]) -> T:
    """`cfg` with `key=value` strings applied (dots for nested keys); raises as `load`."""
    values = to_dict(cfg)
    _override(values, overrides)
    return from_dict(type(cfg), values, "override")


def _override(values: dict[str, Any], overrides: Sequence[str]) -> None:
    """Writes `key=value` strings into nested plain values, in place."""
    for item in overrides:
        name, equals, text = item.partition("=")
        require(bool(equals), "override", "of the form key=value", repr(item), "write for example num_steps=50")
        node = values
        *parents, last = name.split(".")
        for parent in parents:
            if node.get(parent) is None:
                node[parent] = {}
            node = node[parent]
            cure = "drop the part after the dot"
            require(isinstance(node, dict), "override", f"nested only where {parent} is a mapping", repr(item), cure)
        node[last] = _read_yaml(text, f"override {name}")


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader that refuses a key written twice, where YAML would silently keep the last."""

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} appears twice", node.start_mark)
        return super().construct_mapping(node, deep)


def _read_yaml(text: str, where: str) -> Any:
    try:
        return yaml.load(text, _StrictLoader)
    except yaml.YAMLError as error:
        raise fail(where, "valid YAML", " ".join(str(error).split()), "correct it") from error


def _convert(kind: Any, value: Any, where: str) -> Any:
    """`value` as `kind`; takes what YAML gives (lists for tuples, ints and `1e-4` strings for floats), no more."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        return value if isinstance(value, kind) else from_dict(kind, value, where)
    if origin in (typing.Union, types.UnionType):
        return _convert_union(kind, value, where)
    if origin is typing.Literal:
        if any(type(value) is type(choice) and value == choice for choice in args):
            return value
        raise fail(where, f"one of {', '.join(map(repr, args))}", repr(value), "choose one of them")
    if origin is tuple and isinstance(value, (list, tuple)):
        if len(args) == 2 and args[1] is Ellipsis:
            return tuple(_convert(args[0], item, f"{where}[{i}]") for i, item in enumerate(value))
        if len(args) == len(value):
            return tuple(_convert(a, v, f"{where}[{i}]") for i, (a, v) in enumerate(zip(args, value, strict=True)))
    elif kind is float and not isinstance(value, bool):
        try:  # YAML 1.1 reads 1e-4 (no dot) as a string
            number = float(value)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if not math.isnan(number):
            return number
    elif isinstance(kind, type) and isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
        return value
    elif kind is Path and isinstance(value, str):
        return Path(value)
    name = getattr(kind, "__name__", str(kind)) if origin is None else str(kind)
    raise fail(
        where, f"of type {name}", repr(value), "quote it to keep it text" if kind is str else "correct the value"
    )


def _convert_union(kind: Any, value: Any, where: str) -> Any:
    """The first alternative that takes `value`; with one alternative beside None, its own error says what was wrong."""
    choices = [choice for choice in typing.get_args(kind) if choice is not type(None)]
    if value is None and type(None) in typing.get_args(kind):
        return None
    for choice in choices:
        try:
            return _convert(choice, value, where)
        except ValueError:
            if len(choices) == 1:
                raise
    names = " or ".join(getattr(choice, "__name__", str(choice)) for choice in choices)
    raise fail(where, f"of type {names}", repr(value), "correct the value")
