import dataclasses
import json
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from dmsec_jax.core.config import config, from_dict, load, to_dict


@config
class Optimiser:
    rate: float = 1e-3
    warmup: int = 0


@config
class Config:
    num_steps: int = 8
    radius: float = 0.05
    norm: Literal["l2", "linf"] = "linf"
    sizes: tuple[int, ...] = (1, 2)
    pair: tuple[float, str] = (0.5, "a")
    clip: float | None = None
    seed: int | str = 0
    remat: bool = False
    folder: Path = Path("out")
    optimiser: Optimiser = Optimiser()


@config
class Required:
    rank: int
    alpha: float


@pytest.fixture
def file(tmp_path):
    def write(text):
        path = tmp_path / "config.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


# pytree: floats traced, the rest static


def test_floats_and_nested_floats_are_the_leaves():
    assert jax.tree.leaves(Config(radius=0.25)) == [0.25, 1e-3]
    assert jax.tree.structure(Config(radius=0.1)) == jax.tree.structure(Config(radius=0.2))
    assert jax.tree.structure(Config(num_steps=1)) != jax.tree.structure(Config(num_steps=2))


def test_sweeping_floats_does_not_retrace_and_static_fields_do():
    traces = []

    @jax.jit
    def f(cfg, x):
        traces.append(cfg.num_steps)
        return cfg.radius * x + cfg.num_steps + cfg.optimiser.rate

    for radius in (0.1, 0.2, 0.3):
        for rate in (0.0, 1.0):
            value = f(Config(radius=radius, optimiser=Optimiser(rate=rate)), 10.0)
            np.testing.assert_allclose(value, 10 * radius + 8 + rate, rtol=1e-6)
    assert traces == [8]
    f(Config(num_steps=9), 10.0)
    assert traces == [8, 9]


def test_vmap_over_configs_equals_a_loop():
    def f(cfg):
        return cfg.radius**2 + cfg.optimiser.rate

    radii = [0.1, 0.2, 0.4]
    batch = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[Config(radius=r) for r in radii])
    np.testing.assert_allclose(jax.vmap(f)(batch), [f(Config(radius=r)) for r in radii], rtol=1e-6)
    axes = dataclasses.replace(jax.tree.map(lambda _: None, batch), radius=0)
    one_swept = dataclasses.replace(batch, optimiser=Optimiser())
    np.testing.assert_allclose(jax.vmap(f, in_axes=(axes,))(one_swept), jax.vmap(f)(batch), rtol=1e-6)


def test_gradient_with_respect_to_a_config():
    gradient = jax.grad(lambda cfg: cfg.radius**2)(Config(radius=3.0))
    assert gradient.radius == 6.0
    assert gradient.num_steps == 8


def test_configs_are_frozen_and_keyword_only():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().radius = 1.0
    with pytest.raises(TypeError, match="positional"):
        Optimiser(1e-3)


def test_string_annotations_are_refused():
    with pytest.raises(ValueError, match=r"Late\.rate must be annotated with a type, got 'float'; .*__future__"):
        config(type("Late", (), {"__annotations__": {"rate": "float"}, "rate": 0.1}))


# from_dict


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, Config()),
        ({"radius": 1}, Config(radius=1.0)),
        ({"radius": "1e-4"}, Config(radius=1e-4)),
        ({"radius": float("inf")}, Config(radius=float("inf"))),
        ({"norm": "l2"}, Config(norm="l2")),
        ({"sizes": [3, 4, 5]}, Config(sizes=(3, 4, 5))),
        ({"sizes": []}, Config(sizes=())),
        ({"pair": [1, "b"]}, Config(pair=(1.0, "b"))),
        ({"clip": 1}, Config(clip=1.0)),
        ({"clip": None}, Config()),
        ({"seed": "abc"}, Config(seed="abc")),
        ({"remat": True}, Config(remat=True)),
        ({"folder": "a/b"}, Config(folder=Path("a/b"))),
        ({"optimiser": {"rate": 0.5}}, Config(optimiser=Optimiser(rate=0.5))),
        ({"optimiser": Optimiser(warmup=3)}, Config(optimiser=Optimiser(warmup=3))),
    ],
)
def test_from_dict_takes(values, expected):
    made = from_dict(Config, values)
    assert made == expected
    assert type(made.radius) is float
    hash(jax.tree.structure(made))  # static fields must be hashable for jit


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"raduis": 1.0}, r"unknown key 'raduis'; did you mean 'radius'\?"),
        ({"zzz": 1}, "unknown key 'zzz'; known keys are clip, folder, norm"),
        ({7: 1}, "unknown key 7"),
        ({"optimiser": {"rat": 1.0}}, r"config\.optimiser must be .*unknown key 'rat'; did you mean 'rate'"),
        ({"optimiser": 3}, r"config\.optimiser must be a mapping of option to value, got int"),
        ({"num_steps": 1.5}, r"config\.num_steps must be of type int, got 1\.5"),
        ({"num_steps": True}, "of type int, got True"),
        ({"num_steps": None}, "of type int, got None"),
        ({"radius": "small"}, r"config\.radius must be of type float, got 'small'"),
        ({"radius": True}, "of type float, got True"),
        ({"radius": 10**400}, "of type float, got 1000"),
        ({"radius": None}, "of type float, got None"),
        ({"radius": float("nan")}, "of type float, got nan"),
        ({"norm": "l1"}, "one of 'l2', 'linf', got 'l1'"),
        ({"sizes": 3}, "tuple"),
        ({"sizes": [1, "b"]}, r"config\.sizes\[1\] must be of type int, got 'b'"),
        ({"pair": [1.0]}, "tuple"),
        ({"pair": ["x", "y"]}, r"config\.pair\[0\] must be of type float"),
        ({"clip": "x"}, r"config\.clip must be of type float, got 'x'"),
        ({"seed": 1.5}, "of type int or str, got 1.5"),
        ({"remat": 1}, "of type bool, got 1"),
        ({"folder": 3}, "Path"),
    ],
)
def test_from_dict_names_the_fault(values, message):
    with pytest.raises(ValueError, match=message):
        from_dict(Config, values)


