"""Tasks are done once, whoever is killed, and by any number of processes with the same result."""

import functools
import multiprocessing
import time

import numpy as np
import pytest
from matrix_world import maker

from benchmarks.matrix import store, tables, workers

TASKS = {f"t{i}": f"t{i}" for i in range(12)}


@pytest.fixture
def marks(tmp_path):
    (tmp_path / "marks").mkdir()
    return tmp_path / "marks"


def table(folder, tasks=TASKS):
    return [tables.row(name, {}, store.load(store.path(folder, "cells", name))) for name in tasks]


def test_a_second_run_does_nothing(tmp_path, marks):
    make_job = functools.partial(maker, marks)
    workers.work(TASKS, tmp_path, make_job)
    before = sorted(marks.iterdir())
    assert len(before) == len(TASKS)
    workers.work(TASKS, tmp_path, pytest.fail)
    assert not workers.missing(TASKS, tmp_path)
    assert sorted(marks.iterdir()) == before


def test_two_processes_give_the_table_of_one(tmp_path, marks):
    make_job = functools.partial(maker, marks)
    workers.work(TASKS, tmp_path / "one", make_job)
    alone = len(list(marks.iterdir()))
    workers.together(TASKS, tmp_path / "two", make_job, 2)
    assert table(tmp_path / "two") == table(tmp_path / "one")
    assert len(list(marks.iterdir())) == alone + len(TASKS), "no task was done twice"


@pytest.mark.parametrize("victim", ["t0", "t7", "t11"])
def test_what_a_killed_process_held_is_done_by_the_other(tmp_path, marks, victim):
    workers.work(TASKS, tmp_path / "one", functools.partial(maker, marks))
    workers.together(TASKS, tmp_path / "two", functools.partial(maker, marks, victim), 2)
    assert (marks / "killed").exists()
    assert table(tmp_path / "two") == table(tmp_path / "one")


def test_a_run_that_was_killed_goes_on_with_the_same_table(tmp_path, marks):
    make_job = functools.partial(maker, marks)
    workers.work(TASKS, tmp_path / "one", make_job)
    child = multiprocessing.get_context("spawn").Process(
        target=workers.work, args=(TASKS, tmp_path / "two", functools.partial(maker, marks, "t5"))
    )
    child.start()
    child.join()
    assert child.exitcode == -9
    assert list(workers.missing(TASKS, tmp_path / "two")) == [f"t{i}" for i in range(5, 12)]
    (tmp_path / "two" / "cells" / ".t5.part").write_bytes(b"half a file")
    workers.work(TASKS, tmp_path / "two", make_job)
    assert table(tmp_path / "two") == table(tmp_path / "one")
    assert not list((tmp_path / "two" / "cells").glob(".*part"))


def test_shares_come_first_and_then_what_others_left(tmp_path, marks):
    done = []
    workers.work(TASKS, tmp_path, functools.partial(maker, marks), (1, 3), lambda task, text: done.append(task))
    assert done[:4] == ["t1", "t4", "t7", "t10"]
    assert sorted(done) == sorted(TASKS)


def test_a_task_that_is_refused_leaves_nothing_and_stops_nothing(tmp_path, marks):
    said, tasks = {}, {"refused": "refused"} | TASKS
    workers.work(tasks, tmp_path, functools.partial(maker, marks), tell=said.__setitem__)
    assert list(workers.missing(tasks, tmp_path)) == ["refused"]
    assert "drop it" in said["refused"]


def test_workers_end_with_the_process_that_started_them(tmp_path, marks):
    run = functools.partial(maker, marks, "t4", kills_parent=True)
    child = multiprocessing.get_context("spawn").Process(target=workers.together, args=(TASKS, tmp_path, run, 1))
    child.start()
    child.join()
    assert child.exitcode == -9
    while "t4" in workers.missing(TASKS, tmp_path):
        time.sleep(0.1)
    time.sleep(0.5)  # for all the others, if it went on
    assert list(workers.missing(TASKS, tmp_path)) == [f"t{i}" for i in range(5, 12)]


def _hold(file, began):
    with store.claimed(file):
        began.set()
        time.sleep(60)


def test_a_claim_ends_with_its_process(tmp_path):
    context = multiprocessing.get_context("spawn")
    file, began = tmp_path / "kind" / "a.npz", context.Event()
    child = context.Process(target=_hold, args=(file, began))
    child.start()
    assert began.wait(60)
    with store.claimed(file, wait=False) as mine:
        assert not mine
    child.kill()
    child.join()
    with store.claimed(file, wait=False) as mine:
        assert mine
    assert store.kept(file, lambda: {"a": np.arange(3)})["a"].tolist() == [0, 1, 2]
    assert store.kept(file, pytest.fail)["a"].tolist() == [0, 1, 2]
