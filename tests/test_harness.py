"""What benchmarks write about where they ran."""

import json
import platform

from benchmarks import harness
from dmsec_jax.report.result import Row


def test_processors_of_one_name_are_told_apart(tmp_path):
    told = tmp_path / "cpuinfo"
    core = "processor\t: {}\nvendor_id\t: AuthenticAMD\ncpu family\t: {}\nmodel\t\t: 17\nmodel name\t: AMD EPYC\n"
    told.write_text(core.format(0, 25) + "\n" + core.format(1, 26) + "\n")
    assert harness.processor(told) == "AMD EPYC, family 25, model 17"


def test_a_system_that_does_not_say_gives_its_architecture(tmp_path):
    told = tmp_path / "cpuinfo"
    told.write_text("processor\t: 0\nBogoMIPS\t: 50.00\nCPU part\t: 0xd40\n")
    architecture = platform.processor() or platform.machine()
    assert harness.processor(told) == harness.processor(tmp_path / "absent") == architecture


def test_a_later_write_replaces_the_file(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    rows = [Row(bench="b", metric="m", value=float(i), unit="s", method="m", n=1) for i in range(2)]
    path = harness.write("b", rows[:1], {}, {"all": 1.0}, [], done=False)
    assert capsys.readouterr().out == ""
    assert harness.write("b", rows, {}, {"all": 2.0}, ["n"], path=path, done=False) == path
    found = json.loads(path.read_text())
    assert [row["value"] for row in found["rows"]] == [0.0, 1.0]
    assert found["device"]["processor"] == harness.processor()
    assert list(tmp_path.rglob("*.json")) == [path]
