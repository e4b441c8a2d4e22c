"""The report of a protection: what changed, what it is worth against random noise, and what purifiers leave of it."""

import dataclasses
import textwrap
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from dmsec_jax.core.types import AnyArray
from dmsec_jax.metrics.extraction import Interval, seed_interval
from dmsec_jax.metrics.protection import Change, rise
from dmsec_jax.report import page as html
from dmsec_jax.report import result
from dmsec_jax.report.result import Result, Row

AMPLIFIED = 8
"""How many times larger the difference is shown."""
LEVEL = 0.01
"""p-value under which an effect counts."""
STRIP = 8
"""Samples of each imitator in the page."""
SHOWN = 24
"""Pictures in the page."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Protected:
    """One picture: its name, size, the file written, and how it was changed."""

    name: str
    size: tuple[int, ...]
    file: str
    change: Change


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Protection:
    """A whole run.

    Attributes:
        method, budget, norm, scale, model, prompt: what was done against which model; the budget in levels.
        pictures: one by one.
        clean, protected: views [N, H, W, 3] in [-1, 1] as the model sees them, before and after.
        losses: purifier ("" for none) -> "clean", "protected" and "noise" -> held-out loss [N].
        imitations: what was fine-tuned on ("clean", "noise", "protected", or "protected, then PURIFIER") -> `Imitation`; none if nobody imitated.
        likened: what its likeness is to.
        notes, command, config, seeds, seconds, inputs: as in `result.Result`.
    """

    method: str
    budget: float
    norm: str
    scale: str
    model: str
    prompt: str
    pictures: tuple[Protected, ...]
    clean: Float[AnyArray, "N H W 3"]
    protected: Float[AnyArray, "N H W 3"]
    losses: dict
    imitations: dict = dataclasses.field(default_factory=dict)
    likened: str = ""
    notes: tuple[str, ...] = ()
    command: str = ""
    config: dict = dataclasses.field(default_factory=dict)
    seeds: dict = dataclasses.field(default_factory=dict)
    seconds: dict = dataclasses.field(default_factory=dict)
    inputs: dict = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Effect:
    """The relative rise of the held-out loss after a purifier: of the protected pictures, of noise, and what the first has beyond the second."""

    purifier: str
    protected: float
    noise: float
    beyond: Interval
    p_value: float

    @property
    def real(self) -> bool:
        """Whether it is larger than random noise would do; where it is not, it may still be too few pictures that hide it."""
        return bool(self.p_value < LEVEL)

    @property
    def verdict(self) -> str:
        """What can be said of it."""
        if not np.isfinite(self.p_value):
            return "one picture: cannot be told"
        return "an effect remains" if self.real else "not told from noise"


class Imitation(NamedTuple):
    """What a model drew after a fine-tuning, in [-1, 1], and how like the artist's pictures each sample is."""

    samples: Float[AnyArray, "K H W 3"]
    likeness: Float[AnyArray, "K"]


def effects(run: Protection) -> list[Effect]:
    """One for each purifier, the untouched pictures first; all relative to the clean pictures after the same purifier."""
    found = []
    for name, losses in run.losses.items():
        clean, protected, noise = (np.asarray(losses[kind]) for kind in ("clean", "protected", "noise"))
        beyond, p_value = rise(clean, protected, noise)
        mean = lambda values, clean=clean: float((values / clean - 1).mean())
        found.append(
            Effect(purifier=name, protected=mean(protected), noise=mean(noise), beyond=beyond, p_value=p_value)
        )
    return found


def headline(run: Protection) -> str:
    """The outcome in one sentence that promises nothing that was not measured."""
    first, *purified = effects(run)
    if not np.isfinite(first.p_value):
        return "One picture: its loss is given, but one picture cannot tell protection from chance."
    percent = lambda value: f"{round(100 * value)}%"  # as an integer there is no -0
    rises = f"model's loss rises by {percent(first.protected)}, with random noise of the same size by {percent(first.noise)}"
    if not first.real:
        outcome = "More pictures are needed to tell" if first.beyond.value > 0 else "No protection was measured"
        return f"{outcome}: the {rises} (p = {first.p_value:.2g})."
    if not purified:
        return f"The {rises}; no purifier was tried."
    unclear = sum(not effect.real for effect in purified)
    left = min(effect.beyond.value for effect in purified)
    nothing = f", after {unclear} of them it is not told from noise" if unclear else ""
    return f"The {rises}; the best of {len(purified)} purifiers leaves {percent(left)} beyond noise{nothing}."


CAUTION = (
    "The loss is that of the one model that was attacked, and does not say how well pictures are imitated: in this project's benchmark the "
    "method that raises it most hindered imitators of some pictures and helped those of others. Another model, a purifier or a few clean "
    "pictures may undo what there is."
)


def imitated(run: Protection) -> list[tuple[str, Interval, Interval | None, Interval | None]]:
    """(what was fine-tuned on, likeness, its difference to clean, to noise); samples, paired by their first noise, are the sample."""
    found = []
    for name, one in run.imitations.items():
        gap = lambda other, one=one: seed_interval(one.likeness - run.imitations[other].likeness)
        against = [None if name in ("clean", other) else gap(other) for other in ("clean", "noise")]
        found.append((name, seed_interval(one.likeness), *against))
    return found


