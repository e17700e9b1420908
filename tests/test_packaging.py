"""What is built and installed has all that a checkout has."""

import importlib.metadata
import pkgutil
import re
import shutil
import subprocess
import sys

import pytest

import dico_jax
from tests.commands import ROOT

FILES = ("setup.py", "pyproject.toml", "README.md", "LICENSE", "NOTICE")


def run(*command, cwd):
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_build_has_the_configs_and_says_its_version(tmp_path):
    setuptools = pytest.importorskip("setuptools")
    if int(setuptools.__version__.split(".")[0]) < 77:  # pyproject.toml asks for it
        pytest.skip(f"setuptools {setuptools.__version__} is too old")
    checkout, built = tmp_path / "checkout", tmp_path / "built"
    checkout.mkdir()
    for name in FILES:
        shutil.copy(ROOT / name, checkout)
    for name in ("dico_jax", "configs"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, checkout / name, symlinks=True, ignore=ignored)
    run(sys.executable, "setup.py", "-q", "build_py", f"--build-lib={built}", cwd=checkout)
    assert run(sys.executable, "setup.py", "--version", cwd=checkout).split() == ["0.2.0"]

    def python_files(folder):
        return {p.relative_to(folder) for p in folder.glob("dico_jax/**/*.py")}

    assert python_files(built) >= python_files(checkout)
    page = [f"reporting/{name}" for name in ("page.html", "page.css", "page.js", "published.json")]
    page.append("playground/page.css")
    for name in ("py.typed", "models/imagenet_classes.txt", *page):
        assert (built / "dico_jax" / name).exists()
    assert (built / "dico_jax" / "configs" / "default.py").exists()
    code = "from dico_jax.configs import xl256; print(xl256.get_config().model.name)"
    code = f"import sys; sys.path.insert(0, {str(built)!r}); {code}"
    assert run(sys.executable, "-P", "-c", code, cwd=tmp_path) == "DiCo-XL\n"


def test_one_version_is_said_everywhere():
    version = dico_jax.__version__
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"## {version}" in (ROOT / "CHANGELOG.md").read_text()
    try:
        assert importlib.metadata.version("dico_jax") == version
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("dico_jax is not installed")


def test_commands_have_one_entry(tmp_path):
    def dico_jax_command(*args):
        return subprocess.run(
            [sys.executable, "-m", "dico_jax", *args],
            cwd=ROOT, capture_output=True, text=True, check=False,
        )  # fmt: skip

    listed = dico_jax_command()
    assert listed.returncode == 0
    for name in ("train", "sample", "evaluate", "prepare", "convert", "benchmark"):
        assert f"\n  {name} " in listed.stdout
    assert "Workdir" in dico_jax_command("sample", "--help").stdout
    refused = dico_jax_command("draw")
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
    refused = dico_jax_command("train", "--config=configs/no.py", f"--workdir={tmp_path / 'run'}")
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
    refused = dico_jax_command("prepare", "paintings")
    assert "'paintings' is unknown" in refused.stderr


def test_names_that_have_moved_are_where_it_is_said():
    text = " ".join((ROOT / "docs" / "moved.md").read_text().split())
    names = set(re.findall(r"-> ([a-z_]\w*(?:\.\w+)+)", text))
    assert len(names) > 200
    outside = {"clu.metrics.Average", "model.parse_conditions"}  # of a library, of an object
    for name in sorted(names - outside):
        pkgutil.resolve_name(f"dico_jax.{name}")
