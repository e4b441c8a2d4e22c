"""Long verbs that are killed again and again end with the files of a run that was left alone."""

import json
import random
import shutil

import pytest
from killing import images, resumed, run
from test_launch import assert_same

pytestmark = pytest.mark.slow  # dozens of processes

FINETUNE = ["--sample-every", "4", "--set", "tune.num_steps=8", "chunk_steps=2", "save_every=2", "patterns=[conv_out]"]
FINETUNE += ["tune.adam_epsilon=1e-3"]  # or Adam makes whole steps of gradients that are rounding errors
EXTRACT = ["--settings.evaluations", "12", "--settings.num-steps", "2", "--settings.batch-size", "2"]
EXTRACT += ["--settings.methods", "finextract", "plain"]
AUTHENTICATE = ["--settings.num-draws", "2", "--settings.num-steps", "50", "--settings.tile", "2"]
AUTHENTICATE += ["--settings.cgi-draws", "1", "--settings.batch-size", "1", "--methods", "cgi-dm"]
PROTECT = ["--steps", "2", "--batch-size", "1", "--purifiers", "jpeg"]
PRETRAIN = ["train.num_steps=6", "chunk_steps=2", "held_out=2", "check_sizes=[5]", "train.sizes=[5]"]
PRETRAIN += ["train.rows=[50,100]", "net.width=8", "net.depth=1", "train.pairs=20"]
POINTS = {"finetune": 8, "extract": 6, "authenticate": 6, "protect": 6, "pretrain": 4}
"""Moments at which every run of CI looks at what a kill would leave."""
KILLS = {"finetune": 9, "extract": 6, "authenticate": 6, "protect": 6, "pretrain": 5}
FEW = 2
"""Kills of one verb in every run of CI, again and again in one folder; all of `KILLS` by `make long`."""


def some_more(*verbs):
    """Cases of `make long` alone."""
    return [pytest.param(verb, marks=pytest.mark.long) for verb in verbs]


@pytest.fixture(scope="module")
def line(tiny_folder, pictures):
    """(verb, folder) -> the command line."""

    def of(verb, out):
        known = ["--images", str(pictures), "--prompt", "a red dog"]
        model, models = ["--model", str(tiny_folder)], ["--base", str(tiny_folder), "--model", str(tiny_folder)]
        options = {
            "finetune": [*known, *model, "--out", str(out), *FINETUNE],
            "extract": [*known, *models, "--out", str(out), *EXTRACT],
            "authenticate": [*known, *models, "--out", str(out), *AUTHENTICATE],
            "protect": [*known, *model, "--out", str(out), *PROTECT],
            "pretrain": [
                "--what",
                "skeleton",
                "--work",
                str(out / "work"),
                "--out",
                str(out / "made"),
                "--set",
                *PRETRAIN,
            ],
        }
        return [verb, *options[verb]]

    return of


def left(folder):
    """What a run leaves for its user: file -> content, without times and places."""
    found = {}
    for path in folder.rglob("*"):
        name = path.relative_to(folder)
        if not path.is_file() or {"checkpoints", "work"} & set(name.parts) or name.name == "report.html":
            continue
        content = path.read_bytes()
        if name.name == "result.json":
            result = json.loads(content)
            content = {key: result[key] for key in ("rows", "details", "inputs", "seeds", "pictures", "notes")}
        found[str(name)] = content
    return found


def assert_finishes(command, folder, expected):
    """Runs the command to its end, which leaves what a run that was left alone does; gives what it wrote."""
    status, _, log = run(command, folder)
    assert status == 0, log
    assert left(folder) == left(expected)
    return log


@pytest.fixture(scope="module")
def whole(line, tmp_path_factory):
    """verb -> (folder of a run that was left alone, its file operations)."""
    made = {}

    def of(verb):
        if verb not in made:
            folder = tmp_path_factory.mktemp(verb) / "whole"
            folder.mkdir()
            status, count, log = run(line(verb, folder), folder)
            assert status == 0, log
            made[verb] = (folder, count)
        return made[verb]

    return of