def test_literals_do_not_confuse_true_with_one():
    @config
    class Factor:
        factor: Literal[1, 2] = 1

    assert from_dict(Factor, {"factor": 2}).factor == 2
    with pytest.raises(ValueError, match="one of 1, 2, got True"):
        from_dict(Factor, {"factor": True})


def test_missing_keys_are_all_named():
    with pytest.raises(ValueError, match="config must be complete for Required, got no rank, alpha"):
        from_dict(Required, {})


def test_plain_dataclasses_with_string_annotations_are_read_too():
    @dataclasses.dataclass(frozen=True)
    class Plain:
        width: "int" = 1
        derived: "int" = dataclasses.field(default=0, init=False)

    assert from_dict(Plain, {"width": 4}).width == 4
    with pytest.raises(ValueError, match="of type int"):
        from_dict(Plain, {"width": "4"})
    with pytest.raises(ValueError, match="unknown key 'derived'"):
        from_dict(Plain, {"derived": 1})


# to_dict

configs = st.builds(
    Config,
    num_steps=st.integers(),
    radius=st.floats(allow_nan=False),
    norm=st.sampled_from(["l2", "linf"]),
    sizes=st.lists(st.integers()).map(tuple),
    pair=st.tuples(st.floats(allow_nan=False), st.text()),
    clip=st.none() | st.floats(allow_nan=False),
    seed=st.integers() | st.text(),
    remat=st.booleans(),
    optimiser=st.builds(Optimiser, rate=st.floats(allow_nan=False), warmup=st.integers()),
)


@given(configs)
def test_to_dict_survives_json_and_yaml(cfg):
    values = to_dict(cfg)
    assert from_dict(Config, json.loads(json.dumps(values))) == cfg
    assert from_dict(Config, yaml.safe_load(yaml.safe_dump(values))) == cfg


def test_to_dict_makes_arrays_plain():
    batch = jax.tree.map(lambda leaf: jnp.asarray([leaf, leaf]), Config(radius=0.5))
    assert to_dict(batch)["radius"] == [0.5, 0.5]
    assert to_dict(Config(radius=np.float32(0.5)))["radius"] == 0.5
    assert json.dumps(to_dict(Config(radius=jnp.float32(0.5))))


# load


def test_load_reads_a_file_and_overrides_win(file):
    path = file("radius: 1e-2  # quarter\nsizes: [4]\noptimiser:\n  rate: 2\n")
    assert load(Config, path) == Config(radius=0.01, sizes=(4,), optimiser=Optimiser(rate=2.0))
    made = load(Config, str(path), ["radius=3", "optimiser.warmup=5", "norm=l2", "sizes=[7, 8]", "clip=null"])
    expected = Config(radius=3.0, sizes=(7, 8), norm="l2", optimiser=Optimiser(rate=2.0, warmup=5))
    assert made == expected


def test_load_of_an_empty_file_is_the_default(file):
    assert load(Config, file("")) == Config()
    assert load(Config, file("# nothing\n"), ["optimiser.rate=0.5"]) == Config(optimiser=Optimiser(rate=0.5))
    assert load(Config, file("optimiser:\n"), ["optimiser.rate=0.5"]) == Config(optimiser=Optimiser(rate=0.5))


def test_overrides_keep_equals_signs_and_take_the_last(file):
    assert load(Config, file(""), ["seed=a=b"]).seed == "a=b"
    assert load(Config, file(""), ["num_steps=1", "num_steps=2"]).num_steps == 2


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("radius: [", [], "config.yaml must be valid YAML"),
        ("radius: 1\nradius: 2", [], "key 'radius' appears twice"),
        ("optimiser: {rate: 1, rate: 2}", [], "key 'rate' appears twice"),
        ("radius: !!python/object:os.system x", [], "valid YAML"),
        ("[]", [], r"config.yaml must be a mapping of option to value, got \[\]"),
        ("false", [], "a mapping of option to value, got False"),
        ("just words", ["radius=1"], "a mapping of option to value, got 'just words'"),
        (b"\xff\xfe\x00", [], "UTF-8"),
        ("stepz: 1", [], r"config.yaml must be made of keys of .*Config, got unknown key 'stepz'"),
        ("", ["num_stepz=1"], "unknown key 'num_stepz'; did you mean 'num_steps'"),
        ("", ["radius"], "override must be of the form key=value, got 'radius'"),
        ("", ["radius=[1"], "override radius must be valid YAML"),
        ("num_steps: 3", ["num_steps.x=1"], "override must be nested only where num_steps is a mapping"),
        ("", ["optimiser.momentum=1"], "unknown key 'momentum'"),
        ("", ["norm=3"], "one of 'l2', 'linf', got 3"),
    ],
)
def test_load_names_the_fault(file, text, overrides, message):
    with pytest.raises(ValueError, match=message):
        load(Config, file(text), overrides)


def test_load_of_a_missing_file_or_a_folder(tmp_path):
    with pytest.raises(ValueError, match="must be a YAML file, got a folder; correct the path"):
        load(Config, tmp_path)
    with pytest.raises(FileNotFoundError, match=r"absent\.yaml must be a YAML file, got nothing; correct the path"):
        load(Config, tmp_path / "absent.yaml")
