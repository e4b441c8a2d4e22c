"""The mapping between foreign state dicts (PyTorch names and layouts) and our trees: total and one-to-one, or an error.

A canonical key such as `down_blocks.0.resnets.1.conv1.weight` is the path `down_blocks_0/resnets_1/conv1/kernel`: dots
become slashes, a number is joined to the name before it. What `weight` means follows from the target tree's leaf:

- `kernel`: a convolution, [O, I, h, w] there and [h, w, I, O] here, or a linear layer, [O, I] there and [I, O] here;
- `scale` of a normalisation and `embedding` [vocabulary, width]: the same in both.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from dmsec_jax.checkpoints.io import INTACT, forget
from dmsec_jax.core import spread
from dmsec_jax.core.checks import fail, require
from dmsec_jax.core.trees import flatten, unflatten
from dmsec_jax.core.types import Params

Problem = tuple[str, str]
"""What kind of problem, and the key with it."""
Place = Callable[[str, np.ndarray], Any]
"""(path, view of a tensor in our layout and in the file's dtype) -> the tree's leaf: a copy, on the host or on devices."""
WEIGHTS = ("kernel", "scale", "embedding")
CONTRACT = "exactly the tensors that the configuration asks for"
CURE = "check that config and weights belong together"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rules:
    """How one family of checkpoints spells what our tree holds.

    Attributes:
        renames: (regular expression, template) pairs; the first that matches a whole key makes it canonical.
        ignored: regular expressions of whole keys that hold no parameter.
        prefix: written before every canonical key by `to_state` (reading needs a rename for it).
        numbered: names that end in `_<number>` in the checkpoint itself.
        names: whole key in the checkpoint -> canonical key, where no short rule says it; looked at before `renames`.
    """

    renames: tuple[tuple[str, str], ...] = ()
    ignored: tuple[str, ...] = ()
    prefix: str = ""
    numbered: tuple[str, ...] = ("linear_1", "linear_2")
    names: Mapping[str, str] = dataclasses.field(default_factory=dict)


UNET = Rules()
VAE = Rules(
    renames=tuple(  # attention as diffusers named it before 0.16; some files hold it as 1x1 convolutions
        (rf"((?:en|de)coder\.mid_block\.attentions\.\d+)\.{old}\.(weight|bias)", rf"\1.{new}.\2")
        for old, new in (("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("proj_attn", r"to_out.0"))
    )
)
TEXT_ENCODER = Rules(  # transformers 5 saves without the prefix and reads both; everything else expects it
    renames=((r"text_model\.(.+)", r"\1"),),
    ignored=(r"(text_model\.)?embeddings\.position_ids",),
    prefix="text_model.",
)
TEXT_ENCODER_2 = Rules(ignored=(r"text_model\.embeddings\.position_ids",))
"""With a projection beside it, the branch of that name is part of the tree."""


@dataclasses.dataclass(kw_only=True)
class Partial:
    """Leave to read weights that do not fit: what is unused or mis-shaped is left out, what is then missing is taken from a base model.

    Attributes:
        base: part ("unet", ...) -> parameters; a part that is not there must be complete.
        problems: filled in by the readers: every kind of problem with its key.
    """

    base: Mapping[str, Params] = dataclasses.field(default_factory=dict)
    problems: list[Problem] = dataclasses.field(default_factory=list)


def float32(path: str, view: np.ndarray) -> np.ndarray:
    """The `Place` of NumPy arrays that own their memory."""
    return np.array(view, np.float32, order="C")


def to_tree(state: Mapping[str, np.ndarray], rules: Rules, target: Params, name: str = "weights") -> Params:
    """Turns a state dict into the nested parameter tree, float32 NumPy arrays that own their memory.

    Args:
        state: key -> array in PyTorch layout, any floating dtype; mapped files are fine, each tensor is copied once.
        rules: the spelling of the state dict.
        target: tree of anything with `.shape`, from `jax.eval_shape` of the model's `init`.
        name: what to call the state dict in errors.

    Raises:
        ValueError: as `align`.
    """
    return placed(align(state, rules, target, name))


def placed(views: Mapping[str, np.ndarray], place: Place = float32) -> dict[str, Any]:
    """The tree of the views that `align` found, one leaf after the other, so that no more than one is in memory twice."""
    leaves = {}
    for path, view in views.items():
        leaves[path] = place(path, view)
        forget(view)
    return unflatten(leaves)


def settle(
    part: str, views: Mapping[str, np.ndarray], problems: list[Problem], target: Params, partial: Partial | None
) -> tuple[dict[str, np.ndarray], list[Problem]]:
    """What `compare` found, with what `partial` adds to it from its base, and the problems that stay."""
    if partial is None or not problems:
        return dict(views), problems
    partial.problems += [(kind, f"{part}: {what}") for kind, what in problems]
    found = flatten(spread.to_host(partial.base.get(part, {}))) | dict(views)
    absent = [("missing, and in no base model", path) for path in flatten(target).keys() - found.keys()]
    return {path: found[path] for path in flatten(target).keys() & found.keys()}, absent


def require_finite(views: Mapping[str, np.ndarray], rules: Rules, name: str) -> None:
    """Raises ValueError on NaN or infinity, with the tensor's name in the file."""
    for path, view in views.items():
        finite = np.isfinite(view).all()
        forget(view)
        if not finite:
            raise fail(f"tensor {spelling(path, rules)} of {name}", "finite", "NaN or infinity", INTACT)


def align(
    state: Mapping[str, np.ndarray], rules: Rules, target: Params, name: str = "weights"
) -> dict[str, np.ndarray]:
    """Finds each target leaf's tensor: path -> view in our layout, nothing copied. Arguments as `to_tree`.

    Raises:
        ValueError: one error that lists every missing, unused, mis-shaped, not floating or doubly given key, with found
            and expected shapes.
    """
    views, problems = compare(state, rules, target)
    if problems:
        raise complaint(name, CONTRACT, problems, CURE)
    return views


def compare(
    state: Mapping[str, np.ndarray], rules: Rules, target: Params
) -> tuple[dict[str, np.ndarray], list[Problem]]:
    """What `align` finds and what it complains about, for callers that want both."""
    leaves = flatten(target)
    views: dict[str, np.ndarray] = {}
    sources: dict[str, str] = {}
    problems: list[Problem] = []
    for key, tensor in state.items():
        if any(re.fullmatch(pattern, key) for pattern in rules.ignored):
            continue
        found = f"{key} {list(tensor.shape)}"
        path = _find(canonical(key, rules), leaves)
        if path is None:
            problems.append(("unused", found))
            continue
        view = _from_torch(tensor, path, len(leaves[path].shape))
        if path in sources:
            problems.append(("given twice", f"{found} and {sources[path]}"))
        elif view.shape != tuple(leaves[path].shape):
            problems.append(("mis-shaped", f"{found}, expected {_torch_shape(path, leaves[path].shape)}"))
        elif tensor.dtype.kind not in "fV":  # ml_dtypes reports kind V for bfloat16
            problems.append(("not floating point", f"{key} {tensor.dtype}"))
        else:
            views[path] = view
        sources[path] = key
    spelt = {key: name for name, key in rules.names.items()}
    for path in leaves.keys() - sources.keys():
        key = key_of(path, rules)
        shape = _torch_shape(path, leaves[path].shape)
        problems.append(("missing", f"{rules.prefix}{spelt.get(key, key)} {shape}"))
    return views, problems


def to_state(params: Params, rules: Rules) -> dict[str, np.ndarray]:
    """Turns a parameter tree into a state dict in PyTorch names and layouts: the inverse of `to_tree`, without copying.

    Raises:
        ValueError: if two paths would get the same key, or a kernel is neither a matrix nor a 2-D convolution.
    """
    state: dict[str, np.ndarray] = {}
    spelt = {key: name for name, key in rules.names.items()}
    for path, leaf in flatten(params).items():
        key = key_of(path, rules)
        key = rules.prefix + spelt.get(key, key)
        require(key not in state, f"path {path}", "the only one of its key", f"{key} twice", "rename one of the two")
        state[key] = _to_torch(path, np.asarray(leaf))
    return state


def complaint(name: str, contract: str, problems: list[Problem], cure: str) -> ValueError:
    """The one error for all problems, with the whole list."""
    kinds = sorted({kind for kind, _ in problems})
    counts = ", ".join(f"{sum(kind == k for k, _ in problems)} {kind}" for kind in kinds)
    lines = "".join(f"\n  {kind}: {what}" for kind, what in sorted(problems))
    return fail(name, contract, counts, f"{cure}:{lines}")


def canonical(key: str, rules: Rules) -> str:
    """The key in current diffusers spelling."""
    if key in rules.names:
        return rules.names[key]
    for pattern, template in rules.renames:
        if match := re.fullmatch(pattern, key):
            return match.expand(template)
    return key


def spelling(path: str, rules: Rules) -> str:
    """The name of a leaf in the checkpoint."""
    key = key_of(path, rules)
    return rules.prefix + next((name for name, own in rules.names.items() if own == key), key)


def path_of(key: str) -> str:
    """`a.0.b.weight` -> `a_0/b/weight`: the path of a canonical key, its last name unchanged."""
    parts: list[str] = []
    for name in key.split("."):
        if name.isdecimal() and parts:
            parts[-1] += f"_{name}"
        else:
            parts.append(name)
    return "/".join(parts)


def key_of(path: str, rules: Rules) -> str:
    """`a_0/b/kernel` -> `a.0.b.weight`: the canonical key of a path."""
    *branches, leaf = path.split("/")
    names = [b if b in rules.numbered else re.sub(r"_(?=\d+(_\d+)*$)", ".", b) for b in branches]
    return ".".join([*names, "weight" if leaf in WEIGHTS else leaf])


def _find(key: str, leaves: Mapping[str, Any]) -> str | None:
    """The target's path for a canonical key."""
    path = path_of(key)
    branch, _, leaf = path.rpartition("/")
    names = [f"{branch}/{kind}" if branch else kind for kind in WEIGHTS] if leaf == "weight" else [path]
    return next((name for name in names if name in leaves), None)


def _is_kernel(path: str) -> bool:
    return path.rpartition("/")[2] == "kernel"


def _from_torch(tensor: np.ndarray, path: str, rank: int) -> np.ndarray:
    """A view of the tensor in our layout; 1x1 convolutions and linear layers stand in for each other."""
    if not _is_kernel(path):
        return tensor
    if tensor.ndim == 2 and rank == 4:
        tensor = tensor[:, :, None, None]
    if tensor.ndim == 4 and rank == 2 and tensor.shape[2:] == (1, 1):
        tensor = tensor[:, :, 0, 0]
    return tensor.transpose(2, 3, 1, 0) if tensor.ndim == 4 else tensor.T


def _to_torch(path: str, leaf: np.ndarray) -> np.ndarray:
    if not _is_kernel(path):
        return leaf
    if leaf.ndim not in (2, 4):
        raise fail(f"kernel {path}", "[I, O] or [h, w, I, O]", f"shape {leaf.shape}", "add its layout to the mapping")
    return leaf.transpose(3, 2, 0, 1) if leaf.ndim == 4 else leaf.T


def _torch_shape(path: str, shape: tuple[int, ...]) -> list[int]:
    return list(_to_torch(path, np.broadcast_to(np.float32(0), shape)).shape)
