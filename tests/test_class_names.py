"""Classes by number and by name."""

import numpy as np
import pytest

from dico_jax.errors import UsageError
from dico_jax.models import create_model
from dico_jax.models.class_names import ClassNames, imagenet_classes

IMAGENET = ClassNames(1000)


def test_imagenet_has_its_classes_in_the_order_of_wordnet_ids():
    known = imagenet_classes()
    assert len(known) == 1000
    assert [*known] == sorted(known)
    found = {number: IMAGENET.title(number) for number in (0, 207, 388, 404, 999)}
    assert found == {0: "tench", 207: "golden retriever", 388: "giant panda", 404: "airliner",
                     999: "toilet tissue"}  # fmt: skip


@pytest.mark.parametrize(
    ("asked", "numbers"),
    [
        ("tench,Tinca tinca , GOLDEN Retriever", [0, 0, 207]),
        ("maillot, tank suit", [639]),  # all names of a class are one of it
        ("tench, Tinca tinca,3", [0, 3]),
        ("tank suit, #7", [639, 7]),
        ("n01440764,sunglasses", [0, 837]),
        (["golden retriever", 3, np.int64(4), "jack-o'-lantern"], [207, 3, 4, 607]),
    ],
)
def test_names_of_imagenet(asked, numbers):
    assert IMAGENET.numbers(asked) == numbers
    assert ClassNames(1000, [*imagenet_classes()]).numbers(asked) == numbers


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("crane", r"--classes=crane: crane may be each of classes \[134, 517\]: write #134,"),
        ("maillot", r"may be each of classes \[638, 639\]"),
        ("goldn retriever", r"no class goldn retriever, .*; did you mean golden retriever or "),
        ("1000", r"no class 1000, use 0 to 999"),
        ([3, "cat"], r"no class cat"),
    ],
)
def test_what_is_no_class_of_imagenet(asked, said):
    with pytest.raises(UsageError, match=said):
        IMAGENET.numbers(asked)


def test_names_of_the_data_come_first():
    """Also where they are WordNet ids of some classes, or ImageNet has classes of that name."""
    own = ClassNames(1000, ["Crane", "crane"])
    assert (own.numbers("crane,Crane"), own.title(1), own.title(2)) == ([1, 0], "crane", "2")
    with pytest.raises(UsageError, match=r"classes \[0, 1\]"):
        own.numbers("CRANE")
    with pytest.raises(UsageError, match="no class tench"):
        own.numbers("tench")
    some = ClassNames(2, ["n01443537", "n02012849"])
    assert (some.numbers("Crane,goldfish,n01443537"), some.title(1)) == ([1, 0, 0], "crane")
    assert some.lines() == ["0 n01443537 goldfish, Carassius auratus", "1 n02012849 crane"]
    assert ClassNames(3, ["cat"]).lines() == ["0 cat", "1", "2"]


def test_networks_understand_names():
    model = create_model("DiCo", num_classes=1000)
    assert model.parse_conditions(["tench", 5], 3, 0)["label"].tolist() == [0, 5, 0]
    assert model.describe_conditions(np.array([0, 134, 1000]), ()) == ["tench", "crane", "1000"]
