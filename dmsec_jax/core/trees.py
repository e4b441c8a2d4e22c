"""Parameter trees as flat `{path: leaf}` tables, and selection of leaves by path."""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from dmsec_jax.core.checks import fail, require


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dict -> {"a/b/kernel": leaf}, in the order of `jax.tree.leaves`; an empty branch leaves no trace.

    Raises:
        ValueError: if a name is empty or holds "/", since `unflatten` could not restore it.
    """
    flat = {}
    for name in tree:
        require(
            name != "" and "/" not in name,
            "tree",
            "made of names without '/'",
            f"{name!r} under {prefix!r}",
            "rename it",
        )
    for name in sorted(tree):
        path = f"{prefix}{name}"
        if isinstance(tree[name], Mapping):
            flat.update(flatten(tree[name], path + "/"))
        else:
            flat[path] = tree[name]
    return flat


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """{"a/b/kernel": leaf} -> nested dict; the inverse of `flatten`.

    Raises:
        ValueError: if one path is a prefix of another (a leaf cannot also be a branch), or a leaf is a mapping.
    """
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        require(not isinstance(leaf, Mapping), path, "an array", "a mapping", "flatten it first")
        *branches, name = path.split("/")
        node = tree
        for branch in branches:
            node = node.setdefault(branch, {})
            if not isinstance(node, dict):
                raise fail("paths", "free of prefixes of one another", path, "rename one of the two")
        if name in node:
            raise fail("paths", "free of prefixes of one another", path, "rename one of the two")
        node[name] = leaf
    return tree


def map_paths(fn: Callable[[str, Any], Any], tree: Mapping[str, Any]) -> dict[str, Any]:
    """Applies `fn(path, leaf)` to every leaf and keeps the structure."""
    return unflatten({path: fn(path, leaf) for path, leaf in flatten(tree).items()})


def count(tree: Mapping[str, Any]) -> int:
    """Number of scalars in the tree; works on `jax.eval_shape` results too."""
    return sum(math.prod(leaf.shape) for leaf in flatten(tree).values())


def match(paths: Iterable[str], patterns: Iterable[str]) -> list[str]:
    """The paths in which any of the regular expressions is found (`re.search`), in their own order.

    Raises:
        ValueError: if a pattern finds nothing, since a misspelt pattern would silently train nothing; if one is no
            regular expression; or if `patterns` is one string, whose letters would each be a pattern.
    """
    if isinstance(patterns, str):
        raise fail("patterns", "a list of regular expressions", repr(patterns), f"write [{patterns!r}]")
    paths = list(paths)
    chosen: set[str] = set()
    for pattern in patterns:
        try:
            found = [path for path in paths if re.search(pattern, path)]
        except re.error as error:
            raise fail("pattern", "a regular expression", repr(pattern), f"correct it: {error}") from error
        if not found:
            cure = f"paths look like {paths[:3]}"
            raise fail("pattern", "a regular expression found in some parameter path", repr(pattern), cure)
        chosen.update(found)
    return [path for path in paths if path in chosen]
