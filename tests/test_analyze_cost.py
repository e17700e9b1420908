"""`analyze cost`: the published counts, their parts by stage, and what is refused."""

import json

import pytest

from dico_jax.analysis import cost
from dico_jax.errors import UsageError
from dico_jax.models import count_parameters, create_model
from dico_jax.planning.estimates import kept_activations
from tests.commands import assert_refused, call

pytest.importorskip("matplotlib")


@pytest.fixture
def without_tracing(monkeypatch):
    """Leaves out what takes seconds for each network, and other tests have."""
    monkeypatch.setattr(cost, "kept_activations", lambda model, _: dict.fromkeys(STAGES, 0))
    monkeypatch.setattr(cost, "count_parameters", lambda model, inside=(): 10)


STAGES = (*create_model("DiCo-S").stages, "blocks", cost.REST)


@pytest.mark.parametrize(
    ("name", "size", "published"),
    [
        ("DiCo-S", 256, 4.2365e9),
        ("DiCo-B", 256, 16.856e9),
        ("DiCo-L", 256, 60.169e9),
        ("DiCo-XL", 256, 87.221e9),
        ("DiCo-H", 256, 194.03e9),
        ("DiCo-XL", 512, 347.86e9),
        ("DiT-XL/2", 256, 118.62e9),
        ("DiT-XL/2", 512, 524.54e9),
    ],
)
def test_the_stages_add_up_to_the_published_multiply_adds(name, size, published, without_tracing):
    (row,) = cost.measure([name], [size])
    assert row["multiply_adds"] == pytest.approx(published, rel=3e-5)
    assert row["multiply_adds"] == sum(s["multiply_adds"] for s in row["stages"].values())
    assert [*row["stages"]] == [*create_model(name).stages, cost.REST]
    assert all(stage["multiply_adds"] > 0 for stage in row["stages"].values())


def test_a_stage_has_the_multiply_adds_of_its_blocks(without_tracing):
    model = create_model("DiCo", hidden_size=4, depth=(1, 2, 1, 1, 1), num_classes=10)
    found = cost.by_stage(model, 8)["encoder_level_2"]["multiply_adds"]
    width, positions = 8, 4 * 4
    products = 2 * width**2 + 9 * width + 4 * width**2
    assert found == 2 * (7 * width**2 + positions * products)


def test_a_stage_has_the_parameters_and_activations_of_its_blocks():
    sizes = {"hidden_size": 16, "num_heads": 2, "patch_size": 2, "num_classes": 10}
    model, shape = create_model("DiT", depth=3, **sizes), (8, 8, 4)
    found, kept = cost.by_stage(model, 8), kept_activations(model, shape)
    activations = {name: stage["activation_bytes"] for name, stage in found.items()}
    assert activations == pytest.approx(kept, abs=1)
    width, hidden = 16, 64
    per_block = 7 * width * width + 7 * width  # modulation, but for one bias; then attention, MLP
    per_block += 3 * width * (width + 1) + 2 * width * hidden + hidden + width
    assert found["blocks"]["parameters"] == 3 * per_block
    whole = count_parameters(model)
    assert sum(stage["parameters"] for stage in found.values()) == whole


def test_the_command_writes_a_table_json_and_figures(tmp_path):
    args = ["--models=DiT-S/8,DiT-S/8", "--image_sizes=256", f"--out={tmp_path}/out"]
    done = call("dico_jax.analyze", "cost", *args)
    assert done.returncode == 0, done.stderr
    assert "| DiT-S/8 |    256 |" in done.stdout
    names = sorted(file.name for file in (tmp_path / "out").iterdir())
    assert names == ["cost.json", "cost.pdf", "cost.png"]
    result = json.loads((tmp_path / "out" / "cost.json").read_text())
    found = [(row["model"], row["image_size"]) for row in result["models"]]
    assert found == [("DiT-S/8", 256)]
    assert result["argv"][:2] == ["dico_jax.analyze", "cost"]
    assert {"jax", "dico_jax"} <= set(result["versions"])
    assert_refused(call("dico_jax.analyze", "cost", *args), f"--out={tmp_path}/out exists")


@pytest.mark.parametrize(
    ("models", "sizes", "message"),
    [
        ([], ["256"], "--models= is no published size: use DiCo-"),
        (["DiCo-Z"], ["256"], "--models=DiCo-Z is no published size: use DiCo-S or DiCo-"),
        (["DiCo-S", ""], ["256"], "--models= is no published size"),
        (["DiCo"], ["256"], "--models=DiCo is no published size: use DiCo-"),
        (["DiCo-S"], [], "--image_sizes= must be multiples of 32, up to 16384"),
        (["DiCo-S"], ["256", "100"], "--image_sizes=100 must be multiples of 32"),
        (["DiT-S/8"], ["32"], "--image_sizes=32 must be multiples of 64"),
        (["DiCo-S"], ["-32"], "--image_sizes=-32 must be .*: use some such as 256,512,1024"),
        (["DiCo-S"], ["0"], "--image_sizes=0 must be"),
        (["DiCo-S"], ["big"], "--image_sizes=big must be"),
        (["DiCo-S"], ["32768"], "--image_sizes=32768 must be"),
    ],
)
def test_models_and_sizes_that_are_none(models, sizes, message):
    with pytest.raises(UsageError, match=f"^{message}"):
        cost.check(models, sizes)


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        ([], ["what to do is missing", "analyze cost"]),
        (["cost"], ["cost needs --out"]),
        (["cost", "--out=OUT/a/b"], ["there is no folder"]),
        (["cost", "--out=tests"], ["--out=tests exists: give another name"]),
    ],
)
def test_what_is_wrong_is_one_line(tmp_path, args, parts):
    args = [arg.replace("OUT", str(tmp_path / "out")) for arg in args]
    assert_refused(call("dico_jax.analyze", *args), *parts)
    assert not [*tmp_path.iterdir()]