@pytest.mark.parametrize(("verb", "points"), POINTS.items())
def test_what_a_kill_leaves_at_any_moment_ends_like_a_run_that_was_left_alone(verb, points, line, whole, tmp_path):
    expected, count = whole(verb)
    folder, ended = tmp_path / "cut", tmp_path / "ended"
    folder.mkdir()
    ended.mkdir()
    moments = random.Random(verb).sample(range(1, count + 1), points)
    found = images(line(verb, folder), folder, moments, tmp_path / "images")
    assert len(found) == points
    for result in resumed(line(verb, folder), folder, found, ended):
        assert left(result) == left(expected), result.name


@pytest.mark.parametrize(
    ("verb", "planned"),
    [("finetune", FEW), *(pytest.param(*pair, marks=pytest.mark.long) for pair in KILLS.items())],
)
def test_a_run_killed_again_and_again_ends_like_one_that_was_not(verb, planned, line, whole, tmp_path):
    expected, count = whole(verb)
    folder, rng, kills = tmp_path / "cut", random.Random(verb), 0
    folder.mkdir()
    while kills < planned:
        if kills % 3 == 1:  # at a moment between, or in the middle of, file operations
            when = {"seconds": rng.uniform(0, 2)}
        else:
            when = {"operation": rng.randint(1, max(count // 2, 1))}
        status, _, log = run(line(verb, folder), folder, **when)
        assert status in (0, -9), log
        kills += 1
        if status == 0:  # it was finished already: from the beginning
            assert left(folder) == left(expected)
            shutil.rmtree(folder)
            folder.mkdir()
    assert_finishes(line(verb, folder), folder, expected)


@pytest.mark.parametrize("verb", ["finetune", *some_more("authenticate", "extract", "protect")])
def test_killed_work_goes_on_with_other_devices(verb, line, whole, tmp_path):
    expected, count = whole(verb)
    folder = tmp_path / "cut"
    folder.mkdir()
    for devices, axes in ((4, "data=2,fsdp=2"), (2, "data"), (1, None)):
        mesh = [] if axes is None else ["--mesh", axes]
        when = {} if axes is None else {"operation": count // 3}
        status, _, log = run([*line(verb, folder), *mesh], folder, devices=devices, **when)
        assert status == (0 if axes is None else -9), log
    assert_same(folder, expected, atol=1e-5)


@pytest.mark.long
def test_a_killed_training_on_a_mesh_ends_bit_for_bit_like_one_that_was_left_alone(line, tmp_path):
    expected, folder = tmp_path / "whole", tmp_path / "cut"
    mesh = {"devices": 2}
    for place in (expected, folder):
        place.mkdir()
    status, count, log = run([*line("finetune", expected), "--mesh", "data"], expected, **mesh)
    assert status == 0, log
    command = [*line("finetune", folder), "--mesh", "data"]
    assert run(command, folder, operation=count // 2, **mesh)[0] == -9
    assert any(path.name.isdecimal() for path in (folder / "checkpoints").iterdir()), "there is something to go on from"
    status, _, log = run(command, folder, **mesh)
    assert status == 0, log
    assert left(folder) == left(expected)


@pytest.mark.parametrize("verb", ["finetune", "extract", *some_more("authenticate", "protect", "pretrain")])
def test_a_full_disk_is_one_error_and_the_same_command_goes_on(verb, line, whole, tmp_path):
    expected, _ = whole(verb)
    folder = tmp_path / "cut"
    folder.mkdir()
    status, _, log = run(line(verb, folder), folder, file_bytes=1500)
    assert status == 1
    assert "dmsec: cannot write" in log
    assert "Traceback" not in log
    assert_finishes(line(verb, folder), folder, expected)


def test_a_truncated_checkpoint_costs_only_the_steps_since_the_one_before(line, whole, tmp_path):
    expected, count = whole("finetune")
    folder = tmp_path / "cut"
    folder.mkdir()
    at = count // 2
    assert run(line("finetune", folder), folder, operation=at)[0] == -9
    saved = sorted(int(path.name) for path in (folder / "checkpoints").iterdir() if path.name.isdecimal())
    assert len(saved) == 2
    files = [path for path in (folder / "checkpoints" / str(saved[-1]) / "tree").rglob("*") if path.is_file()]
    longest = max(files, key=lambda path: path.stat().st_size)
    longest.write_bytes(longest.read_bytes()[: longest.stat().st_size // 2])
    log = assert_finishes(line("finetune", folder), folder, expected)
    assert f"checkpoint {saved[-1]} of" in log.replace("\n", " ")
