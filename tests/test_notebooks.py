"""The three notebooks run from top to bottom, one after the other, on new data."""

import ast

import nbformat
import papermill
import pytest
from notebook_runs import PROJECT, run_notebook, write_lung_model
from PIL import Image

from datasets.phantom import draw_phantoms

NOTEBOOKS = ["1_data_exploration", "2_finetune_models", "3_evaluate_results"]

SMALL = """
title = "Small phantom"
[data]
reader = "covid_radiography"
root = "phantom"
[data.phantom]
size = 64
images_per_class = { "COVID-19" = 8, "Lung Opacity" = 7, "Normal" = 10, "Viral Pneumonia" = 7 }
[split]
val = 0.2
test = 0.4
[preprocessing]
image_size = 32
[training]
weights = "none"
epochs = 2
batch_size = 8
learning_rate = 1e-3
[maps]
methods = ["gradcam", "layercam"]
faithful = 2
steps = 3
[networks.lenet5]
[networks.small_cnn]
epochs = 1
"""

FOLDER = """
title = "A user's own folder"
[data]
reader = "folder"
root = "own"
patient_pattern = '^(p\\d+)_'
[split]
val = 0.2
test = 0.2
[preprocessing]
image_size = 32
[augmentation]
horizontal_flip = true
smallest_crop = 0.8
[training]
weights = "none"
[maps]
methods = ["gradcam"]
[networks.lenet5]
epochs = 3
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder of all results, with the one lung model that all studies share."""
    folder = tmp_path_factory.mktemp("runs")
    write_lung_model(folder / "lungs", phantoms=96, epochs=4)
    return folder


@pytest.fixture(autouse=True)
def few_repetitions(monkeypatch):
    """Score with few resamples and random networks, because only the run is tested here, not the precision."""
    monkeypatch.setattr("evaluation.intervals.RESAMPLES", 40)
    monkeypatch.setattr("evaluation.cam_scores.NETWORKS", 2)


@pytest.mark.slow
def test_small_phantom_from_exploration_to_conclusion(tmp_path, runs):
    (tmp_path / "small.toml").write_text(SMALL)
    parameters = {"study": str(tmp_path / "small.toml"), "runs": str(runs), "seed": 1}
    first, second, third = (run_notebook(name, **parameters) for name in NOTEBOOKS)
    for network in ("lenet5", "small_cnn"):
        assert (runs / "small" / network / "model.safetensors").is_file()
    assert "Imbalance: the most frequent of 4 classes has **1.4 times**" in first.of_type("text/markdown")[-1]
    assert "Lowest validation loss" in second.of_type("text/markdown")[-1]
    assert "all are 64 × 64 pixels" in first.text  # a figure of one size would say nothing
    conclusion = third.of_type("text/markdown")[-1]
    assert "test accuracy" in conclusion
    assert "Ensemble of 2 (LeNet-5, Small CNN)" in conclusion
    assert "centred Gaussian" in conclusion or "No map to score" in third.text
    for outputs in (first, second, third):
        assert outputs.pictures


@pytest.mark.slow
def test_own_folder_without_masks_runs_quickly_with_the_same_notebooks(tmp_path, runs):
    for i in range(40):
        folder = tmp_path / "own" / ("sick", "healthy")[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        image = draw_phantoms([(0, 2)[i % 2]], seed=i, size=48).images[0]
        Image.fromarray(image).convert("RGB").save(folder / f"p{i // 2:02d}_{i}.jpg")
    (tmp_path / "mine.toml").write_text(FOLDER)
    parameters = {"study": str(tmp_path / "mine.toml"), "runs": str(runs), "limit": 30}
    first, second, third = (run_notebook(name, **parameters) for name in NOTEBOOKS)
    assert "20 patients" not in first.text  # of 30 images
    assert (runs / "mine-limit30" / "lenet5" / "model.json").is_file()
    assert "epoch 1/1" in second.printed  # a limited look trains for one epoch
    assert "test accuracy" in third.of_type("text/markdown")[-1]
    assert "0 with a lesion or box" in third.text
    # These X-rays have no lung masks, so the lung model finds the lungs.
    source = "as found by a lung model that knows the synthetic phantom only"
    assert f"share in lungs, {source}" in third.text
    assert f"share inside the lungs, {source}: **" in third.of_type("text/markdown")[-1]


@pytest.mark.slow
def test_evaluation_without_training_names_the_remedy_in_a_real_kernel(tmp_path):
    (tmp_path / "small.toml").write_text(SMALL)
    parameters = {"study": str(tmp_path / "small.toml"), "runs": str(tmp_path / "none")}
    with pytest.raises(papermill.PapermillExecutionError, match="run notebook 2"):
        papermill.execute_notebook(
            PROJECT / f"{NOTEBOOKS[2]}.ipynb",
            tmp_path / "executed.ipynb",
            parameters=parameters,
            cwd=PROJECT,
            progress_bar=False,
            kernel_name="python3",
        )


def test_no_notebook_has_a_branch_or_a_long_cell():
    for name in NOTEBOOKS:
        for cell in code_cells(name):
            nodes = list(ast.walk(ast.parse(cell.source)))
            assert not any(isinstance(node, ast.If | ast.IfExp) for node in nodes), cell.source
            lines = [line for line in cell.source.splitlines() if line.strip()]
            assert len(lines) <= 12, cell.source


def code_cells(name):
    return [c for c in nbformat.read(PROJECT / f"{name}.ipynb", as_version=4).cells if c.cell_type == "code"]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook_has_one_cell_of_parameters_and_no_definitions(name):
    notebook = nbformat.read(PROJECT / f"{name}.ipynb", as_version=4)
    tagged = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    (parameters,) = tagged
    names = [target.id for node in ast.parse(parameters.source).body for target in node.targets]
    assert names == ["study", "data_root", "runs", "seed", "limit"]
    assert notebook.cells[0].cell_type == "markdown"
    nodes = [node for cell in code_cells(name) for node in ast.walk(ast.parse(cell.source))]
    assert not any(isinstance(node, ast.FunctionDef | ast.ClassDef) for node in nodes)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_committed_outputs_are_small_and_without_errors_and_local_paths(name):
    path = PROJECT / f"{name}.ipynb"
    notebook = nbformat.read(path, as_version=4)
    assert path.stat().st_size < 1_000_000
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert any(kind.startswith("image/") for output in outputs for kind in output.get("data", {}))
    assert not any(output.output_type == "error" or output.get("name") == "stderr" for output in outputs)
    kinds = {kind for output in outputs for kind in output.get("data", {})}
    assert kinds <= {"image/png", "image/jpeg", "text/plain", "text/html", "text/markdown"}
    assert str(PROJECT) not in path.read_text(encoding="utf-8")
    texts = [output["data"]["text/markdown"] for output in outputs if "text/markdown" in output.get("data", {})]
    assert any("synthetic" in text for text in texts)
