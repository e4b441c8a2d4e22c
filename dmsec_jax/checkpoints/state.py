"""Training state that survives interruption: a thin wrapper of orbax's CheckpointManager."""

import contextlib
import logging
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp

from dmsec_jax.core import spread
from dmsec_jax.core.checks import fail, require


class Restored(NamedTuple):
    """What `Checkpoints.restore` found."""

    step: int
    tree: Any
    metadata: dict[str, Any]


class Damaged(ValueError):
    """A checkpoint that cannot be read."""


class Checkpoints:
    """Numbered checkpoints of one run in one folder; also a context manager that closes it.

    A save writes beside its final name and is renamed when complete, so an interrupted one is never restored; its
    remains are removed at the next start. One that was damaged later is set aside, and the one before it is restored.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        keep: int = 2,
        read_only: bool = False,
        note: Callable[[str], None] = lambda text: warnings.warn(text, stacklevel=2),
    ):
        """Opens or creates `folder`; the newest `keep` checkpoints are kept.

        `read_only` touches nothing, for looking at a run that is still going: opening cleans up what looks interrupted. `note` is told of a
        checkpoint that cannot be read.
        """
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            create=not read_only,
            cleanup_tmp_directories=not read_only,
            read_only=read_only,
            enable_async_checkpointing=False,  # so that a full disk is found, and reported, here and once
        )
        self.folder, self._note, self._read_only = Path(folder).resolve(), note, read_only
        self._manager = ocp.CheckpointManager(self.folder, options=options)

    @property
    def steps(self) -> list[int]:
        """The saved steps, whether they can be read or not."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, tree: Any, metadata: Mapping[str, Any] | None = None) -> None:
        """Saves any pytree of arrays, typed keys included; `metadata` is anything that JSON holds.

        Raises:
            ValueError: if `step` is not beyond the newest saved one.
            OSError: with the cure, if it cannot be written; older checkpoints stay as they were.
        """
        newest = self._manager.latest_step()
        later = newest is None or step > newest
        require(later, "step", f"beyond the newest saved step {newest}", step, "save to another folder")
        note = {"structure": _structure(tree), "metadata": dict(metadata or {})}
        items = ocp.args.Composite(tree=ocp.args.StandardSave(tree), note=ocp.args.JsonSave(note))
        try:
            with _quiet():
                self._manager.save(step, args=items)
        except (OSError, ValueError) as error:  # the latter from the library that writes the arrays
            for part in self.folder.glob(f"{step}.orbax-checkpoint-tmp*"):
                shutil.rmtree(part, ignore_errors=True)
            full = "RESOURCE_EXHAUSTED" in str(error) or "No space left" in str(error)
            reason = "no space left on the device" if full else " ".join(str(error).split())[:300]
            cure = "free some space or choose another folder"
            raise OSError(
                f"cannot write checkpoint {step} of {self.folder}: {reason}; older ones are unchanged; {cure}"
            ) from error

    def restore(
        self, like: Any, step: int | None = None, *, metadata: Mapping[str, Any] | None = None
    ) -> Restored | None:
        """The newest checkpoint that can be read (or that of `step`) in the structure and placement of `like`; None if there is none.

        Args:
            like: pytree of arrays or `jax.ShapeDtypeStruct`s.
            step: a saved step.
            metadata: what its metadata must hold, among other entries.

        Raises:
            ValueError: if the metadata differ, which names the entries, or if the checkpoint holds another tree, which
                lists every leaf that differs.
        """
        saved = self.steps
        if step is not None:
            require(step in saved, "step", f"one of {saved}", step, "choose a saved step")
            return self._restore(like, step, metadata)
        for newest in reversed(saved):
            try:
                return self._restore(like, newest, metadata)
            except Damaged as error:
                self._set_aside(newest, error)
        return None

    def _restore(self, like: Any, step: int, metadata: Mapping[str, Any] | None) -> Restored:
        place = f"checkpoint {step} of {self.folder}"
        with _damage_named(place):
            note = self._manager.restore(step, args=ocp.args.Composite(note=ocp.args.JsonRestore()))["note"]
        others = [key for name in metadata or {} for key in differing(note["metadata"].get(name), metadata[name], name)]
        cure = f"choose another output folder, or remove {self.folder} to start anew"
        require(not others, place, "one of this run", f"another {', '.join(others)}", cure)
        saved, wanted = note["structure"], _structure(like)
        different = sorted(key for key in saved.keys() | wanted.keys() if saved.get(key) != wanted.get(key))
        if different:
            lines = "".join(f"\n  {key}: saved {saved.get(key)}, wanted {wanted.get(key)}" for key in different)
            cure = f"resume with the settings of the interrupted run, or start in another folder:{lines}"
            raise fail(place, "the state that this run needs", f"{len(different)} different leaves", cure)
        with _damage_named(place):
            tree = self._manager.restore(step, args=ocp.args.Composite(tree=ocp.args.StandardRestore(like)))["tree"]
        return Restored(step=step, tree=tree, metadata=note["metadata"])

    def _set_aside(self, step: int, error: Damaged) -> None:
        """Renames a damaged checkpoint, so that the run may save that step again."""
        where = "" if self._read_only else f"; it is now {step}.damaged"
        self._note(f"{error}; going on from the one before it{where}")
        if self._read_only:
            return
        if jax.process_index() == 0:
            aside = self.folder / f"{step}.damaged"
            shutil.rmtree(aside, ignore_errors=True)
            (self.folder / str(step)).rename(aside)
        spread.meet()
        self._manager.reload()

    def close(self) -> None:
        """Releases what orbax holds."""
        self._manager.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def differing(saved: Any, wanted: Any, name: str) -> list[str]:
    """Dotted names, below `name`, of the entries that differ."""
    if isinstance(saved, Mapping) and isinstance(wanted, Mapping):
        names = sorted(saved.keys() | wanted.keys())
        return [key for part in names for key in differing(saved.get(part), wanted.get(part), f"{name}.{part}")]
    return [] if saved == wanted else [name]


@contextlib.contextmanager
def _damage_named(place: str) -> Iterator[None]:
    """Turns what orbax and its libraries raise on files that were cut short or changed into `Damaged`."""
    try:
        with _quiet():
            yield
    except Exception as error:  # of many kinds: JSON, zarr, missing files, its own
        raise Damaged(f"{place} cannot be read ({' '.join(str(error).split())[:200]})") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps orbax's threads from logging the error that its `save` raises as well."""
    logger = logging.getLogger("absl")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)


def _structure(tree: Any) -> dict[str, str]:
    """Leaf path -> shape and dtype, e.g. {".params['a']": "[2, 3] float32"}."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): f"{list(jax.numpy.shape(x))} {jax.numpy.result_type(x)}" for path, x in leaves}
