"""Sweeps: plans of variants and seeds, their runs, and the table with intervals."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest
from scipy import stats

from dico_jax.analysis import sweep
from dico_jax.errors import UsageError
from tests.commands import ROOT, assert_refused, call
from tests.test_training import tiny_config

FILE = """
from tests.test_training import tiny_config

def get_config():
    return tiny_config()

def get_sweep():
    return {sweep}
"""
SWEEP = {
    "variants": {"base": {}, "wide": {"model.hidden_size": 16}, "fast": {"model.depth": 2}},
    "seeds": (0, 1, 2),
    "metrics": ("agreement", "loss"),
}


def write(path, given):
    file = path / "tiny_sweep.py"
    file.write_text(FILE.format(sweep=given))
    return str(file)


def plan_of(path, given=None, only=None):
    return sweep.make_plan(write(path, SWEEP if given is None else given), tiny_config(), only)


def test_a_plan_has_every_variant_with_its_cost(tmp_path):
    plan = plan_of(tmp_path)
    assert [v.name for v in plan.variants] == ["base", "wide", "fast"]
    assert plan.variants[1].config.model.hidden_size == 16
    assert plan.variants[0].config.model.hidden_size == 8
    assert plan.variants[1].parameters > plan.variants[0].parameters
    assert plan.variants[2].multiply_adds > plan.variants[0].multiply_adds
    names = [name for _, _, name in plan.runs()]
    assert names[:4] == ["base/0", "wide/0", "fast/0", "base/1"]
    assert [v.name for v in plan_of(tmp_path, only=["fast"]).variants] == ["fast"]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"variants": {}}, "needs variants and seeds"),
        ({"seeds": ()}, "needs variants and seeds"),
        ({"seeds": (1, 1)}, "needs variants and seeds, each once"),
        ({"colour": 1}, "get_sweep.. gives colour: use variants, seeds, metrics"),
        ({"variants": {"a/b": {}}}, "variant a/b: 'a/b' is no name of a folder"),
        ({"variants": {"a": {"model.width": 3}}}, "variant a: config.model.width: no such field"),
        ({"variants": {"a": {"model.hidden_size": -1}}}, "variant a: .*hidden_size=-1 must be"),
        ({"variants": {"a": {"model.name": "DiCa"}}}, "variant a: config.model.name='DiCa'"),
    ],
)
def test_wrong_plans_are_said(tmp_path, given, said):
    with pytest.raises(UsageError, match=said):
        plan_of(tmp_path, SWEEP | given)


def test_wrong_usage_of_the_command(tmp_path):
    file = write(tmp_path, SWEEP)
    done = call("dico_jax.sweep", f"--config={file}", f"--workdir={tmp_path}/w", "--variants=no")
    assert_refused(done, "--variants=no is unknown: use some of base,wide,fast")
    done = call("dico_jax.sweep", "--config=configs/digits.py", f"--workdir={tmp_path}/w")
    assert_refused(done, "has no get_sweep()")


def with_results(plan, folder, values):
    for variant, seed, name in plan.runs():
        if (metrics := values.get((variant.name, seed))) is None:
            continue
        (folder / name).mkdir(parents=True)
        result = {"config": sweep._digest(variant, seed), "metrics": metrics}
        (folder / name / sweep.RESULT).write_text(json.dumps(result))


def test_intervals_are_those_of_students_t(tmp_path):
    plan, rng = plan_of(tmp_path, SWEEP | {"metrics": ("loss",)}), np.random.default_rng(0)
    drawn = {name: rng.normal(size=3) for name in ("base", "wide")}
    drawn["wide"] = drawn["base"] + 5 + 0.01 * drawn["wide"]
    values = {(n, s): {"loss": float(v[s])} for n, v in drawn.items() for s in range(3)}
    values["fast", 1] = {"loss": 2.0}  # one that has run, of three
    with_results(plan, tmp_path / "w", values)
    found = sweep.summary(plan, str(tmp_path / "w"))
    base, wide, fast = (row["metrics"]["loss"] for row in found["variants"])
    for got, of in ((base, drawn["base"]), (wide["difference"], drawn["wide"] - drawn["base"])):
        wanted = stats.ttest_1samp(of, 0).confidence_interval(0.95)
        assert got["mean"] - got["half_width"] == pytest.approx(wanted.low)
        assert got["mean"] + got["half_width"] == pytest.approx(wanted.high)
    assert fast["values"] == {1: 2.0}
    assert math.isnan(fast["half_width"])
    text = sweep.report(plan, str(tmp_path / "w"))
    lines = {line.split("|")[1].strip(): line for line in text.splitlines()}
    assert "*" in lines["wide"]
    assert "*" not in lines["base"] + lines["fast"]
    assert (tmp_path / "w" / "sweep.png").stat().st_size > 1000
    assert json.loads((tmp_path / "w" / "sweep.json").read_text())["sweep_of_variants"]["seeds"]


def test_a_figure_has_a_panel_for_each_metric_alone():
    names = ["a", "b", "c", "d"]
    value = {"values": {0: 1.0}, "mean": 1.0, "half_width": math.nan}
    of = dict.fromkeys(names, value)
    made = sweep.figure({"metrics": names, "variants": [{"variant": "x", "metrics": of}]})
    shown = [axes.get_title() for axes in made.axes if axes.get_visible()]
    assert shown == names


def test_a_metric_that_no_run_has_is_refused(tmp_path):
    plan = plan_of(tmp_path)
    assert sweep.summary(plan, str(tmp_path))["metrics"] == ("agreement", "loss")  # no run yet
    with_results(plan, tmp_path, {("base", 0): {"loss": 1.0, "spread": 2.0}})
    said = r"a metric of get_sweep\(\)='agreement' is not measured: use some of loss, spread"
    with pytest.raises(UsageError, match=said):
        sweep.report(plan, str(tmp_path))


def test_a_result_of_another_config_does_not_count(tmp_path):
    plan = plan_of(tmp_path)
    with_results(plan, tmp_path / "w", {("base", 0): {"loss": 1.0}})
    other = plan_of(tmp_path, SWEEP | {"variants": {"base": {"optimizer.learning_rate": 1.0}}})
    folder = tmp_path / "w" / "base" / "0"
    assert sweep.result_of(folder, plan.variants[0], 0)["metrics"] == {"loss": 1.0}
    assert sweep.result_of(folder, other.variants[0], 0) is None
    (folder / sweep.RESULT).write_text("[]")
    assert sweep.result_of(folder, plan.variants[0], 0) is None


def test_a_sweep_goes_on_where_it_was(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    variants = {"base": {}, "wrong": {"data.source": "nothing"}}
    metrics = ("agreement", "loss", "channels/effective_rank_share")
    given = {"variants": variants, "seeds": (3,), "metrics": metrics}
    file, workdir = write(tmp_path, given), tmp_path / "w"
    command = ("dico_jax.sweep", f"--config={file}", f"--workdir={workdir}")
    more = "--config.sampling.grid_every_steps=0"
    done = call(*command, more)
    assert done.returncode == 1, done.stderr
    assert "1 runs failed" in done.stderr
    assert "wrong/3: main ended with status 2" in done.stderr
    result = json.loads((workdir / "base/3" / sweep.RESULT).read_text())
    assert 0 <= result["metrics"]["agreement"] <= 1
    assert result["metrics"]["loss"] > 0
    assert 0 < result["metrics"]["channels/effective_rank_share"] <= 1
    assert json.loads((workdir / "base/3/config.json").read_text())["seed"] == 3
    assert not (workdir / "base/3/samples").exists()  # as the command line has it
    assert "| base" in done.stdout
    before = (workdir / "base/3/metrics.jsonl").stat().st_mtime_ns
    again = call(*command, more, "--variants=base")
    assert again.returncode == 0, again.stderr
    assert (workdir / "base/3/metrics.jsonl").stat().st_mtime_ns == before


def test_a_sweep_stops_with_its_run(tmp_path, monkeypatch):
    plan = plan_of(tmp_path)

    monkeypatch.setattr(sweep, "_ended", lambda process: process.kill() or 130)
    with pytest.raises(sweep.TrainingStopped, match="base/0 was told to stop: the same command"):
        sweep.run(plan, str(tmp_path / "w"))


def test_a_run_that_crashes_is_named_with_its_log(tmp_path, monkeypatch):
    plan = plan_of(tmp_path, SWEEP | {"seeds": (0,)}, only=["base"])
    monkeypatch.setattr(sweep, "_ended", lambda process: process.kill() or -signal.SIGABRT)
    (said,) = sweep.run(plan, str(tmp_path / "w"))
    assert re.search(r"base/0: main was ended by signal 6: .*base/0\.log may say why$", said)


SAVES = """
import signal, sys, time
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda *_: time.sleep(1) or sys.exit(STATUS))  # as if it saved
print("up", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("status", [7, 0])  # it saves, or was about to end
def test_a_run_may_save_before_its_sweep_ends(number, status):
    before = signal.getsignal(number)
    code = SAVES.replace("STATUS", str(status))
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)

    def stop():
        assert process.stdout.readline() == "up\n"
        os.kill(os.getpid(), number)
        if number == signal.SIGINT:  # a terminal sends it to both
            process.send_signal(number)

    thread = threading.Thread(target=stop)
    thread.start()
    assert sweep._ended(process) == 130
    thread.join()
    assert signal.getsignal(number) == before
