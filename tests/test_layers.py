"""The architecture as tests: imports go down, heavy libraries have one home, files are small and documented."""

import ast
import functools
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOOR = {
    "core": 0,
    "assets": 0,
    "models": 1,
    "metrics": 1,
    "data": 1,
    "checkpoints": 2,
    "diffusion": 2,
    "causal": 2,
    "finetune": 3,
    "methods": 4,
    "functions": 4,
    "parallel": 4,
    "embedding": 5,
    "loading": 5,
    "launch": 5,
    "report": 6,
    "imitation": 8,
    "commands": 9,
    "pipeline": 6,
    "pretrain": 7,
    "audit": 7,
    "authentication": 7,
    "discovery": 7,
    "protection": 7,
    "surrogates": 7,
    "robustness": 7,
    "monitoring": 7,
    "tuning": 7,
    "cli": 10,
    "__main__": 11,
}
HOME_OF = {"flax": {"models"}, "numpyro": {"causal"}, "torch": set(), "diffusers": set(), "transformers": set()}
FUNCTIONS_ONLY = {"models", "checkpoints"}  # methods see functions, never models
FILES = sorted((ROOT / "dmsec_jax").rglob("*.py"))

each_file = pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))


@functools.cache
def parsed(path):
    return ast.parse(path.read_text())


def imported(tree, module):
    """Every dotted name that `tree` imports; `module`, as ("dmsec_jax", "models", "unet"), anchors relative imports."""
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = [*module[: -node.level], *filter(None, [node.module])] if node.level else [node.module]
            names += [".".join([*base, alias.name]) for alias in node.names]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            names += [arg.value for arg in node.args[:1] if isinstance(arg, ast.Constant)]
    return names


def violations(tree, module):
    """What the imports of `module` break, one sentence each; `__init__` is a last part like any other."""
    home = module[1]
    broken = []
    for name in imported(tree, module):
        library, *rest = name.split(".")
        if home not in HOME_OF.get(library, {home}):
            broken.append(f"{name}: {library} is allowed in {HOME_OF[library] or 'tests and benchmarks only'}")
        if library != "dmsec_jax" or not rest or rest[0] == "__version__":
            continue
        used = rest[0]
        if used not in FLOOR:
            broken.append(f"{name}: {used} has no floor")
        elif used == home and home == "methods":
            broken.append(f"{name}: methods never import each other")
        elif used != home and FLOOR[used] >= FLOOR[home]:
            broken.append(f"{name}: imports go down, {home} is on floor {FLOOR[home]}, {used} on {FLOOR[used]}")
        elif home == "methods" and used in FUNCTIONS_ONLY:
            broken.append(f"{name}: methods see functions, never models or files")
    return broken


@pytest.mark.parametrize(
    ("module", "source", "broken"),
    [
        ("core.trees", "from dmsec_jax.models import unet", True),
        ("core.trees", "import dmsec_jax.models.unet as u", True),
        ("core.trees", "from dmsec_jax import models", True),
        ("core.trees", "def f():\n    from ..models.unet import apply", True),
        ("core.trees", "import importlib\nimportlib.import_module('dmsec_jax.cli')", True),
        ("models.unet", "from ..core import trees\nfrom . import layers\nfrom .layers import conv\nimport flax", False),
        ("models.__init__", "from . import layers", False),
        ("metrics.image", "from dmsec_jax.models import features", True),
        ("methods.advdm", "from . import cgi_dm", True),
        ("methods.advdm", "from dmsec_jax.methods.cgi_dm import step", True),
        ("methods.advdm", "from dmsec_jax.models import unet", True),
        ("methods.advdm", "from ..diffusion import loss\nfrom dmsec_jax import __version__", False),
        ("diffusion.loss", "import flax.linen as nn", True),
        ("causal.sem", "from numpyro import distributions", False),
        ("finetune.lora", "import numpyro", True),
        ("checkpoints.io", "def f():\n    import torch", True),
        ("cli", "from dmsec_jax import pipeline, report\nfrom .pretrain import run", False),
        ("pipeline", "from .cli import main", True),
        ("core.trees", "from dmsec_jax.utils import f", True),
    ],
)
def test_planted_imports_are_judged(module, source, broken):
    assert bool(violations(ast.parse(source), ("dmsec_jax", *module.split(".")))) == broken


@each_file
def test_imports_go_down_and_libraries_stay_home(path):
    module = path.relative_to(ROOT).with_suffix("").parts
    if module != ("dmsec_jax", "__init__"):
        assert module[1] in FLOOR, f"{module[1]} has no floor: give it one here and in the design"
        assert violations(parsed(path), module) == []


def test_torch_stays_in_parity_tests_and_baselines():
    homes = (ROOT / "tests/parity", ROOT / "benchmarks/torch_baselines")
    strangers = {}
    for path in [*(ROOT / "tests").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]:
        tops = {name.split(".")[0] for name in imported(parsed(path), path.relative_to(ROOT).with_suffix("").parts)}
        if tops & {"torch", "diffusers", "transformers"} and not any(path.is_relative_to(home) for home in homes):
            strangers[str(path)] = tops
    assert strangers == {}


@each_file
def test_files_are_small_and_named_for_what_they_hold(path):
    assert path.read_text().count("\n") <= 400, "over 400 lines: split it"
    assert not any("util" in part for part in path.relative_to(ROOT).parts), "name it for what it holds"


@each_file
def test_public_functions_are_documented_and_short(path):
    tree = parsed(path)
    assert ast.get_docstring(tree), "the module has no docstring"
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    public = [node for node in functions if not node.name.startswith("_")]
    assert [node.name for node in public if not ast.get_docstring(node)] == []
    assert {node.name: lines(node) for node in functions if lines(node) > 60} == {}


def lines(function):
    """Lines of a function from its `def`, without the docstring."""
    text = function.body[0] if ast.get_docstring(function) else None
    return function.end_lineno - function.lineno + 1 - (text.end_lineno - text.lineno + 1 if text else 0)


def test_importing_the_package_loads_nothing():
    code = "import sys, dmsec_jax; print([m for m in sys.modules if m.startswith(('dmsec_jax.', 'jax', 'numpy'))])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
