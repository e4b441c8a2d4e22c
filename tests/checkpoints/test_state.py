from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dmsec_jax.checkpoints.state import Checkpoints


class State(NamedTuple):
    params: dict
    opt: Any
    key: jax.Array
    step: jax.Array


def state(width=3, seed=0, impl="threefry2x32"):
    params = {"dense": {"kernel": jnp.full((2, width), 1.0 + seed), "bias": jnp.zeros(width, jnp.bfloat16)}}
    opt = optax.chain(optax.clip(1.0), optax.adamw(1e-3)).init(params)
    return State(params, opt, jax.random.key(seed, impl=impl), jnp.int32(seed))


def abstract(tree):
    return jax.eval_shape(lambda: tree)


def assert_equal(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert a.dtype == b.dtype
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
def test_state_with_optimiser_and_typed_key_comes_back(tmp_path, impl):
    saved = state(seed=7, impl=impl)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(7, saved, {"loss": 0.5, "config": {"lr": 1e-3}})
    with Checkpoints(tmp_path) as checkpoints:
        for like in (state(impl=impl), abstract(saved)):
            restored = checkpoints.restore(like)
            assert (restored.step, restored.metadata) == (7, {"loss": 0.5, "config": {"lr": 1e-3}})
            assert_equal(restored.tree, saved)
            draw = lambda key: jax.random.normal(key, (3,))
            np.testing.assert_array_equal(draw(restored.tree.key), draw(saved.key))


def test_newest_is_restored_and_the_last_two_are_kept(tmp_path):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        assert checkpoints.restore(state()) is None
        for step in (1, 2, 3):
            checkpoints.save(step, state(seed=step))
        assert checkpoints.restore(state()).step == 3
        assert_equal(checkpoints.restore(state(), step=2).tree, state(seed=2))
        with pytest.raises(ValueError, match=r"step must be one of \[2, 3\], got 1"):
            checkpoints.restore(state(), step=1)
        with pytest.raises(ValueError, match="step must be beyond the newest saved step 3, got 3"):
            checkpoints.save(3, state())
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["2", "3"]


def test_save_has_read_the_state_when_it_returns(tmp_path):
    overwrite = jax.jit(lambda x: x - 100, donate_argnums=0)
    with Checkpoints(tmp_path) as checkpoints:
        weights = jnp.arange(1 << 20, dtype=jnp.float32)
        like = abstract({"w": weights})
        checkpoints.save(1, {"w": weights})
        overwrite(weights).block_until_ready()
        np.testing.assert_array_equal(checkpoints.restore(like).tree["w"], np.arange(1 << 20))


def test_interrupted_save_is_never_restored_and_is_cleaned_up(tmp_path, monkeypatch):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state(seed=1))
    for name in ("2.orbax-checkpoint-tmp", "2.orbax-checkpoint-tmp-1700000000"):  # what a killed save leaves
        (tmp_path / name / "tree").mkdir(parents=True)
        (tmp_path / name / "tree" / "half").write_bytes(b"\0" * 10)
    with Checkpoints(tmp_path) as checkpoints:
        assert_equal(checkpoints.restore(state()).tree, state(seed=1))
        checkpoints.save(2, state(seed=2))
        assert_equal(checkpoints.restore(state()).tree, state(seed=2))
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["1", "2"]


def test_other_structure_lists_every_difference(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state())
        other = state(width=4)._replace(step=jnp.float32(0))
        other.params["more"] = jnp.ones(2)
        with pytest.raises(ValueError, match=r"checkpoint 1 of .* must be the state that this run needs") as caught:
            checkpoints.restore(other)
    lines = str(caught.value).split("\n")[1:]
    assert "  .params['dense']['kernel']: saved [2, 3] float32, wanted [2, 4] float32" in lines
    assert "  .params['more']: saved None, wanted [2] float32" in lines
    assert "  .step: saved [] int32, wanted [] float32" in lines
    assert len(lines) == 8  # two parameters, two moments of each, the new one, the step


@pytest.mark.parametrize("lost", ["half of a file", "every array", "the note"])
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_it_counts(tmp_path, lost):
    notes = []
    with Checkpoints(tmp_path) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, state(seed=step))
    if lost == "half of a file":
        data = max((tmp_path / "2" / "tree").rglob("*"), key=lambda path: path.is_file() and path.stat().st_size)
        data.write_bytes(data.read_bytes()[: data.stat().st_size // 2])
    elif lost == "every array":
        for path in (tmp_path / "2" / "tree").rglob("d/*"):
            path.unlink()
    else:
        next(path for path in (tmp_path / "2" / "note").rglob("*") if path.is_file()).write_text('{"structure": {')
    with Checkpoints(tmp_path, read_only=True, note=notes.append) as checkpoints:
        assert checkpoints.restore(state()).step == 1
    with Checkpoints(tmp_path, note=notes.append) as checkpoints:
        restored = checkpoints.restore(state())
        assert restored.step == 1
        assert_equal(restored.tree, state(seed=1))
        checkpoints.save(2, state(seed=2))
    with Checkpoints(tmp_path, note=notes.append) as checkpoints:
        assert checkpoints.restore(state()).step == 2
    assert len(notes) == 2
    assert all("checkpoint 2 of" in note and "cannot be read" in note for note in notes)
    assert "2.damaged" in notes[1]


def test_reading_leaves_a_save_under_way_alone(tmp_path):
    with Checkpoints(tmp_path / "run") as checkpoints:
        checkpoints.save(1, {"a": np.arange(3.0)})
    under_way = tmp_path / "run" / "2.orbax-checkpoint-tmp"
    under_way.mkdir()
    with Checkpoints(tmp_path / "run", read_only=True) as looked_at:
        assert looked_at.restore({"a": jax.ShapeDtypeStruct((3,), jnp.float32)}).step == 1
    assert under_way.is_dir()


def test_another_origin_or_none_is_refused_by_name(tmp_path):
    like = {"a": np.arange(3.0)}
    run = {"seed": 0, "recipe": {"rank": 4, "tune": {"rate": 0.1}}, "pictures": ["1", "2"]}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, like, {"run": run, "more": 1})
        assert checkpoints.restore(like, metadata={"run": run}).metadata["more"] == 1
        other = {"seed": 1, "recipe": {"rank": 4, "tune": {"rate": 0.2}}, "pictures": ["2", "1"]}
        names = r"another run\.pictures, run\.recipe\.tune\.rate, run\.seed; choose another output folder, or remove"
        with pytest.raises(ValueError, match=rf"checkpoint 1 of .* must be one of this run, got {names}"):
            checkpoints.restore({}, metadata={"run": other})
        checkpoints.save(2, like)
        with pytest.raises(ValueError, match="must be one of this run, got another run; choose another output folder"):
            checkpoints.restore(like, metadata={"run": run})


def test_full_disk_is_one_error_and_leaves_nothing(tmp_path, monkeypatch):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"a": np.arange(3.0)})

        def full(step, args):
            (tmp_path / f"{step}.orbax-checkpoint-tmp").mkdir()
            raise ValueError('RESOURCE_EXHAUSTED: Error writing "a"\n and much more')

        monkeypatch.setattr(checkpoints._manager, "save", full)
        with pytest.raises(OSError, match=r"cannot write checkpoint 2 of .*: no space left.*free some space") as caught:
            checkpoints.save(2, {"a": np.arange(3.0)})
        assert "\n" not in str(caught.value)
    assert [entry.name for entry in tmp_path.iterdir()] == ["1"]
