"""Processes that accelerate's launcher starts train together as one process would."""

import os
import shutil
import socket
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import TINY_STUDY
from safetensors.torch import load_file

from inference.explanations import explain
from inference.trained_networks import load_network, read_card
from studies.loading import PROJECT
from utils import read_xray

pytestmark = pytest.mark.slow

# LeNet-5 has no batch normalisation: two processes train it like one, except for rounding. Therefore the tests use
# double precision and SGD (Adam divides a gradient by its own size). The small CNN has batch normalisation: on CPUs
# each process normalises its own share of a batch. Dropout is off, because each process draws its own.
NETWORKS = {"lenet5": "", "small_cnn": "dropout = 0.0"}
ODD = PROJECT / "tests" / "training" / "odd_training.py"
KILL = 6  # a state is saved after each of an epoch's four batches, perhaps at its end too: save 6 is in epoch 2
LAUNCHER = [
    "-m",
    "accelerate.commands.launch",
    "--multi_gpu",
    "--num_processes",
    "2",
    "--num_machines",
    "1",
    "--mixed_precision",
    "bf16",
]


def start(study, runs, *options, launcher=(), kill=0, numbers="float64", **environment):
    """Start `odd_training` with more variables in its environment."""
    command = [sys.executable, *launcher, str(ODD), numbers, str(kill), str(study), "--runs", str(runs)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([*command, "--device", "cpu", *options], env=os.environ | environment, **pipes)


def start_two(study, runs, *options, **settings):
    """Start two processes as a launcher does, but seconds faster."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    ranks = [{"RANK": rank, "LOCAL_RANK": rank} for rank in "01"]
    return [start(study, runs, *options, **shared, **rank, **settings) for rank in ranks]


def outcome(*processes):
    """Return the exit statuses, the printed text and the errors; fail if a process waits forever for another one."""
    try:
        texts = [process.communicate(timeout=500) for process in processes]
    finally:
        for process in processes:
            process.kill()
    outputs, errors = zip(*texts, strict=True)
    return [process.returncode for process in processes], "".join(outputs), "".join(errors)


def printed_by(*processes):
    statuses, printed, errors = outcome(*processes)
    assert not any(statuses), errors
    return printed


@pytest.fixture(scope="module")
def trained(phantom_root, tmp_path_factory):
    """Both networks, trained by one process and by two, with batches of odd size."""
    study = phantom_root.parent / "shared.toml"
    study.write_text(
        TINY_STUDY.replace("batch_size = 8", "batch_size = 7\ncheckpoint_minutes = 0")
        .replace("horizontal_flip = true", "horizontal_flip = true\nrotation = 10")
        .replace(
            "[networks.resnet18]",
            "".join(['optimizer = "sgd"\n', *(f"[networks.{name}]\n{more}\n" for name, more in NETWORKS.items())]),
        )
    )
    runs = tmp_path_factory.mktemp("shared")
    # The README's command. Half precision in accelerate's configuration must not change the study's precision.
    printed = {n: printed_by(start(study, runs / str(n), launcher=LAUNCHER * (n - 1))) for n in (1, 2)}
    return {number: runs / str(number) / "shared" for number in printed}, printed


def test_two_processes_give_the_weights_of_one(trained):
    folders, _ = trained
    one, two = (load_file(folders[number] / "lenet5" / "model.safetensors") for number in (1, 2))
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, rtol=0, atol=1e-7, msg=lambda text, key=key: f"{key}: {text}")


def test_losses_and_scores_over_two_processes_count_every_image_once(trained):
    folders, _ = trained
    one, two = (pd.read_csv(folders[number] / "lenet5" / "history.csv") for number in (1, 2))
    np.testing.assert_allclose(two.to_numpy(), one.to_numpy(), rtol=1e-4, atol=1e-6)
    for split in ("train", "val", "test"):
        one, two = (pd.read_csv(folders[n] / "lenet5" / f"predictions_{split}.csv") for n in (1, 2))
        assert one[["path", "patient", "target"]].equals(two[["path", "patient", "target"]])
        np.testing.assert_allclose(one.iloc[:, 3:], two.iloc[:, 3:], atol=1e-4)


def test_predictions_of_two_processes_belong_to_the_saved_weights(trained, phantom_root):
    folder = trained[0][2] / "small_cnn"  # the processes see different batch statistics
    trained_network, predictions = load_network(folder), pd.read_csv(folder / "predictions_test.csv")
    trained_network.network.float()
    for path, *probabilities in predictions[["path", *trained_network.card.classes]].itertuples(index=False):
        expected = explain(trained_network, read_xray(phantom_root / path)).probabilities
        np.testing.assert_allclose(probabilities, expected, atol=1e-4)


def test_one_process_writes_and_prints_for_all(trained):
    folders, printed = trained
    assert printed[2].count("saved ") == len(NETWORKS)
    for text in ("parameters for 4 classes", "computed in", "epoch 1/2"):
        assert printed[2].count(text) == printed[1].count(text) == len(NETWORKS), text
    assert printed[2].count("on CPUs each process normalises its own share of a batch") == 1
    assert {path.name for path in folders[2].iterdir()} == {path.name for path in folders[1].iterdir()}


def test_two_killed_processes_go_on_to_the_same_bytes(trained, phantom_root, tmp_path):
    folders, _ = trained
    study, folder = phantom_root.parent / "shared.toml", tmp_path / "shared" / "small_cnn"
    statuses, *_ = outcome(*start_two(study, tmp_path, "--networks", "small_cnn", kill=KILL))
    assert all(statuses)
    assert (folder / "resume" / "state.pt").is_file()
    assert not (folder / "model.json").exists()
    assert "going on after" in printed_by(*start_two(study, tmp_path, "--networks", "small_cnn"))
    for file in ("model.safetensors", "history.csv"):
        assert (folder / file).read_bytes() == (folders[2] / "small_cnn" / file).read_bytes()


def test_processes_with_and_without_bf16_units_agree_on_the_precision_and_on_finished_networks(phantom_root, tmp_path):
    study = phantom_root.parent / "mixed.toml"
    networks = "[networks.lenet5]\n[networks.small_cnn]\n"
    study.write_text(TINY_STUDY.replace('precision = "fp32"', "").replace("[networks.resnet18]", networks))
    printed_by(*start_two(study, tmp_path, numbers="float32", UNITS="1,1"))
    folder = tmp_path / "mixed" / "small_cnn"
    expected = (folder / "model.safetensors").read_bytes()
    shutil.rmtree(folder)
    printed = printed_by(*start_two(study, tmp_path, numbers="float32", UNITS="1,0"))
    assert printed.count("is finished, with the same settings") == printed.count("saved ") == 1
    assert read_card(folder).origin["precision"] == "bf16"
    assert (folder / "model.safetensors").read_bytes() == expected


def test_different_numbers_of_threads_are_refused_before_anything_is_written(trained, phantom_root, tmp_path):
    study = phantom_root.parent / "shared.toml"
    statuses, _, errors = outcome(*start_two(study, tmp_path, THREADS="1,2"))
    assert all(statuses)
    assert errors.count("finetune.py: the processes differ in threads (1, 2): start all of them alike") == 2
    assert not list(tmp_path.iterdir())
