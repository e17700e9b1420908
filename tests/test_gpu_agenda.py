"""The GPU's agenda, on CPU at toy sizes: it goes on from call to call, and judges what it finds."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

from tests.commands import HURRY, ROOT

PROGRAM = ROOT / "benchmarks" / "gpu_agenda.py"


@pytest.fixture
def agenda():
    spec = importlib.util.spec_from_file_location("gpu_agenda", PROGRAM)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.mark.slow
def test_it_goes_on_until_nothing_is_left(tmp_path):
    out, statuses = tmp_path / "gpu.json", []
    environment = os.environ | {"XLA_FLAGS": HURRY}
    command = [sys.executable, str(PROGRAM), f"--out={out}", "--toy", "--minutes=6"]
    for _ in range(20):
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        statuses.append(done.returncode)
        if done.returncode != 3:
            break
    parts = json.loads(out.read_text())["parts"]
    assert len(parts) == 9, done.stdout + done.stderr
    assert {part["status"] for part in parts.values()} == {"done"}, parts
    assert all("figure" in part for name, part in parts.items() if "minutes" not in name)
    assert "left: nothing" in done.stdout
    assert statuses[-1] == int(any(part.get("met") is False for part in parts.values()))
    before = out.read_text()
    subprocess.run(command, env=environment, check=False)  # has nothing to do
    assert out.read_text() == before


def part(agenda, code, **more):
    return agenda.Part(
        "x", [sys.executable, "-c", code], "2 or more", lambda r: (r, r >= 2), **more
    )


WRITE = "import sys; open(sys.argv[1].split('=')[1], 'w').write('{}')"


def test_a_part_is_judged_and_shared(agenda):
    figures = {}
    found = agenda.run(part(agenda, WRITE.format(3)), 60, {}, figures)
    assert (found["status"], found["figure"], found["met"]) == ("done", 3, True)
    again = agenda.run(part(agenda, WRITE.format(3)), 0, {}, figures)  # the same command
    assert (again["figure"], again["seconds"]) == (3, 0)
    missed = agenda.run(part(agenda, WRITE.format(1) + "; sys.exit(1)"), 60, {}, {})
    assert (missed["status"], missed["met"]) == ("done", False)
    failed = agenda.run(part(agenda, "raise SystemExit('no GPU')"), 60, {}, {})
    assert failed["status"] == "failed"
    assert "no GPU" in failed["error"]
    assert agenda.run(part(agenda, "import time; time.sleep(60)"), 1, {}, {})["status"] == "failed"


def test_training_goes_on_until_it_has_had_its_time(agenda):
    code = "import signal, sys, time; signal.signal(15, lambda *_: sys.exit(143)); time.sleep(60)"
    training = part(agenda, code, training=3)
    first = agenda.run(training, 2, {}, {})
    assert first["status"] == "goes on"
    assert agenda.run(training, 9, first, {})["status"] == "done"


def test_every_bar_of_the_readme_is_on_the_agenda(agenda):
    import argparse

    options = argparse.Namespace(
        toy=False, reference="DiCo", torch_python=None, cifar10="train", out="gpu.json"
    )
    names = [part.name for part in agenda.agenda(options)]
    assert len(names) == len(set(names)) == 13
