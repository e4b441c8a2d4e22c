"""The long verbs on many devices and in two processes: what one device gives, with files written once."""

import dataclasses
import functools
import importlib
import json
import math
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image
from processes import in_two
from safetensors.numpy import load_file

from dmsec_jax import cli, launch, parallel, pipeline
from dmsec_jax.core import files, spread

SAMPLING = ["--settings.evaluations", "8", "--settings.num-steps", "2", "--settings.batch-size", "3"]
SAMPLING += ["--settings.methods", "finextract", "plain"]
RECOVERING = ["--settings.num-draws", "2", "--settings.num-steps", "50", "--settings.tile", "2"]
RECOVERING += ["--settings.cgi-draws", "1", "--settings.batch-size", "3", "--methods", "cgi-dm", "loss"]
PRETRAIN = ["--set", "train.num_steps=4", "chunk_steps=2", "held_out=8", "check_sizes=[5]", "train.sizes=[5]"]
PRETRAIN += ["train.rows=[50,100]", "net.width=8", "net.depth=1", "train.pairs=80"]  # eight data sets an update
TUNING = ["--set", "tune.num_steps=4", "chunk_steps=2", "save_every=2", "tune.adam_epsilon=1e-3"]
TUNERS = {"finetune": ["patterns=[conv_out]"], "finetune lora": ["lora.rank=2"], "finetune norm": ["--bayes", "norm"]}
"""Cases of the verb: full weights, LoRA, and a posterior over the normalisation layers -> how their options end."""


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    rng = np.random.default_rng(0)
    first = rng.normal(size=300)
    columns = np.stack([first, first + rng.normal(size=300), rng.normal(size=300)], axis=1)
    path = tmp_path_factory.mktemp("table") / "table.csv"
    path.write_text("a,b,c\n" + "\n".join(",".join(f"{value:.6f}" for value in row) for row in columns))
    return path


@pytest.fixture(scope="module")
def line(tiny_folder, pictures, table, tmp_path_factory):
    """(verb or case of it, folder of its results) -> the command line; what reads a fine-tuned model takes that of one device."""
    tuned = tmp_path_factory.mktemp("alone") / "finetune"

    def of(verb, out=None):
        known = ["--images", str(pictures), "--prompt", "a red dog"]
        model = ["--model", str(tiny_folder)]
        models = ["--base", str(tiny_folder), "--model", str(tuned / "model")]
        options = {
            **{case: [*known, *model, "--sample-every", "2", *TUNING, *more] for case, more in TUNERS.items()},
            "extract": [*known, *models, *SAMPLING],
            "authenticate": [*known, *models, *RECOVERING],
            "protect": [*known, *model, "--steps", "2", "--purifiers", "jpeg"],
            "discover": [str(table), "--restarts", "4", "--set", "num_steps=3"],
            "pretrain": ["--what", "skeleton", "--work", f"{out or tuned}-work", *PRETRAIN],
        }
        return [verb.partition(" ")[0], *options[verb], "--out", str(out or tuned.parent / verb)]

    return of


@pytest.fixture(scope="module")
def alone(line):
    """verb -> folder of what one device gives, and of what it is made from."""

    @functools.cache
    def of(verb):
        if verb in ("extract", "authenticate"):
            of("finetune")
        assert cli.main(line(verb)) == 0
        return Path(line(verb)[-1])

    return of


def assert_same(found: Path, expected: Path, atol: float = 1e-6):
    """Pictures to a level, weights and figures to rounding, and no file more or less."""
    names = lambda place: sorted(path.relative_to(place) for path in place.rglob("*") if path.is_file())
    ignored = lambda name: "checkpoints" in name.parts
    assert [n for n in names(found) if not ignored(n)] == [n for n in names(expected) if not ignored(n)]
    for name in names(expected):
        mine, other = found / name, expected / name
        if name.suffix == ".png":
            levels = np.asarray(Image.open(mine), int) - np.asarray(Image.open(other), int)
            assert np.abs(levels).max() <= 1, name
        elif name.suffix == ".safetensors":
            ours, theirs = load_file(mine), load_file(other)
            for key, tensor in theirs.items():
                np.testing.assert_allclose(ours[key], tensor, rtol=1e-4, atol=atol, err_msg=key)
        elif name.name == "result.json":
            ours, theirs = (json.loads(path.read_text()) for path in (mine, other))
            assert len(ours["rows"]) == len(theirs["rows"])
            for one, row in zip(ours["rows"], theirs["rows"], strict=True):
                assert (one["metric"], one["method"]) == (row["metric"], row["method"])
                numbers = [[part[name] for name in ("value", "low", "high")] for part in (one, row)]
                np.testing.assert_allclose(*(np.array(part, float) for part in numbers), rtol=1e-3, atol=1e-4)


def axes(verb):
    return "data=2,fsdp=2" if verb in TUNERS else "data"  # four rows a step


LONG = [pytest.param(case, marks=pytest.mark.long) for case in ("finetune lora", "finetune norm")]


