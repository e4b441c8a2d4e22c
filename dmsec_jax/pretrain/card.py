"""The embedded model's card: where it came from and how good it is, measured on the finished folder."""

import csv
import dataclasses
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from dmsec_jax import pipeline
from dmsec_jax.core.files import write_atomically
from dmsec_jax.data.images import from_uint8, grid, read_folder, save_png
from dmsec_jax.diffusion.loss import grid_loss
from dmsec_jax.diffusion.schedule import alpha_bars
from dmsec_jax.metrics import distribution, image, similarity
from dmsec_jax.pipeline import Pipeline
from dmsec_jax.pretrain import corpus
from dmsec_jax.pretrain.corpus import Icon

PROMPTS = (
    "a twemoji icon of a red apple", "a noto icon of a cat face", "a fluent icon of a red heart", "a noto icon of a hamburger",
    "a fluent icon of a penguin", "a twemoji icon of an automobile", "a noto icon of a tiger", "a twemoji icon of a tulip",
    "a fluent icon of a pizza", "a noto icon of a dog face", "a twemoji icon of a smiling face with sunglasses", "a fluent icon of a bus",
)  # fmt: skip
TIMESTEPS = (50, 200, 400, 600, 800, 950)

TEXT = """# emoji-ldm

A nano Stable Diffusion for tests, demonstrations and benchmarks: 64 px icons, latents of 8 x 8 x 16, {unet:.1f} M parameters in the UNet,
{vae:.1f} M in the autoencoder, {text:.1f} M in the text encoder. The folder opens in PyTorch's `StableDiffusionPipeline.from_pretrained` too.
It knows icons and nothing else, and its figures say nothing about large models.

## Data and licences
{data}

## Training
`{command}` {minutes}
{history}

## Quality
Measured on the folder as written (float16 weights).

| autoencoder, round trip | PSNR (dB) | SSIM | pictures |
|---|---|---|---|
{roundtrip}

| held-out loss at t | {timesteps} |
|---|{bars}
| v, mean squared error | {v_loss} |
| noise, mean squared error | {eps_loss} |

Kernel distance (unbiased, cubic kernel, oriented-gradient features; lower is better): {count} samples with guidance 3 against the {held_concepts}
held-out icons {kid}; as many training icons after the autoencoder's round trip, the best that samples could be: {floor}.

`samples.png`: {prompts} prompts, first row without guidance, second with guidance 3. `reconstructions.png`: held-out icons and OpenMoji
animals above, their round trip below.
"""


