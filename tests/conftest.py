"""A small phantom on disk and a network that is trained on it for two epochs, shared by the tests that need them."""

from pathlib import Path

import pytest
from layouts import chestxray14_root, data_root, kermany_root  # noqa: F401 (fixtures for all tests)

from datasets.phantom import CLASSES, write_phantom
from finetune import fine_tune_study
from studies.loading import load_study, load_table
from studies.settings import Study

TINY_STUDY = """
title = "Tiny phantom"
[data]
reader = "covid_radiography"
root = "phantom"
[split]
val = 0.2
test = 0.2
[preprocessing]
image_size = 64
[augmentation]
horizontal_flip = true
[training]
weights = "none"
epochs = 2
batch_size = 8
learning_rate = 1e-3
precision = "fp32"
[networks.resnet18]
"""


@pytest.fixture(scope="session")
def phantom_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with 11, 9, 13 and 7 phantoms of 64 px: the classes are not equally frequent."""
    root = tmp_path_factory.mktemp("data") / "phantom"
    write_phantom(root, images_per_class=dict(zip(CLASSES, (11, 9, 13, 7), strict=True)), size=64, seed=3)
    return root


@pytest.fixture(scope="session")
def tiny_study(phantom_root: Path) -> Study:
    """Return a study of that phantom: ResNet-18 at 64 px for two epochs."""
    path = phantom_root.parent / "tiny.toml"
    path.write_text(TINY_STUDY)
    return load_study(path)


@pytest.fixture(scope="session")
def trained_run(tiny_study: Study, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train the tiny study; return its run folder."""
    runs = tmp_path_factory.mktemp("runs")
    return fine_tune_study(tiny_study, load_table(tiny_study), "resnet18", runs=runs, device="cpu")
