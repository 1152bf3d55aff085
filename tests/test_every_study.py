"""Every study trains and goes through notebooks 1 and 3, on generated files and on real X-rays, if there are any."""

from functools import partial
from pathlib import Path
from shutil import copytree

import pytest
from layouts import data_root as real_data  # noqa: F401 - a fixture, by its own name
from layouts import write_chestxray14, write_covid_radiography, write_kermany
from notebook_runs import run_notebook, write_lung_model

from evaluation.runs import read_runs
from finetune import main
from inference.trained_networks import load_network
from studies.loading import STUDIES, load_study, read_images

pytestmark = pytest.mark.slow

WRITERS = {
    "kermany": write_kermany,
    "chestxray14": write_chestxray14,
    # One study holds out 60 + 60 images of each class; a limited study holds out the same share of its images.
    "covid_radiography": partial(write_covid_radiography, per_class=150),
}
NAMES = sorted(path.stem for path in STUDIES.glob("*.toml") if path.stem != "demo")  # the demo draws its own data
LIMIT, SIZE = 60, 64  # images, and pixels of their side: fewer give maps of one cell, without contrast
REAL = {"kermany": "chest_xray", "chestxray14": "ChestX-ray14", "covid_radiography": "COVID-19_Radiography_Dataset"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of all results, with the one lung model that all studies share."""
    folder = tmp_path_factory.mktemp("runs")
    write_lung_model(folder / "lungs", phantoms=96, epochs=4)
    return folder


@pytest.fixture(autouse=True)
def few_repetitions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Score with few resamples and random networks, because only the run is tested here, not the precision."""
    monkeypatch.setattr("evaluation.intervals.RESAMPLES", 40)
    monkeypatch.setattr("evaluation.cam_scores.NETWORKS", 2)


def run_everything(name: str, root: Path, runs: Path) -> None:
    """Train a study on a few small images; run notebooks 1 and 3 on the result."""
    command = f"{name} --weights none --limit {LIMIT} --epochs 1 --image-size {SIZE} --device cpu"
    assert main([*command.split(), "--data-root", str(root), "--runs", str(runs)]) == 0
    study = load_study(name, data_root=root, limit=LIMIT)
    trained = read_runs(study, runs, read_images(study))
    for run in trained.values():
        assert run.card.image_size == SIZE
        assert len(run.history) == len(study.training_of(run.card.architecture).all_phases)
        load_network(run.folder)
    parameters = {"study": name, "data_root": str(root), "runs": str(runs), "limit": LIMIT}
    for notebook in ("1_data_exploration", "3_evaluate_results"):
        assert run_notebook(notebook, **parameters).pictures


@pytest.mark.parametrize("name", NAMES)
def test_study_runs_on_generated_files_in_the_layout_of_its_data(name, tmp_path_factory, runs):
    reader = load_study(name).sources[0].reader
    root = tmp_path_factory.getbasetemp() / reader
    if not root.exists():
        WRITERS[reader](root, size=SIZE)
    run_everything(name, root, runs)


@pytest.mark.parametrize("name", NAMES)
def test_study_runs_on_real_xrays(name, data_root, runs):
    root = data_root / REAL[load_study(name).sources[0].reader]
    if not root.is_dir():
        pytest.skip(f"no {root.name} in DATA_ROOT")
    (runs / "real").mkdir(exist_ok=True)
    copytree(runs / "lungs", runs / "real" / "lungs", dirs_exist_ok=True)
    run_everything(name, root, runs / "real")
