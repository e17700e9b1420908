"""FID and its family during training."""

import json
import os
import signal

import numpy as np
import pytest

from dico_jax.checkpoints.reader import saved_steps
from dico_jax.data.pictures import PictureReader
from dico_jax.data.sources import ArraySource
from dico_jax.errors import UsageError
from dico_jax.evaluation import networks
from dico_jax.evaluation.measure import RunEvaluation
from dico_jax.evaluation.statistics import Statistics, open_reference, save_statistics
from dico_jax.parallel.mesh import create_mesh
from dico_jax.training.loop import train
from dico_jax.training.watch import Preempted
from tests.test_training import tiny_config


@pytest.fixture(autouse=True)
def _short_training(monkeypatch):
    monkeypatch.setattr(networks, "_MIN_STEPS", 2)
    monkeypatch.setattr(networks, "_EPOCHS", 0)


def config(**fields):
    config = tiny_config()
    config.eval.class_agreement_samples = config.sampling.grid_every_steps = 0
    config.training.num_steps, config.training.checkpoint_every_steps = 4, 2
    config.eval.every_steps, config.eval.num_samples = 3, 20
    config.eval.features = "classifier"
    config.eval.update(fields)
    return config


def curve(workdir):
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if any(key.startswith("eval/") for key in line)]


@pytest.mark.slow
def test_a_curve_that_goes_on_after_an_interruption(tmp_path, monkeypatch):
    short = config(every_steps=100)
    short.training.num_steps = 2
    train(short, str(tmp_path / "parts"))  # the last step is measured, whatever every_steps says
    files = [tmp_path / "parts" / name for name in ("classifier.npz", "reference.npz")]
    before = [file.read_bytes() for file in files]
    # With the same classifier and reference from files.
    train(config(features=str(files[0]), reference=str(files[1])), str(tmp_path / "parts"))
    assert [file.read_bytes() for file in files] == before
    found = curve(tmp_path / "parts")
    assert [line["step"] for line in found] == [2, 3, 4]
    names = {"fid", "inception_score"}
    assert set(found[0]) == {"step"} | {f"eval/classifier/{name}" for name in names}
    assert np.isfinite(found[0]["eval/classifier/fid"])
    statistics = open_reference(files[1])
    assert isinstance(statistics, Statistics)
    assert statistics.features == "classifier"
    assert statistics.count == 1797

    files[0].unlink()
    monkeypatch.setattr(networks, "_MIN_STEPS", 3)  # then it is another classifier
    with pytest.raises(UsageError, match=r"reference.npz was measured with other weights"):
        train(config(), str(tmp_path / "parts"))


class Pictures(ArraySource):
    """Forty pictures of two classes, of which one or all may be replaced."""

    def __init__(self, replaced):
        pixels = np.random.default_rng(0).integers(0, 255, (40, 8, 8, 1)).astype(np.uint8)
        pixels[:replaced] = 255 - pixels[:replaced]
        self._take(pixels, np.arange(40) % 2)

    def __repr__(self):
        return "Pictures()"


def test_what_a_run_keeps_belongs_to_the_content_of_its_pictures(tmp_path, capfd):
    def opened(replaced):
        read, mesh = PictureReader(8, 1), create_mesh()
        evaluation = RunEvaluation(config(), Pictures(replaced), read, np.asarray, mesh)
        evaluation.open(tmp_path)
        return evaluation._evaluator.network.digest, capfd.readouterr().err

    first, said = opened(0)
    assert "other pictures" not in said
    files = [tmp_path / name for name in ("classifier.npz", "reference.npz")]
    before = [file.read_bytes() for file in files]
    assert opened(0)[0] == first
    assert [file.read_bytes() for file in files] == before
    second, said = opened(20)
    assert second != first
    for file in files:
        assert f"warning: {file} is of other pictures than the data: made anew" in said
    # Files that do not say what they were made of are used as they are.
    kept, statistics = networks.load_classifier(files[0]), open_reference(files[1])
    del kept.info["pictures"], statistics.info["pictures"]
    kept.save(files[0])
    files[1].unlink()
    save_statistics(files[1], statistics)
    assert opened(40) == (second, "")


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"num_samples": 1}, "config.eval.num_samples=1 must be at least 2"),
        ({"metrics": ("fid", "lpips")}, "config.eval.metrics: 'lpips' is unknown: use some of fid"),
        ({"features": "no.npz"}, "no.npz is no classifier"),
        ({"features": "no.npz", "inception": "x"}, "config.eval.inception=x is for config.eval.f"),
    ],
)
def test_what_is_refused(tmp_path, fields, match):
    with pytest.raises(UsageError, match=match):
        train(config(**fields), str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_latents_have_no_pictures(tmp_path):
    np.save(tmp_path / "examples.npy", np.zeros((20, 8, 8, 1), np.float32))
    np.save(tmp_path / "labels.npy", np.arange(20) % 10)

    def refused(match, **fields):
        latents = config(**fields)
        latents.data.source, latents.data.path = "arrays", str(tmp_path)
        with pytest.raises(UsageError, match=match):
            train(latents, str(tmp_path / "run"))

    match = "config.data.source has latents, not pictures"
    refused(match)
    np.savez(tmp_path / "c.npz", x=np.zeros(3))
    refused(match, features="inception")
    assert not (tmp_path / "run").exists()


def test_the_save_comes_first_and_what_only_looks_may_fail(tmp_path, monkeypatch, capfd):
    options = config(every_steps=2)
    options.sampling.grid_every_steps = 2
    (tmp_path / "samples").write_text("a file")
    calls = []

    def fail(self, samples):
        calls.append(max(saved_steps(tmp_path)))
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory\nwhile\tmeasuring")

    monkeypatch.setattr(RunEvaluation, "__call__", fail)
    monkeypatch.setattr(RunEvaluation, "open", lambda self, workdir: None)
    train(options, str(tmp_path))
    assert calls == sorted(saved_steps(tmp_path)) == [2, 4]
    said = "".join(capfd.readouterr())
    for step in (2, 4):
        failed = f"of step {step} failed, training goes on: "
        assert f"warning: the evaluation {failed}RESOURCE_EXHAUSTED: Out of memory while me" in said
        assert f"warning: the grid {failed}" in said


def test_sigterm_is_heeded_between_batches_of_samples(tmp_path, monkeypatch):
    options = config(every_steps=3)
    seen = []

    def measure(self, samples):
        for images in samples(self._conditions(np.arange(64))):
            seen.append(len(images))
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(RunEvaluation, "__call__", measure)
    monkeypatch.setattr(RunEvaluation, "open", lambda self, workdir: None)
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(Preempted) as ended:
            train(options, str(tmp_path))
    finally:
        signal.signal(signal.SIGTERM, before)
    assert ended.value.code == options.training.preemption_exit_status
    assert seen == [16]  # of 64
    assert saved_steps(tmp_path) == {2, 3}  # 3 was not due
    (entry,) = map(json.loads, (tmp_path / "preemptions.jsonl").read_text().splitlines())
    assert (entry["step"], entry["signal"]) == (3, "SIGTERM")
