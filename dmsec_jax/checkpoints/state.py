"""Training state that survives interruption: a thin wrapper of orbax's CheckpointManager."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp

from dmsec_jax.core.checks import fail, require


class Restored(NamedTuple):
    """What `Checkpoints.restore` found."""

    step: int
    tree: Any
    metadata: dict[str, Any]


class Checkpoints:
    """Numbered checkpoints of one run in one folder; also a context manager that waits for the last save.

    A save writes beside its final name and is renamed when complete, so an interrupted one is never restored; its
    remains are removed at the next start.
    """

    def __init__(self, folder: str | Path, *, keep: int = 2, read_only: bool = False):
        """Opens or creates `folder`; the newest `keep` checkpoints are kept.

        `read_only` touches nothing, for looking at a run that is still going: opening cleans up what looks interrupted.
        """
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, create=not read_only, cleanup_tmp_directories=not read_only, read_only=read_only
        )
        self.folder = Path(folder).resolve()
        self._manager = ocp.CheckpointManager(self.folder, options=options)

    def save(self, step: int, tree: Any, metadata: Mapping[str, Any] | None = None) -> None:
        """Saves any pytree of arrays, typed keys included; `metadata` is anything that JSON holds.

        Returns when the arrays have been read (they may be donated then); writing goes on in the background.

        Raises:
            ValueError: if `step` is not beyond the newest saved one.
        """
        newest = self._manager.latest_step()
        later = newest is None or step > newest
        require(later, "step", f"beyond the newest saved step {newest}", step, "save to another folder")
        note = {"structure": _structure(tree), "metadata": dict(metadata or {})}
        items = ocp.args.Composite(tree=ocp.args.StandardSave(tree), note=ocp.args.JsonSave(note))
        self._manager.save(step, args=items)

    def restore(self, like: Any, step: int | None = None) -> Restored | None:
        """The newest checkpoint (or that of `step`) in the structure and placement of `like`; None if there is none.

        Args:
            like: pytree of arrays or `jax.ShapeDtypeStruct`s.
            step: a saved step.

        Raises:
            ValueError: if the checkpoint holds another tree; lists every leaf that differs.
        """
        self._manager.wait_until_finished()
        step = self._manager.latest_step() if step is None else step
        if step is None:
            return None
        place = f"checkpoint {step} of {self.folder}"
        if step not in self._manager.all_steps():
            raise fail("step", f"one of {list(self._manager.all_steps())}", step, "choose a saved step")
        note = self._manager.restore(step, args=ocp.args.Composite(note=ocp.args.JsonRestore()))["note"]
        saved, wanted = note["structure"], _structure(like)
        different = sorted(key for key in saved.keys() | wanted.keys() if saved.get(key) != wanted.get(key))
        if different:
            lines = "".join(f"\n  {key}: saved {saved.get(key)}, wanted {wanted.get(key)}" for key in different)
            cure = f"resume with the settings of the interrupted run, or start in another folder:{lines}"
            raise fail(place, "the state that this run needs", f"{len(different)} different leaves", cure)
        tree = self._manager.restore(step, args=ocp.args.Composite(tree=ocp.args.StandardRestore(like)))["tree"]
        return Restored(step=step, tree=tree, metadata=note["metadata"])

    def close(self) -> None:
        """Waits for the save under way and raises what went wrong in it."""
        self._manager.wait_until_finished()
        self._manager.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _structure(tree: Any) -> dict[str, str]:
    """Leaf path -> shape and dtype, e.g. {".params['a']": "[2, 3] float32"}."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): f"{list(jax.numpy.shape(x))} {jax.numpy.result_type(x)}" for path, x in leaves}
