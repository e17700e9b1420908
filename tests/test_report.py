"""The report of runs: what it reads, what it says of what is missing, how large it is."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("bokeh")

from dico_jax.config import flatten
from dico_jax.reporting import curves, page_at_end, runs
from tests.commands import ROOT, assert_refused, call

CONFIG = {
    "data": {"batch_size": 256, "image_size": 256, "source": "latents"},
    "diffusion": {
        "objective": "noise", "diffusion_steps": 1000, "noise_schedule": "linear",
        "min_snr_gamma": 0.0, "zero_terminal_snr": False,
    },
    "logging": {"wandb_project": "mine"},
    "model": {"name": "DiCo-S", "learn_sigma": True, "in_channels": 4},
    "optimizer": {"learning_rate": 1e-4},
    "training": {"num_steps": 400_000, "ema_decay": 0.9999},
}  # fmt: skip


def changed(**sections):
    return {name: of | sections.get(name, {}) for name, of in CONFIG.items()}


def lines_of(steps, **values):
    """Lines as training writes them; `values` are numbers or functions of the step."""
    for step in steps:
        of = {"grad_norm": 1.0, "loss": 0.16, "mse_t0_25": 0.4, "images_per_second": 1000.0}
        of |= {name: v(step) if callable(v) else v for name, v in values.items()}
        yield json.dumps({"step": step, **of})


def make_run(folder, lines, config=CONFIG, grids=0):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))
    (folder / "samples").mkdir()
    rng = np.random.default_rng(0)
    for k in range(1, grids + 1):
        noise = rng.integers(0, 256, (1024, 1024, 3), dtype=np.uint8)  # what compresses least
        Image.fromarray(noise).save(folder / f"samples/step_{k * 100:07d}.png")
    return folder


def report(*args, **how):
    return call("dico_jax.report", *args, **how)


def read(folder):
    (run,), notes = runs.read_runs([folder])
    assert not notes
    return run


def test_a_page_is_one_file_that_loads_nothing(tmp_path):
    folder = make_run(tmp_path / "run <1>", lines_of(range(100, 2100, 100)), grids=2)
    done = report(folder, "--out", tmp_path / "page.html")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"report of 1 run in {tmp_path}/page.html")
    page = (tmp_path / "page.html").read_text()
    tags = re.sub(r"(?s)<(script|style)\b.*?</\1>", "", page)
    assert re.findall(r"""(?:src|href)=["']?(?!#|data:)[^"'> ]+""", tags) == []
    assert not re.search(r"<script[^>]+src=|@import|url\(http", page)
    assert "run &lt;1&gt;" in page
    assert "run <1>" not in tags
    for title in ("Loss", "Loss by timestep quarter", "Norms", "Samples", "Config", "Events"):
        assert re.search(rf"<h2[^>]*>{title}</h2>", page), title


def test_the_page_lies_in_the_workdir_where_no_other_place_is_given(tmp_path):
    folder = make_run(tmp_path / "run", lines_of([100]))
    assert report(folder).returncode == 0
    assert (folder / "report.html").exists()


def test_lines_that_are_broken_are_left_out_and_said(tmp_path):
    lines = [*lines_of(range(100, 600, 100))]
    lines[2] = lines[2][:40]
    folder = make_run(tmp_path / "run", lines)
    with (folder / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 600, "loss": 0.1')  # as it stands while it is written
    run = read(folder)
    assert run.steps.tolist() == [100, 200, 400, 500]
    assert run.notes == [
        "the last line of metrics.jsonl is cut, and left out",
        "1 broken lines of metrics.jsonl are left out",
    ]
    done = report(folder)
    assert done.returncode == 0
    assert "the last line of metrics.jsonl is cut" in done.stderr
    assert "the last line of metrics.jsonl is cut" in (folder / "report.html").read_text()


def test_numbers_that_are_not_finite_and_steps_that_are_taken_twice(tmp_path):
    lines = [*lines_of([100, 200, 300], loss=lambda s: "nan" if s == 200 else s / 1000)]
    lines += lines_of([200, 300, 400], loss=0.9)  # after a return to step 100
    run = read(make_run(tmp_path / "run", lines))
    assert run.steps.tolist() == [100, 200, 300, 400]
    assert run.values["loss"].tolist() == [0.1, 0.9, 0.9, 0.9]


def test_of_a_long_file_losses_are_read_whole_and_the_rest_in_part(tmp_path, monkeypatch):
    lines = [*lines_of(range(1, 5001), loss=lambda s: 5.0 if s == 3333 else 0.1)]
    lines[1234] = json.dumps({"step": 1235, "eval/inception/fid": 12.5})
    lines[2221] = next(lines_of([2222], skipped_steps=3.0))
    lines[4001] = lines[4001][:30]
    folder = make_run(tmp_path / "run", lines)
    monkeypatch.setattr(runs, "_WHOLE", 50_000)
    monkeypatch.setattr(runs, "_CHUNK", 60_000)  # a line is in two of them
    run = read(folder)
    assert len(run.steps) == 4998
    assert np.isfinite(run.values["loss"]).all()
    assert run.values["loss"][run.steps == 3333] == 5.0
    assert 200 < np.isfinite(run.values["grad_norm"]).sum() < 1000
    assert run.evaluations["inception/fid"][1].tolist() == [12.5]
    assert [(e.kind, e.step) for e in run.events] == [("skipped steps", 2222)]
    assert run.notes[0] == "1 broken lines of metrics.jsonl are left out"
    assert "one in" in run.notes[1]


def test_an_empty_workdir_is_said_and_others_are_drawn(tmp_path):
    (tmp_path / "empty").mkdir()
    folder = make_run(tmp_path / "run", lines_of([100, 200]))
    done = report(tmp_path / "empty", folder, f"--out={tmp_path}/page.html")
    assert done.returncode == 0
    assert f"{tmp_path}/empty has no run (yet)" in done.stderr
    assert f"{tmp_path}/empty has no run (yet)" in (tmp_path / "page.html").read_text()
    alone = report(tmp_path / "empty")
    assert alone.returncode == 2
    assert alone.stderr.strip().splitlines()[-1].startswith("error: ")


def test_what_is_wrong_with_the_command_is_one_line(tmp_path):
    folder = make_run(tmp_path / "run", lines_of([100]))
    assert_refused(report(), "WORKDIR")
    assert_refused(report(tmp_path / "none"), "WORKDIR=", "there is no such folder")
    assert_refused(report(folder, "--out=page.pdf"), "--out=page.pdf", ".html")
    assert_refused(report("figures", folder), "--out")
    assert_refused(report(folder, "--live", "--out=x.html"), "--live")
    (tmp_path / "other.json").write_text("{}")
    other = tmp_path / "other.json"
    assert_refused(report(folder, f"--results={other}"), f"--results={other}")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert_refused(report(folder, "--live", f"--port={port}"), f"--port={port}", "another")


def test_the_page_at_the_end_of_a_run_never_makes_it_fail(tmp_path, monkeypatch, capsys):
    folder, command = tmp_path / "a run", f"python -m dico_jax.report '{tmp_path}/a run'"
    assert page_at_end(make_run(folder, lines_of([100]))) == f"{folder}/report.html"
    assert "step 100 of 400,000" in (folder / "report.html").read_text()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("dico_jax.reporting.page.make_page", full)
    assert page_at_end(folder) == command
    said = f"warning: {folder}/report.html is not written ([Errno 28] No space left on device)\n"
    out, err = capsys.readouterr()
    assert (out, err) == (2 * "writing the page of the run ...\n", said)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    fix = "needs bokeh and jinja2: pip install 'dico_jax[report]'"
    assert page_at_end(folder) == f"{command} ({fix})"
    assert capsys.readouterr().out == ""  # it is not written


def test_a_run_without_a_line_yet(tmp_path):
    folder = make_run(tmp_path / "run", [])
    assert report(folder).returncode == 0
    assert "step 0 of 400,000" in (folder / "report.html").read_text()


def test_runs_of_different_models_are_said_and_drawn_apart(tmp_path):
    folders = [
        make_run(tmp_path / name, lines_of([100, 200]), config)
        for name, config in (
            ("a", CONFIG),
            ("b", changed(optimizer={"learning_rate": 2e-4})),
            ("c", changed(diffusion={"objective": "flow"})),
        )
    ]
    out = tmp_path / "page.html"
    assert report(*folders, f"--out={out}").returncode == 0
    page = out.read_text()
    assert "These runs are of 2 models or objectives" in page
    headings = re.findall(r'(?s)<section class="group">\s*<h2>(.*?)</h2>', page)
    assert [heading.split(": ")[1] for heading in headings] == ["a, b", "c"]
    row = r'<tr data-kind="(\w+)"><th scope="row">{}</th>'
    kinds = {
        f: re.search(row.format(f), page)[1]
        for f in ("optimizer.learning_rate", "logging.wandb_project")
    }
    assert kinds == {"optimizer.learning_rate": "differs", "logging.wandb_project": "changed"}


def test_names_of_runs_are_as_short_as_they_can_be(tmp_path):
    for path in ("x/run", "y/run"):
        make_run(tmp_path / path, lines_of([100]))
    found, _ = runs.read_runs([tmp_path / "x/run", tmp_path / "y/run"])
    assert [run.name for run in found] == ["x/run", "y/run"]


def test_losses_are_compared_with_the_landmarks_of_the_released_run(tmp_path):
    off = {1000: 1.01, 10_000: 1.03}
    published = {1000: 0.1887, 10_000: 0.1655}

    def loss(step):
        near = next(s for s in published if step <= s)
        return published[near] * off[near]

    run = read(make_run(tmp_path / "run", lines_of(range(100, 10_100, 100), loss=loss)))
    found = curves.published_of(run.config)
    said = curves.compared(found, run.steps, run.values["loss"])
    assert said == [
        "loss at 1K is 0.1906, 1.0% above the released run (0.1887): within the band of 2%",
        "loss at 10K is 0.1705, 3.0% above the released run (0.1655): outside the band of 2%",
    ]
    assert found.caveats == []
    assert found.numbers("fid")[1].tolist() == [109.5, 79.79, 62.61, 49.97]


@pytest.mark.parametrize(
    "sections",
    [
        {"diffusion": {"objective": "flow"}},
        {"model": {"learn_sigma": False}},
        {"diffusion": {"min_snr_gamma": 5.0}},
    ],
)
def test_losses_of_another_kind_have_no_landmarks(sections):
    assert curves.published_of(flatten(changed(**sections))).losses == {}


def test_what_differs_from_the_published_recipe_is_said():
    found = curves.published_of(flatten(changed(data={"batch_size": 64})))
    assert found.losses
    assert found.caveats == ["batch_size 64 (published 256)"]
    assert curves.published_of(flatten(changed(model={"name": "DiCo"}))) is None


def test_a_published_row_is_as_in_the_paper():
    rows = curves.published_of(flatten(changed(model={"name": "DiCo-XL"}))).rows
    assert rows[-1] == [3_750_000, "guidance 1.4", 2.05, None, 282.17, 0.83, 0.59]


def test_buckets_keep_means_and_extremes():
    steps = np.arange(1.0, 100_001.0)
    loss = np.where(steps == 50_000, 9.0, 0.5)
    loss[:7] = np.nan
    at, means, ranges = curves.bucketed(steps, {"loss": loss}, 1000)
    assert len(at) == 1000
    assert at[-1] == 100_000
    assert ranges["loss"][1].max() == 9.0
    assert means["loss"].max() == pytest.approx((99 * 0.5 + 9) / 100)
    few = curves.bucketed(steps[:10], {"loss": loss[:10]}, 1000)
    np.testing.assert_array_equal(few[1]["loss"], loss[:10])


def test_smoothing_has_no_bias_and_passes_gaps():
    found = curves.smoothed(np.array([2.0, 2.0, np.nan, 2.0]), 0.9)
    np.testing.assert_allclose(found, 2.0)


def test_events_are_found_in_what_a_run_leaves(tmp_path):
    from dico_jax.training.logging import Logger

    folder = make_run(tmp_path / "run", [])
    with Logger(folder, 0, 400) as log:
        for step in (100, 200, 300):
            log.scalars(step, {"loss": 0.1, "rollbacks": 0.0})
        log.rewind(200)
        for step in (300, 400):
            log.scalars(step, {"loss": 0.1, "rollbacks": 1.0})
        log.preempted(400, "SIGTERM")
    with Logger(folder, 400, 500) as log:
        log.scalars(500, {"loss": 0.1, "rollbacks": 1.0})
    text = "no step has ended for {} seconds after step 450"
    stall = "".join(f"2026-01-01 00:00:0{n} {text.format(n)}\n\n" for n in (2, 4))
    (folder / "stall.txt").write_text("Thread 0x1:\n" + stall)
    change = {"step": 400, "change": "config.data.batch_size was 64, is 32"}
    (folder / "config_changes.jsonl").write_text(json.dumps(change) + "\n")
    bad = [{"id": f"{k}.png", "reason": "cut"} for k in range(3)]  # as older runs have them
    bad += [{"id": f"{k}.png", "reason": "cut", "step": 150} for k in (7, 8)]
    (folder / "bad_examples.jsonl").write_text("".join(json.dumps(b) + "\n" for b in bad))
    run = read(folder)
    assert [(e.kind, e.step) for e in run.events] == [
        ("rollback", 200), ("restart", 400), ("stall", 450), ("config change", 400),
        ("preemption", 400), ("bad examples", None), ("bad examples", 150),
    ]  # fmt: skip
    assert run.events[4].text.startswith("SIGTERM came, 20")
    assert [event.text.split()[0] for event in run.events[5:]] == ["3", "2"]
    assert run.bad == bad
    assert "for 4 seconds" in run.events[2].text


def test_the_state_of_a_run_that_lives_that_was_killed_and_that_ended(tmp_path):
    from dico_jax.training.workdir import workdir_lock

    folder = make_run(tmp_path / "run", lines_of([100]))
    with workdir_lock(str(folder)):
        run = read(folder)
        assert run.state.startswith("running: step 100 of 400,000 (process ")
        before = runs.stamp([folder])
    run = read(folder)
    assert run.ended
    assert "killed, preempted, or it stopped itself" in run.state
    assert runs.stamp([folder]) != before
    (folder / ".lock").write_text("process 1 on another-machine since 2026-01-01\n")
    assert "written 0 s ago" in read(folder).state
    done = make_run(tmp_path / "done", lines_of([400_000]))
    assert read(done).state == "finished: step 400,000 of 400,000"


def test_hours_are_of_training_by_its_throughput(tmp_path):
    run = read(make_run(tmp_path / "run", lines_of([1000, 2000], images_per_second=256.0)))
    np.testing.assert_allclose(run.hours, [1000 / 3600, 2000 / 3600])


def result(ckpt, weights, scale, fid):
    samples = {"count": 50_000, "ckpt": str(ckpt), "step": 400, "weights": weights}
    samples["sampling"] = {"cfg_scale": scale}
    return {"metrics": {"fid": fid}, "samples": samples, "devices": "4 x v5e"}


def test_widths_by_guidance_are_a_table_with_the_best_darkest(tmp_path):
    folder = make_run(tmp_path / "run", lines_of([100]))
    other = tmp_path / "w.json"
    sweep = [result(folder, "ema_width=0.05", s, f) for s, f in ((1.0, 20.0), (1.5, 10.0))]
    other.write_text(json.dumps({"sweep": sweep}))
    (folder / "w2.json").write_text(json.dumps(result(folder, "ema_width=0.1", 1.5, 5.0)))
    assert report(folder, f"--results={other}").returncode == 0
    page = (folder / "report.html").read_text()
    rows = re.findall(r'(?s)<tr><th scope="row">(ema_width[^<]*)</th>(.*?)</tr>', page)
    assert [name for name, _ in rows] == ["ema_width=0.05 at 400", "ema_width=0.1 at 400"]
    cells = [re.findall(r"(?:--heat: (\d+)%\")?>([\d.]*)</td>", row) for _, row in rows]
    assert cells == [[("8", "20"), ("49", "10")], [("", ""), ("70", "5")]]


def test_a_result_of_another_run_is_left_out_and_said(tmp_path):
    folder = make_run(tmp_path / "run", lines_of([100]))
    (tmp_path / "w.json").write_text(json.dumps(result("/elsewhere", "ema", 1.5, 5.0)))
    done = report(folder, f"--results={tmp_path}/w.json")
    assert done.returncode == 0
    assert "measures /elsewhere, and none of these runs" in done.stderr


def test_large_grids_are_made_small_and_those_left_out_are_said(tmp_path):
    folder = make_run(tmp_path / "run", lines_of([100]), grids=40)
    (folder / "samples/step_0004100.png").write_bytes(b"cut")  # as one that is being written
    assert report(folder).returncode == 0
    page = (folder / "report.html").read_text()
    assert len(page) < 5e6
    assert re.search(r"\d+ of 41 grids are left out", page)
    grids = json.loads(re.search(r'id="grids">(.*?)</script>', page)[1])
    assert grids[0][-1]["step"] == 4000 or len(grids[0]) > 8


def test_eight_runs_of_many_steps_and_one_of_400_000_stay_small(tmp_path):
    """Seconds are measured by benchmarks/report_speed.py."""
    folder = make_run(tmp_path / "0", lines_of(range(1, 400_001)), grids=1)
    assert report(folder).returncode == 0
    assert (folder / "report.html").stat().st_size < 5e6
    lines = [*lines_of(range(100, 400_100, 100), vb=0.1, mse=0.1, data_wait=0.1, update_norm=1.0)]
    folders = [make_run(tmp_path / f"run{k}", lines, grids=4) for k in range(8)]
    assert report(*folders, f"--out={tmp_path}/page.html").returncode == 0
    assert (tmp_path / "page.html").stat().st_size < 5e6


def test_figures_are_pdf_and_png(tmp_path):
    pytest.importorskip("matplotlib")
    lines = [*lines_of([100, 200]), json.dumps({"step": 200, "eval/inception/fid": 90.0})]
    folder = make_run(tmp_path / "run", lines, grids=1)
    sweep = [result(folder, "ema", s, f) for s, f in ((1.0, 20.0), (1.5, 10.0))]
    (folder / "sweep.json").write_text(json.dumps({"sweep": sweep}))
    done = report("figures", folder, f"--out={tmp_path}/figures")
    assert done.returncode == 0, done.stderr
    names = "fid_by_guidance", "fid_by_step", "loss_by_compute", "samples_run"
    there = sorted(f"{name}.{kind}" for name in names for kind in ("pdf", "png"))
    assert sorted(f.name for f in (tmp_path / "figures").iterdir()) == there
    for file in (tmp_path / "figures").iterdir():
        head = file.read_bytes()[:5]
        assert head == (b"%PDF-" if file.suffix == ".pdf" else b"\x89PNG\r")


def test_help_answers_without_bokeh_and_jax(tmp_path):
    done = report("--help", fresh=True)
    assert done.returncode == 0
    assert "--live" in done.stdout
    code = "import sys, dico_jax.report; print(sorted({'jax', 'bokeh', 'numpy'} & {*sys.modules}))"
    imported = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert imported.stdout.strip() == "[]"


def test_live_shows_what_is_new_and_stays_when_the_files_go(tmp_path):
    from dico_jax.reporting import live

    folder = make_run(tmp_path / "run", lines_of([100]))
    pages = live._Pages([folder], [])
    pages.look()
    first = pages.stamp
    assert b"step 100 of 400,000" in pages.page
    with (folder / "metrics.jsonl").open("a") as stream:
        stream.writelines(f"{line}\n" for line in lines_of([200]))
    pages.look()
    assert pages.stamp != first
    assert b"step 200 of 400,000" in pages.page
    (folder / "config.json").unlink()
    (folder / "metrics.jsonl").unlink()
    pages.look()
    assert b"has no run (yet)" in pages.page


def test_live_serves_until_ctrl_c(tmp_path):
    folder = make_run(tmp_path / "run", lines_of([100]))
    command = [sys.executable, "-m", "dico_jax.report", str(folder), "--live", "--port=0"]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    server = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env
    )
    try:
        address = server.stdout.readline().split()[0]
        page = urllib.request.urlopen(address).read().decode()
        stamp = re.search(r'data-stamp="([^"]+)"', page)[1]
        asked = json.load(urllib.request.urlopen(f"{address}stamp"))
        assert asked == {"stamp": stamp, "said": ""}
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(f"{address}config.json")
        with (folder / "metrics.jsonl").open("a") as stream:
            stream.writelines(f"{line}\n" for line in lines_of([200]))
        until = time.monotonic() + 120
        while json.load(urllib.request.urlopen(f"{address}stamp"))["stamp"] == stamp:
            assert time.monotonic() < until
            time.sleep(0.5)
        server.send_signal(signal.SIGINT)
        assert server.wait(60) == 130
        assert server.stderr.read().strip() == "interrupted"
    finally:
        server.kill()
        server.communicate()
