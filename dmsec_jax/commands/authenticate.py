"""`dmsec authenticate`: were these pictures used to fine-tune that model?"""

import dataclasses
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import numpy as np
import tyro
from rich.console import Console
from rich.progress import Progress

from dmsec_jax import authentication, pipeline
from dmsec_jax.authentication import METHODS, RECOVERING, Settings, Unfinished
from dmsec_jax.checkpoints.unfinished import Store
from dmsec_jax.commands.extract import both, same_model
from dmsec_jax.commands.places import require_apart, require_free
from dmsec_jax.core import config
from dmsec_jax.core.checks import require
from dmsec_jax.data import images
from dmsec_jax.data.images import ImageSet
from dmsec_jax.pipeline import Subject
from dmsec_jax.report import authentication as report
from dmsec_jax.report import page
from dmsec_jax.report.authentication_data import Authentication, Outcome, Recovered

DEFAULT = ("loss-difference", "cgi-dm")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Tell whether pictures were used to fine-tune a diffusion model, and how sure that is (CGI-DM and membership tests)."""

    model: Path
    """The fine-tuned model: a diffusers folder, a hub id, a single file, or a LoRA (or LoCon, LoHa, LoKr, DoRA) for `base`."""
    prompt: str
    """The prompt it was, or may have been, fine-tuned with."""
    images: Path
    """Folder of the pictures in question."""
    non_members: Path | None = None
    """Folder of pictures like them that were certainly not trained on; without them nothing can be concluded. Twenty are a good number."""
    base: Path = pipeline.EMBEDDED
    """The model that it was made from: a diffusers folder, a hub id or a single file."""
    reading: tyro.conf.OmitArgPrefixes[pipeline.Reading] = pipeline.Reading()
    adapter_strength: float = 1.0
    """Of a LoRA or its relatives: 0 is the base model, 1 as trained."""
    embeddings: tuple[Path, ...] = ()
    """Files of textual inversion, whose words the prompt may use."""
    methods: tuple[str, ...] = DEFAULT
    """Tests; the verdict rests on the first. loss-difference is cheap, cgi-dm shows pictures that a person can judge. Others: loss,
    loss-difference-independent, cgi-dm-faithful, secmi, pia, pian, pfami, clid, gradient-norm."""
    out: Path = Path("out/authenticate")
    seed: int = 0
    settings: Settings = Settings()


def run(cfg: Config) -> int:
    """Writes `out/result.json`, `out/report.html` and `out/pictures`; prints the summary."""
    console = Console()
    began = time.monotonic()
    check(cfg.methods, cfg.settings)
    require(0 <= cfg.seed < 2**32, "seed", f"from 0 to {2**32 - 1}", cfg.seed, "choose another")
    require_free(cfg.out, "pictures")
    require_apart([cfg.out / "pictures"], images=cfg.images, non_members=cfg.non_members)
    base, tuned = both(cfg.base, cfg.model, cfg.reading, cfg.images, cfg.adapter_strength, cfg.embeddings)
    pictures = images.read_folder(cfg.images, base.pixels)
    non_members = images.read_folder(cfg.non_members, base.pixels) if cfg.non_members else None
    found = authenticate(
        Subject(base, tuned.params, cfg.prompt),
        pictures,
        non_members,
        cfg.methods,
        cfg.settings,
        seed=cfg.seed,
        console=console,
        folder=cfg.out,
        tuned_label=str(cfg.model),
        seconds={"loading": time.monotonic() - began},
        config=config.to_dict(cfg),
        inputs=base.inputs("base") | tuned.inputs("model"),
        origin=[base.origin, tuned.origin],
        notes=same_model(base, tuned),
    )
    report.write(cfg.out, found, {"set": cfg.images.name, "tuner": "unknown", "n0": len(found.names)})
    console.print(report.summary(found), markup=False, highlight=False)
    console.print(f"\nReport: {cfg.out / 'report.html'}", markup=False)
    return 0


def check(methods: Sequence[str], settings: Settings) -> None:
    """Refuses, before anything is computed, what cannot be done.

    Raises:
        ValueError: on unknown, repeated or missing methods, or numbers out of range.
    """
    known = [name for name in METHODS if name != "base-loss"]
    odd = [name for name in methods if name not in known]
    require(not odd, "methods", f"of {', '.join(known)}", ", ".join(odd), "correct the name")
    different = len(methods) > 0 and len(set(methods)) == len(methods)
    require(different, "methods", "at least one, each once", " ".join(methods) or "none", "name each once")
    for name, low in {"num_draws": 2, "cgi_draws": 1, "batch_size": 1, "chunk": 1}.items():
        value = getattr(settings, name)
        require(value >= low, name, f"at least {low}", value, "raise it")
    for name in ("eps", "alpha"):
        value = getattr(settings, name)
        require(0 < value < np.inf, name, "above 0", value, "for example the default")
    authentication.require_steps(settings.num_steps)


def authenticate(
    subject: Subject,
    pictures: ImageSet,
    non_members: ImageSet | None,
    methods: Sequence[str],
    settings: Settings,
    *,
    seed: int,
    console: Console,
    folder: Path,
    tuned_label: str,
    seconds: dict[str, float],
    config: dict,
    inputs: dict[str, str],
    origin: Sequence[Mapping[str, str]] = (),
    notes: Sequence[str] = (),
) -> Authentication:
    """Asks all tests about the pictures and the non-members, each file once, and gathers what the report shows.

    Args:
        folder: where CGI-DM, which takes longest, keeps its state until it is finished; the same call goes on from there.
        seconds, config, inputs: of the whole command so far.
        origin: of the two models, see `Pipeline.origin`.
        notes: sentences on what deserves attention, known so far.
    """
    pictures, left_out = images.distinct(pictures, "pictures")
    non_members, overlap = images.unseen(pictures, non_members, "non-members")
    sets, left_out = {"picture": pictures}, left_out + overlap
    if non_members is not None:
        non_members, copies = images.distinct(non_members, "non-members")
        sets, left_out = sets | {"non-member": non_members}, left_out + copies
    inputs = inputs | {name: digest for kind, part in sets.items() for name, digest in part.inputs(kind).items()}
    everything, count = np.concatenate([part.images for part in sets.values()]), len(pictures)
    decisive = [subject.prompt, dataclasses.asdict(settings), seed, sorted(inputs.items()), *origin]
    scores, recoveries, timed = _ask(subject, everything, methods, settings, seed, console, folder, decisive)
    outcomes = {
        name: Outcome(
            name=name,
            label=METHODS[name].label,
            description=METHODS[name].description,
            evaluations=METHODS[name].evaluations(settings),
            scores=found[:count],
            null=None if non_members is None else found[count:],
        )
        for name, found in scores.items()
    }
    known = {} if non_members is None else {"non_members": non_members.images, "non_member_names": non_members.names}
    return Authentication(
        prompt=subject.prompt,
        base=str(subject.base.folder.name),
        tuned=tuned_label,
        pictures=pictures.images,
        names=pictures.names,
        tests=tuple(outcomes[name] for name in methods),
        control=outcomes["base-loss"],
        seed=seed,
        notes=(*notes, *(note for part in sets.values() for note in part.notes), *left_out, *_remarks(recoveries)),
        command=page.command_line(sys.argv[1:]),
        config=config,
        seeds={"seed": seed},
        seconds=seconds | timed,
        inputs=inputs,
        **known,
        **_shown(recoveries, count, non_members is not None),
    )


def _ask(subject, everything, methods, settings, seed, console, folder, origin):
    """Evidence [N] of every test and of the control, the recoveries of CGI-DM by name, and wall times."""
    key, seconds, recoveries = jax.random.key(seed), {}, {}
    began = time.monotonic()
    with console.status("asking both models about every picture"):
        plain = [name for name in methods if name not in RECOVERING]
        scores = authentication.statistics(key, subject, everything, [*plain, "base-loss"], settings)
    seconds["statistics"] = time.monotonic() - began
    for name in methods:
        if name in RECOVERING:
            began = time.monotonic()
            store = Store(folder / f"{name}.unfinished.npz", [name, *origin])
            recoveries[name] = _recover(key, subject, everything, settings, name, store, console)
            scores[name] = -recoveries[name].error
            seconds[METHODS[name].label] = time.monotonic() - began
    return scores, recoveries, seconds


def _shown(recoveries: dict[str, authentication.Recovery], count: int, known: bool) -> dict[str, Recovered]:
    """Pictures of the first CGI-DM, of those in question (the first `count`) and of the non-members."""
    if not recoveries:
        return {}
    first = next(iter(recoveries.values()))
    part = lambda rows: Recovered(partial=first.partial[rows], images=first.images[rows], error=first.error[rows])
    apart = {"non_members_recovered": part(slice(count, None))} if known else {}
    return {"recovered": part(slice(count)), **apart}


def _recover(key, subject, everything, settings, name, store: Store, console) -> authentication.Recovery:
    """CGI-DM with a progress bar, saved after every chunk, gone on with where an earlier call was stopped."""
    stored = store.read()
    earlier = None if stored is None else Unfinished(**stored)
    total = settings.num_steps * len(everything)
    with Progress(console=console, transient=True) as progress:
        done = 0 if earlier is None else int(earlier.done.sum())
        task = progress.add_task(METHODS[name].label, total=total, completed=done)

        def on_chunk(state: Unfinished) -> None:
            store.write(**state._asdict())
            progress.update(task, completed=int(state.done.sum()))

        found = authentication.recover(key, subject, everything, settings, name=name, resume=earlier, on_chunk=on_chunk)
    store.remove()
    return found


def _remarks(recoveries: dict[str, authentication.Recovery]) -> list[str]:
    counts = {METHODS[name].label: int((found.skipped > 0).sum()) for name, found in recoveries.items()}
    return [
        f"{label}: {count} pictures had steps whose gradient was not finite; those changed nothing."
        for label, count in counts.items()
        if count
    ]
