"""The snippets of docs/python.md and the cells of docs/python.ipynb run."""

import json
import re

import numpy as np
from PIL import Image

from dico_jax.data.pictures import PictureReader
from dico_jax.evaluation.networks import train_classifier
from tests.commands import ROOT
from tests.test_classifier import Plain
from tests.test_sampler import write_checkpoint


class Larger(Plain):
    """Of 8 x 8 pixels."""

    def __getitem__(self, index):
        example = super().__getitem__(index)
        return example | {"image": np.tile(example["image"], (2, 2, 1))}


def run(snippets, folder, monkeypatch):
    monkeypatch.chdir(folder)
    names = {}
    for number, snippet in enumerate(snippets):
        exec(compile(snippet, f"snippet {number}", "exec"), names)
    return names


def test_snippets(tmp_path, monkeypatch):
    write_checkpoint(tmp_path / "run", [str(i) for i in range(10)])
    classifier = train_classifier(Larger(), PictureReader(8, 1), max_steps=2)
    classifier.save(tmp_path / "classifier.npz")
    (tmp_path / "reference").mkdir()
    for i in range(3):
        picture = np.full((8, 8), 80 * i, np.uint8)
        Image.fromarray(picture).save(tmp_path / "reference" / f"{i}.png")
    text = (ROOT / "docs" / "python.md").read_text()
    snippets = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(snippets) == 5
    names = run(snippets, tmp_path, monkeypatch)
    assert names["images"].shape == (2, 8, 8, 1)
    assert names["distance"] > 0
    assert (tmp_path / "first.png").exists()
    assert (tmp_path / "own_run" / "checkpoints" / "2").is_dir()


def test_notebook(tmp_path, monkeypatch, capsys):
    notebook = json.loads((ROOT / "docs" / "python.ipynb").read_text())
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] for cell in cells)
    names = run(["".join(cell["source"]) for cell in cells], tmp_path, monkeypatch)
    assert names["images"].shape == (8, 8, 8, 1)
    assert "no class seventeen" in capsys.readouterr().out