SOURCES = {
    "noto": "Noto Emoji (Google, Apache-2.0, npm `emoji-datasource-google`)",
    "twemoji": "Twemoji (Twitter and contributors, CC-BY-4.0, npm `emoji-datasource-twitter`)",
    "fluent": "Fluent Emoji (Microsoft, MIT, npm `@lobehub/fluent-emoji-3d`)",
}
"""Style -> where its icons come from."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Origin:
    """What a training was given, besides icons.

    command: the command line.
    photos, cutouts: how many pictures of each the autoencoder saw.
    start: SHA-256 of the model it went on from, whose autoencoder it kept; None for random weights.
    history: a sentence on how it differed from its recipe, empty if it did not.
    """

    command: str
    photos: int = 0
    cutouts: int = 0
    start: str | None = None
    history: str = ""


def data(icons: Sequence[Icon], origin: Origin) -> str:
    """What the model was trained on, and under which licences: only what this training was given."""
    learned = corpus.concepts(icons)
    trained, held = sum(not icon.held_out for icon in learned), sum(icon.held_out for icon in icons)
    styles = {icon.style for icon in icons}
    sources = ", ".join(source for style, source in SOURCES.items() if style in styles)
    names = len({icon.code for icon in learned})
    lines = [
        f'{sources}: {trained} icons of {names} concepts with prompts such as\n"{learned[0].captions[0]}"; {held} icons were held out.'
    ]
    others = {"photographs": origin.photos, "cut-out pictures": origin.cutouts}
    given = " and ".join(f"{count} {name}" for name, count in others.items() if count)
    if origin.start is None:
        lines.append(f"The autoencoder also saw all other icons of these styles{f', and {given}' if given else ''}.")
    else:
        lines.append(
            f"It went on from the model of SHA-256 `{origin.start}`, whose autoencoder it has; what that had seen is not known here."
        )
    lines.append("No icon of OpenMoji was shown.")
    if "twemoji" in styles:
        lines.append("The most demanding licence of the icons is CC-BY-4.0.")
    if given:
        lines.append(f"The licences of the {given} are not known here, and bind as well.")
    return "\n".join(lines)


def write(folder: str | Path, icons: Sequence[Icon], log: str | Path, origin: Origin) -> None:
    """Measures the model in `folder` and writes `README.md`, `samples.png` and `reconstructions.png` beside it.

    Args:
        log: CSV of stage, steps done, seconds, loss, one line a chunk.
    """
    folder = Path(folder)
    model = pipeline.load(folder)
    learned = corpus.concepts(icons)
    held = [icon for icon in icons if icon.held_out]
    held_concepts = [icon for icon in learned if icon.held_out]
    sets = {"held-out icons": pictures_of(held)}
    animals = Path(pipeline.EMBEDDED.parent / "openmoji-animals")
    sets["OpenMoji animals"] = np.concatenate(
        [read_folder(animals / part, 64).images for part in ("member", "holdout")]
    )
    trips = {name: _round_trip(model, pictures) for name, pictures in sets.items()}
    lines = []
    for name, pictures in sets.items():
        psnr, ssim = (np.asarray(metric(pictures, trips[name])) for metric in (image.psnr, image.ssim))
        lines.append(f"| {name} | {psnr.mean():.1f} | {ssim.mean():.3f} | {len(pictures)} |")
    v_loss, eps_loss = _losses(model, held_concepts)
    kid, floor = _distances(model, held_concepts, [icon for icon in learned if not icon.held_out])
    _sheets(folder, model, sets, trips)
    counts = {name: sum(leaf.size for leaf in jax.tree.leaves(tree)) / 1e6 for name, tree in model.params.items()}
    row = lambda values: " | ".join(f"{value:.3f}" for value in values)
    text = TEXT.format(
        unet=counts["unet"],
        vae=counts["vae"],
        text=counts["text_encoder"],
        minutes=_minutes(log),
        data=data(icons, origin),
        command=origin.command,
        history=origin.history,
        roundtrip="\n".join(lines),
        timesteps=" | ".join(map(str, TIMESTEPS)),
        bars="---|" * len(TIMESTEPS),
        v_loss=row(v_loss),
        eps_loss=row(eps_loss),
        count=len(held_concepts),
        held_concepts=len(held_concepts),
        kid=f"{kid.value:.4f} +- {kid.standard_error:.4f}",
        floor=f"{floor.value:.4f} +- {floor.standard_error:.4f}",
        prompts=len(PROMPTS),
    )
    write_atomically(folder / "README.md", text.encode())


def pictures_of(icons: Sequence[Icon]) -> np.ndarray:
    """Icons on white, [N, H, W, 3] in [-1, 1]."""
    return from_uint8(np.stack([corpus.composite(icon.rgba) for icon in icons]))


def _round_trip(model: Pipeline, pictures: np.ndarray) -> np.ndarray:
    return pipeline.decode(model, pipeline.encode(model, pictures)[0])


def _losses(model: Pipeline, held: Sequence[Icon]) -> tuple[np.ndarray, np.ndarray]:
    """Mean squared error of v and of the noise at `TIMESTEPS` on held-out icons with their captions."""
    latents, _ = pipeline.encode(model, pictures_of(held))
    context = pipeline.contexts(model, [icon.captions[0] for icon in held])
    alpha_bar = alpha_bars(model.schedule)

    @jax.jit
    def losses(params, latents, context):
        predict = lambda z_t, t: model.functions.predict_fn(params, z_t, t, context)
        kind = model.schedule.prediction_type
        return grid_loss(jax.random.key(0), predict, alpha_bar, latents, jnp.array(TIMESTEPS), prediction_type=kind)

    v_loss = np.asarray(losses(model.params["unet"], latents, context)).mean(0)
    # for a given z_t, noise - noise_hat = sqrt(alpha_bar) (v - v_hat)
    return v_loss, v_loss * np.asarray(alpha_bar)[list(TIMESTEPS)]


def _distances(model: Pipeline, held: Sequence[Icon], train: Sequence[Icon]):
    """Kernel distance to the held-out icons of as many samples of their captions, and of the round trip of as many training icons.

    The round trip of the held-out icons themselves would be paired with them, for which the estimate is not unbiased.
    """
    real = pictures_of(held)
    samples = [
        pipeline.sample(jax.random.key(i), model, icon.captions[0], 1, guidance_weight=3.0)
        for i, icon in enumerate(held)
    ]
    # the cubic kernel divides products by the width, so features of unit length are brought to unit variance first
    embed = lambda pictures: (features := similarity.embed(pictures)) * np.sqrt(features.shape[1])
    features = embed(real)
    distance = lambda pictures: distribution.kernel_distance(features, embed(pictures), block_size=len(real) // 2)
    others = pictures_of([train[i] for i in np.random.default_rng(0).choice(len(train), len(held), replace=False)])
    return distance(np.concatenate(samples)), distance(_round_trip(model, others))


def _sheets(folder: Path, model: Pipeline, sets: dict, trips: dict) -> None:
    draw = lambda weight: [
        pipeline.sample(jax.random.key(i), model, prompt, 1, guidance_weight=weight) for i, prompt in enumerate(PROMPTS)
    ]
    save_png(folder / "samples.png", grid(np.concatenate(draw(None) + draw(3.0)), len(PROMPTS)))
    shown = [rows[name][:6] for rows in (sets, trips) for name in sets]
    save_png(folder / "reconstructions.png", grid(np.concatenate(shown), 12))


def _minutes(log: str | Path) -> str:
    """`Autoencoder: n steps in m minutes, ...` from the log; the time is that of the steps, compilation included."""
    totals: dict[str, tuple[int, float]] = {}
    if Path(log).is_file():
        for stage, done, seconds, _ in csv.reader(Path(log).read_text().splitlines()):
            steps, spent = totals.get(stage, (0, 0.0))
            totals[stage] = (max(steps, int(done)), spent + float(seconds))
    return " ".join(f"{stage}: {steps:,} steps, {spent / 60:.0f} minutes." for stage, (steps, spent) in totals.items())
