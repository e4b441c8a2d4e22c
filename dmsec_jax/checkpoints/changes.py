"""What an adapter file says about one kernel, and the kernel that follows from it.

    LoRA  (Hu et al. 2022, section 4.1)     D = up @ down
    LoCon (LyCORIS, Yeh et al. 2024)        the same on a convolution; with a core `mid`, D = up x mid x down (Tucker)
    LoHa  (Hyeon-Woo et al. 2022, Eq. 2)    D = (w1_a @ w1_b) * (w2_a @ w2_b); with cores t1 and t2 both are Tucker
    LoKr  (LyCORIS, Yeh et al. 2024)        D = kron(w1, w2), each whole or a product
    OFT   (Qiu et al. 2023, Eq. 3)          D = rescale * R^T W_0 - W_0, R made of blocks along the outputs (LyCORIS, kohya)
          in PEFT                           D = W_0 R^T - W_0, R made of blocks along the inputs
    full                                    D = diff
    DoRA  (Liu et al. 2024, Eq. 5)          W = magnitude * (W_0 + ratio D) / |W_0 + ratio D|

The norm of DoRA is that of each output's (or each input's) weights. Factors keep the layout of PyTorch, where a kernel is [O, I, h, w]; a linear
layer is a convolution with a window of 1.
"""

import math
from collections.abc import Collection, Mapping
from typing import NamedTuple

import numpy as np

Factors = Mapping[str, np.ndarray]
Shape = tuple[int, ...]


class Change(NamedTuple):
    """Of one kernel.

    Attributes:
        family: "LoRA", "LoHa", "LoKr", "OFT" or "full".
        factors: name -> float32 array.
        ratio: alpha / rank, what D is multiplied by.
        magnitude: DoRA's, [O, 1, 1, 1] or [1, I, 1, 1]; None without it.
        terms: of PEFT's OFT, see `peft_rotation`.
    """

    family: str
    factors: Factors
    ratio: float
    magnitude: np.ndarray | None
    terms: int | None = None


def family_of(factor: str) -> str:
    """The family that a factor belongs to."""
    return {"hada": "LoHa", "lokr": "LoKr", "oft_": "OFT", "resc": "OFT", "diff": "full"}.get(factor[:4], "LoRA")


def needed(family: str, given: Collection[str]) -> list[str]:
    """The factors that D is made of, seen what is given: one that is not given is missing, a further one has no meaning."""
    if family == "OFT" and "oft_R" in given:
        return ["oft_R"]
    if family == "OFT":
        return ["oft_blocks", *(["rescale"] if "rescale" in given else [])]
    if family == "full":
        return ["diff"]
    if family == "LoRA":
        return ["down", "up", *(["mid"] if "mid" in given else [])]
    if family == "LoHa":
        cores = ["hada_t1", "hada_t2"] if {"hada_t1", "hada_t2"} & set(given) else []
        return ["hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", *cores]
    first = ["lokr_w1_a", "lokr_w1_b"] if {"lokr_w1_a", "lokr_w1_b"} & set(given) else ["lokr_w1"]
    product = {"lokr_w2_a", "lokr_w2_b", "lokr_t2"} & set(given)
    second = ["lokr_w2_a", "lokr_w2_b", *(["lokr_t2"] if "lokr_t2" in given else [])] if product else ["lokr_w2"]
    return first + second


def rank(factors: Factors) -> int | None:
    """The rank that alpha is divided by; None where there is none (a LoKr of two whole factors)."""
    names = ("down", "hada_w1_b", "lokr_w2_b", "lokr_w1_b")
    return next((factors[name].shape[0] for name in names if name in factors), None)