def imitation_headline(run: Protection) -> str:
    """Whether the protection hindered an imitator, in one sentence."""
    if not run.imitations:
        return "Whether it keeps a model from imitating the pictures was not tried; --imitation-steps does."
    found = {name: rest for name, *rest in imitated(run)}
    value, to_clean, to_noise = found["protected"]
    figures = f"likeness {value.value:.2f}, with clean pictures {found['clean'][0].value:.2f}, with noised ones {found['noise'][0].value:.2f}"
    if max(to_clean.high, to_noise.high) < 0:
        return f"A model fine-tuned on the protected pictures imitates them less well: {figures}."
    if min(to_clean.low, to_noise.low) > 0:
        return f"A model fine-tuned on the protected pictures imitates them better, not worse: {figures}."
    gaps = {"clean": to_clean, "noised": to_noise}
    unclear = [name for name, gap in gaps.items() if not (gap.high < 0 or gap.low > 0)]
    if unclear:
        return f"No difference in imitation to {' and '.join(unclear)} pictures was measured: {figures}."
    how = {name: "less well" if gap.high < 0 else "better" for name, gap in gaps.items()}
    compared = f"{how['clean']} than one on clean pictures, {how['noised']} than one on noised ones"
    return f"A model fine-tuned on the protected pictures imitates them {compared}: {figures}."


def summary(run: Protection) -> str:
    """The outcome for a terminal, plain text."""
    psnr = np.median([picture.change.psnr for picture in run.pictures])
    lines = []
    for text in (headline(run), imitation_headline(run), CAUTION):
        lines += [*textwrap.wrap(text, 80), ""]
    lines += [f"{len(run.pictures)} pictures, {run.method}, {run.budget:g} levels, median PSNR {psnr:.1f} dB", ""]
    lines += [f"{'rise of the held-out loss':30}{'protected':>10}{'noise':>8}{'beyond noise (95 %)':>24}"]
    for effect in effects(run):
        span = html.between(100 * effect.beyond.low, 100 * effect.beyond.high, 1)
        beyond = f"{100 * effect.beyond.value:+.1f} %  {span}"
        name = effect.purifier or "as saved"
        lines.append(f"{name:30}{effect.protected:>10.1%}{effect.noise:>8.1%}{beyond:>24}")
    return "\n".join(lines)


def rows(run: Protection, case: dict) -> tuple[Row, ...]:
    """Tidy rows: `loss_rise` by purifier, and `psnr`, `ssim`, `lpips`, means over pictures."""
    case = {**case, "budget": run.budget, "norm": run.norm, "scale": run.scale, "coverage": 1.0}
    names = {"bench": "protection", "method": run.method}
    found = []
    for effect in effects(run):
        full = {**case, "purifier": effect.purifier or "none"}
        found.append(result.row_over(effect.beyond, metric="loss_rise", unit="share beyond noise", case=full, **names))
        for kind in ("protected", "noise"):
            more = {"metric": f"loss_rise_{kind}", "unit": "share", "case": full, "n": len(run.pictures)}
            found.append(Row(value=getattr(effect, kind), **more, **names))
    for metric, unit in (("psnr", "dB"), ("ssim", "similarity"), ("lpips", "distance")):
        values = np.array([getattr(picture.change, metric) for picture in run.pictures], np.float64)
        known = values[np.isfinite(values)]
        value = float(known.mean()) if known.size else None
        found.append(Row(value=value, n=len(known), metric=metric, unit=unit, case=case, **names))
    for name, likeness, *gaps in imitated(run):
        method, _, purifier = name.partition(", then ")
        method = run.method if method == "protected" else method
        full = {**case, "purifier": purifier or "none", "coverage": float(method == run.method)}
        more = {"bench": "protection", "method": method, "unit": "cosine"}
        found.append(result.row_over(likeness, metric="imitation", case=full, **more))
        for other, gap in zip(("clean", "noise"), gaps, strict=True):
            if gap is not None:
                found.append(
                    result.row_over(gap, metric="imitation difference", case={**full, "against": other}, **more)
                )
    return tuple(found)


def page(run: Protection, written: Result | None = None) -> str:
    """The whole report as one HTML page; `written` adds versions, device and date."""
    lines = []
    for picture, before, after in zip(run.pictures, run.clean, run.protected, strict=True):
        difference = np.clip(AMPLIFIED * (np.asarray(after) - np.asarray(before)), -1, 1)
        shown = [
            html.picture(image, f"{picture.name}, {what}")
            for image, what in ((before, "original"), (after, "protected"), (difference, "difference"))
        ]
        lines.append((picture, shown))
    return html.render(
        "protection",
        run=run,
        headlines=[imitation_headline(run), headline(run)]
        if run.imitations
        else [headline(run), imitation_headline(run)],
        imitated=imitated(run),
        strips=[
            (name, [html.picture(image, f"a sample after {name}") for image in np.asarray(one.samples)[:STRIP]])
            for name, one in run.imitations.items()
        ],
        caution=CAUTION,
        effects=effects(run),
        lines=lines[:SHOWN],
        amplified=AMPLIFIED,
        between=html.between,
        written=written,
    )


def result_of(run: Protection) -> Result:
    """What goes into `result.json`; changes and losses picture by picture in `details`."""
    return Result(
        method=run.method,
        command=run.command,
        config=run.config,
        seeds=run.seeds,
        inputs=run.inputs,
        seconds=run.seconds,
        rows=rows(run, {}),
        pictures={f"pictures/{picture.file}": f"{picture.name}, protected" for picture in run.pictures},
        details={
            "prompt": run.prompt,
            "changes": {picture.name: picture.change._asdict() for picture in run.pictures},
            "likeness": {name: list(map(float, one.likeness)) for name, one in run.imitations.items()},
            "losses": {name or "none": kinds for name, kinds in run.losses.items()},
        },
        notes=run.notes,
    )


def write(folder: str | Path, run: Protection) -> Result:
    """Writes `report.html` and, last, `result.json` into `folder`; raises OSError if one cannot be written."""
    folder = Path(folder)
    written = result_of(run)
    html.write(folder / "report.html", page(run, written))
    result.write(folder / "result.json", written)
    return written