@pytest.mark.slow  # compiles everything twice
@pytest.mark.parametrize("verb", [*cli.SHARED, *LONG])
def test_eight_devices_give_what_one_gives(verb, line, alone, tmp_path):
    expected = alone(verb)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(spread, "SMALL", 1)  # so that weights of this size are cut
        if verb in TUNERS:
            patched.setattr(parallel.jax, "devices", lambda: jax.local_devices()[:4])
        assert cli.main([*line(verb, tmp_path / verb), "--mesh", axes(verb)]) == 0
    assert_same(tmp_path / verb, expected)


@pytest.mark.slow  # processes that compile
@pytest.mark.parametrize("verb", ["finetune", "extract", "discover", pytest.param("pretrain", marks=pytest.mark.long)])
def test_two_processes_give_what_one_gives(verb, line, alone, tmp_path):
    expected = alone(verb)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        where = f"127.0.0.1:{probe.getsockname()[1]}"
    together = ["--mesh", axes(verb), "--coordinator", where, "--num-processes", "2", "--process-id"]
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "env": environment}
    command = [sys.executable, "-c", CHILD, *line(verb, tmp_path / verb), *together]
    children = [subprocess.Popen([*command, str(i)], **pipes) for i in range(2)]
    outputs = [child.communicate(timeout=900)[0] for child in children]
    assert [child.returncode for child in children] == [0, 0], "\n".join(outputs)
    assert_same(tmp_path / verb, expected)


@pytest.mark.parametrize("failing", [0, 1])
def test_where_one_process_fails_none_waits(failing):
    ended = in_two(FAILING.format(failing))
    assert [process.returncode != 0 for process in ended] == [True, True], ended
    assert "ValueError: no space left" in ended[failing].stderr


FAILING = """
import sys
from dmsec_jax import launch
from dmsec_jax.core import spread

i = int(sys.argv[2])
with launch.on(launch.Devices(coordinator=sys.argv[1], num_processes=2, process_id=i)):
    spread.meet()
    if i == {}:
        raise ValueError("no space left")
    spread.meet()
"""


CHILD = """
import sys
from dmsec_jax import cli
from dmsec_jax.core import spread

spread.SMALL = 1
sys.exit(cli.main(sys.argv[1:]))
"""


def test_only_process_0_leaves_files(tmp_path, monkeypatch):
    (tmp_path / "kept").write_text("kept")
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    files.write_json(tmp_path / "a.json", {})
    with files.atomic_folder(tmp_path / "folder", "marker") as folder:
        (folder / "marker").write_text("")
    files.remove(tmp_path / "kept")
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    monkeypatch.setattr(jax, "process_index", lambda: 0)
    files.write_json(tmp_path / "a.json", {})
    files.remove(tmp_path / "kept")
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize(("options", "message"), [
    (["--mesh", "data=3"], "mesh must be of 8 devices"),
    (["--mesh", ""], "leave the option out"),
    (["--coordinator", "localhost:1"], "all three or none"),
])  # fmt: skip
def test_mistakes_are_one_line(table, options, message, capsys):
    assert cli.main(["discover", str(table), *options]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("mesh", "begun", "count"), [("data=2,fsdp=3", False, 6), ("data=2", True, None), ("data", False, 0)]
)
def test_the_cores_of_a_cpu_become_devices_unless_jax_has_begun(mesh, begun, count):
    program = f"""
import jax
from dmsec_jax import launch
if {begun}:
    jax.devices()
try:
    with launch.on(launch.Devices(mesh={mesh!r})):
        print(jax.sharding.get_mesh().size)
except ValueError as error:
    print(error)
"""
    environment = {
        name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES")
    }
    ran = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    expected = "mesh must be of 1 devices" if begun else str(count or len(os.sched_getaffinity(0)))
    assert ran.stdout.startswith(expected)


def test_without_options_there_is_no_mesh():
    with launch.on(launch.Devices()):
        assert jax.sharding.get_mesh().empty
    with launch.on(launch.Devices(mesh="data=4,fsdp=2")):
        assert dict(jax.sharding.get_mesh().shape) == {"data": 4, "fsdp": 2}
    assert jax.sharding.get_mesh().empty


def test_all_devices_are_counted(capsys):
    assert launch.count(launch.Devices()) == 0
    assert "process 0 of 1: 8 of 8 devices" in capsys.readouterr().out


def test_the_recipes_use_options_that_exist():
    recipes = (
        (Path(__file__).parents[1] / "README.md").read_text().partition("## More devices")[2].partition("\n## ")[0]
    )
    options = lambda config: {field.name.replace("_", "-") for field in dataclasses.fields(config)}
    shared = options(launch.Devices) | options(pipeline.Reading)
    used = lambda text: set(re.findall(r" --([a-z-]+)", text))
    lines = re.findall(rf"dmsec ({'|'.join(cli.SHARED)}) (.*)", recipes)
    assert {verb for verb, _ in lines} >= {"finetune", "extract"}
    for verb, rest in lines:
        command = importlib.import_module(f"dmsec_jax.commands.{verb}")
        assert used(rest) <= options(command.Config) | shared, rest
        if verb == "finetune":
            devices = math.prod(int(size) for size in re.findall(r"(?:data|fsdp)=(\d+)", rest))
            assert int(re.search(r"tune\.batch_size=(\d+)", rest)[1]) % devices == 0, "rows that devices can share"
    for rest in re.findall(r"dmsec_jax\.launch\b([^\n`&\"]*)", recipes):
        assert used(rest) <= options(launch.Devices), rest