def misfits(factors: Factors, kernel: Shape) -> dict[str, str]:
    """The factors of a complete change that do not fit a kernel [O, I, h, w], each with the shape that it should have.

    Ranks are what the factors say; window axes of 1 may be left out.
    """
    if "oft_R" in factors:
        return _peft_misfits(factors["oft_R"], kernel)
    if "oft_blocks" in factors:
        return _oft_misfits(factors, kernel)
    odd = {name: "2 or 4 axes" for name, array in factors.items() if array.ndim not in (2, 4) or not array.size}
    if odd:
        return odd
    outputs, inputs, *window = kernel
    if "lokr_w2" in factors or "lokr_w2_b" in factors:
        p, q = _sides(factors)
        if outputs % p or inputs % q:
            name = "lokr_w1" if "lokr_w1" in factors else "lokr_w1_a"
            return {name: f"sides that divide {outputs} and {inputs}"}
        wanted = _product("lokr_w1", None, factors, (p, q, 1, 1))
        wanted |= _product("lokr_w2", "lokr_t2", factors, (outputs // p, inputs // q, *window))
    elif "hada_w1_a" in factors:
        wanted = _product("hada_w1", "hada_t1", factors, kernel) | _product("hada_w2", "hada_t2", factors, kernel)
    elif "diff" in factors:
        wanted = {"diff": kernel}
    elif "mid" in factors:
        p, q = factors["mid"].shape[:2]
        wanted = {"down": (q, inputs), "mid": (p, q, *window), "up": (outputs, p)}
    else:
        r = factors["down"].shape[0]
        wanted = {"down": (r, inputs, *window), "up": (outputs, r)}
    return {
        name: str(list(shape))
        for name, shape in wanted.items()
        if _without_window(factors[name].shape) != _without_window(shape)
    }


def _oft_misfits(factors: Factors, kernel: Shape) -> dict[str, str]:
    blocks, rescale = factors["oft_blocks"], factors.get("rescale")
    fits = blocks.ndim == 3 and blocks.shape[1] == blocks.shape[2] and blocks.shape[0] * blocks.shape[1] == kernel[0]
    wrong = {} if fits else {"oft_blocks": f"square blocks [n, m, m] with n m = {kernel[0]}"}
    if rescale is not None and (rescale.size != kernel[0] or rescale.shape[:1] != kernel[:1]):
        wrong["rescale"] = str([kernel[0], 1])
    return wrong


def _peft_misfits(upper: np.ndarray, kernel: Shape) -> dict[str, str]:
    inputs = math.prod(kernel[1:])
    if upper.ndim == 2 and len(upper):
        side = side_of(upper)
        if side * (side - 1) == 2 * upper.shape[1] and (
            len(upper) * side == inputs or (len(upper), inputs % side) == (1, 0)
        ):
            return {}
    return {"oft_R": f"[n, m (m - 1) / 2] with n m = {inputs}"}


def side_of(upper: np.ndarray) -> int:
    """m, of the m (m - 1) / 2 elements above a diagonal."""
    return (1 + math.isqrt(1 + 8 * upper.shape[1])) // 2


def peft_rotation(upper: np.ndarray, inputs: int, terms: int | None) -> np.ndarray:
    """PEFT's R [n, m, m] of blocks that stand above their diagonals in `upper` [n, m (m - 1) / 2], or in [1, ...] for all of them.

    Args:
        inputs: n m.
        terms: None: Cayley's map (I - S) (I + S)^-1; else PEFT's sum of as many powers in its place, which approaches (I + S) (I - S)^-1.
    """
    side = side_of(upper)
    skew = np.zeros((len(upper), side, side))
    skew[:, *np.triu_indices(side, 1)] = upper
    skew -= skew.transpose(0, 2, 1)
    eye = np.eye(side)
    if terms is None:
        r = (eye - skew) @ np.linalg.inv(eye + skew)
    else:  # as in PEFT: three terms are as long as four, and the last one is not doubled
        r, power = eye + 2 * skew * (terms > 1), skew @ skew
        if terms > 2:
            r = r + 2 * power
            for _ in range(3, terms - 1):
                power = power @ skew
                r = r + 2 * power
            r = r + power @ skew
    return np.broadcast_to(r, (inputs // side, side, side))


def rotated(kernel: np.ndarray, factors: Factors, terms: int | None = None) -> np.ndarray:
    """The kernel [O, I, h, w] after OFT, by Cayley's map of the blocks' skew parts; or after PEFT's, see `peft_rotation`."""
    if "oft_R" in factors:
        r = peft_rotation(factors["oft_R"], math.prod(kernel.shape[1:]), terms)
        parts = kernel.reshape(len(kernel), *r.shape[:2])
        return np.einsum("onk,nck->onc", parts, r).reshape(kernel.shape).astype(np.float32)
    blocks = factors["oft_blocks"].astype(np.float64)
    skew, eye = blocks - blocks.transpose(0, 2, 1), np.eye(blocks.shape[1])
    r = (eye + skew) @ np.linalg.inv(eye - skew)
    parts = kernel.reshape(*blocks.shape[:2], -1)
    turned = (r.transpose(0, 2, 1) @ parts).reshape(kernel.shape)
    rescale = factors.get("rescale", np.ones(len(kernel))).reshape(-1, 1, 1, 1)
    return (rescale * turned).astype(np.float32)


def delta(factors: Factors, kernel: Shape) -> np.ndarray:
    """D [O, I, h, w] of factors that fit and do not need the kernel itself, without its ratio."""
    if "diff" in factors:
        return factors["diff"].reshape(kernel)
    outputs, inputs, *window = kernel
    if "lokr_w2" in factors or "lokr_w2_b" in factors:
        p, q = _sides(factors)
        first = _multiplied("lokr_w1", None, factors, (p, q, 1, 1))
        return np.kron(first, _multiplied("lokr_w2", "lokr_t2", factors, (outputs // p, inputs // q, *window)))
    if "hada_w1_a" in factors:
        first = _multiplied("hada_w1", "hada_t1", factors, kernel)
        return first * _multiplied("hada_w2", "hada_t2", factors, kernel)
    up, down = low_rank(factors, kernel)
    return (up @ down.reshape(len(down), -1)).reshape(kernel)


def low_rank(factors: Factors, kernel: Shape) -> tuple[np.ndarray, np.ndarray]:
    """`up` [O, r] and `down` [r, I, h, w] of a LoRA that fits; a core is multiplied into `down`."""
    outputs, inputs, *window = kernel
    up, down = factors["up"].reshape(outputs, -1), factors["down"]
    if "mid" in factors:
        mid = factors["mid"].reshape(*factors["mid"].shape[:2], *window)
        down = np.einsum("pqhw,qi->pihw", mid, down.reshape(-1, inputs))
    return up, down.reshape(-1, inputs, *window)


def changed(kernel: np.ndarray, change: Change, strength: float) -> np.ndarray:
    """The kernel [O, I, h, w] with a change that fits it; `strength` multiplies what the change does: 0 gives the kernel back, 1 is as trained."""
    if change.family == "OFT":
        d = rotated(kernel, change.factors, change.terms) - kernel
    else:
        d = change.ratio * delta(change.factors, kernel.shape)
    if change.magnitude is None:
        return kernel + strength * d
    axes = tuple(axis for axis, size in enumerate(change.magnitude.shape) if size == 1)
    moved = kernel + d
    norm = np.sqrt(np.square(moved).sum(axes, keepdims=True) + np.finfo(np.float32).tiny)
    return kernel + strength * (change.magnitude * (moved / norm) - kernel)


def magnitude_shape(name: str, shape: Shape, kernel: Shape) -> Shape | None:
    """[O, 1, 1, 1] or [1, I, 1, 1], whichever a magnitude of that name stands for; None if it does not fit the kernel.

    PEFT's `lora_magnitude_vector` is of the outputs, [O] or [1, O, 1, 1]; LyCORIS's `dora_scale` says by its shape of what.
    """
    outputs, inputs = kernel[:2]
    if name == "lora_magnitude_vector":
        return (outputs, 1, 1, 1) if shape in ((outputs,), (1, outputs, 1, 1)) else None
    full = (*shape, *(1,) * (4 - len(shape)))
    return full if full in ((outputs, 1, 1, 1), (1, inputs, 1, 1)) else None


def _sides(factors: Factors) -> Shape:
    """Sides of w1 of a LoKr."""
    if "lokr_w1" in factors:
        return factors["lokr_w1"].shape[:2]
    return factors["lokr_w1_a"].shape[0], factors["lokr_w1_b"].shape[1]


def _product(name: str, core: str | None, factors: Factors, shape: Shape) -> dict[str, Shape]:
    """Shapes of the factors of a matrix that is whole, a product, or (with a core) a Tucker decomposition."""
    outputs, inputs, *window = shape
    if name in factors:
        return {name: shape}
    a, b = f"{name}_a", f"{name}_b"
    if core in factors:
        p, q = factors[core].shape[:2]
        return {core: (p, q, *window), a: (p, outputs), b: (q, inputs)}
    r = factors[b].shape[0]
    return {a: (outputs, r), b: (r, inputs * window[0] * window[1])}


def _multiplied(name: str, core: str | None, factors: Factors, shape: Shape) -> np.ndarray:
    if name in factors:
        return factors[name].reshape(shape)
    a, b = (factors[f"{name}_{side}"] for side in "ab")
    a, b = a.reshape(a.shape[:2]), b.reshape(b.shape[:2])
    if core in factors:
        return np.einsum("pqhw,po,qi->oihw", factors[core].reshape(*factors[core].shape[:2], *shape[2:]), a, b)
    return (a @ b).reshape(shape)


def _without_window(shape: Shape) -> Shape:
    return shape[:2] if len(shape) == 4 and shape[2:] == (1, 1) else tuple(shape)
