"""Real pictures beside the recorded numbers: 60 of ImageNet in class folders, CIFAR-10 as zips.

Tests that read them skip, with that reason, where they are absent.
"""

import pytest

from tests import golden

DATA = golden.FOLDER.parent / "data"
IMAGENET = DATA / "imagenet_sample"
requires_data = pytest.mark.skipif(
    not IMAGENET.is_dir(), reason=f"no pictures at {DATA}; set DICO_JAX_GOLDEN to the folder beside"
)
