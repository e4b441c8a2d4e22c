"""What every module of dmsec_jax/methods has in common; a new file there is picked up by itself.

Its own test file, tests/methods/test_<name>.py, supplies `protocol_case()`, a dict of
    cfg      a Config whose float fields may be scaled by 1.01 without harm
    params   the parameter tree
    init     positional arguments of `init` before cfg
    step     positional arguments of `step` between state and params
    run      positional arguments of `run` between key and params
    options  keyword-only arguments by name; each function is given those that it declares
"""

import dataclasses
import importlib
import importlib.util
import inspect
import re
from pathlib import Path

import jax
import numpy as np
import pytest

import dmsec_jax.methods

TESTS = Path(__file__).parents[1]
COLLECTIONS = {"__init__", "detection", "membership", "purify"}  # short functions of several papers, without a state
METHODS = sorted(p.stem for p in Path(dmsec_jax.methods.__path__[0]).glob("*.py") if p.stem not in COLLECTIONS)
methods = pytest.mark.parametrize("name", METHODS)


def load(name):
    return importlib.import_module(f"dmsec_jax.methods.{name}")


def case_of(name):
    path = TESTS / "methods" / f"test_{name}.py"
    assert path.exists(), f"methods/{name}.py needs {path.name} with protocol_case()"
    spec = importlib.util.spec_from_file_location(f"case_{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.protocol_case()


def declared(function, options):
    return {key: value for key, value in options.items() if key in inspect.signature(function).parameters}


def positional(function):
    return [p.name for p in inspect.signature(function).parameters.values() if p.kind is not p.KEYWORD_ONLY]


def keyword_only(function):
    return {p.name for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY}


@methods
def test_exports(name):
    module = load(name)
    assert dataclasses.is_dataclass(module.Config)
    for record in (module.State, module.Info):
        assert issubclass(record, tuple)
        assert record._fields
        assert record.__module__ == module.__name__
    for function in (module.init, module.step, module.run):
        assert inspect.isfunction(function)


@methods
def test_signatures(name):
    module = load(name)
    assert positional(module.init)[-1] == "cfg"
    assert positional(module.step)[:2] == ["key", "state"]
    assert positional(module.step)[-2:] == ["params", "cfg"]
    assert positional(module.run)[0] == "key"
    assert positional(module.run)[-2:] == ["params", "cfg"]
    assert keyword_only(module.step) == keyword_only(module.run)
    assert any(option.endswith("_fn") for option in keyword_only(module.step))
    assert keyword_only(module.init) <= keyword_only(module.step)


@methods
def test_docstring_follows_the_template(name):
    doc = load(name).__doc__
    assert all(re.search(f"^{part}", doc, re.MULTILINE) for part in ("Algorithm", "Symbols", "Deviations"))
    written = "".join(path.read_text() for path in TESTS.rglob("test_*.py"))
    missing = [test for test in set(re.findall(r"\btest_\w+", doc)) if f"def {test}(" not in written]
    assert not missing, f"methods/{name}.py cites tests that do not exist: {missing}"


@methods
def test_config_is_frozen_and_its_floats_are_traced(name):
    cfg = case_of(name)["cfg"]
    fields = dataclasses.fields(cfg)
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(cfg, fields[0].name, 0)
    moved = jax.tree.map(lambda leaf: leaf + 1.0, cfg)
    for field in fields:
        if not dataclasses.is_dataclass(field.type):
            before, after = getattr(cfg, field.name), getattr(moved, field.name)
            assert after == (before + 1.0 if field.type is float else before), field.name


@methods
def test_run_is_a_loop_over_step_and_floats_do_not_retrace(name):
    module, case = load(name), case_of(name)
    key, params, cfg, options = jax.random.key(0), case["params"], case["cfg"], case["options"]
    traces = []

    @jax.jit
    def run(key, batch, params, cfg):
        traces.append(1)
        return module.run(key, *batch, params, cfg, **declared(module.run, options))

    state, info = run(key, case["run"], params, cfg)
    run(key, case["run"], params, jax.tree.map(lambda leaf: leaf * 1.01, cfg))
    assert len(traces) == 1

    step = jax.jit(lambda *args: module.step(*args, **declared(module.step, options)))
    looped, infos = module.init(*case["init"], cfg, **declared(module.init, options)), []
    count = len(jax.tree.leaves(info)[0])
    for i in range(count):
        looped, now = step(jax.random.fold_in(key, i), looped, *case["step"], params, cfg)
        infos.append(now)
    assert step._cache_size() == 1, "another step of the same shapes is compiled anew"
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *infos)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), (looped, stacked), (state, info))
