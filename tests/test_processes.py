"""Several processes, started by accelerate's launcher, train the network that one trains."""

import os
import shutil
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import TINY_STUDY
from safetensors.torch import load_file

from batches import Share
from study_loading import PROJECT
from trained_networks import read_card

# Without and with batch normalisation. Dropout is off: each process draws its own. By SGD, for Adam divides a gradient
# by its own size, and in double precision: rounding is all that may differ, and what it does grows with every step.
NETWORKS = {"lenet5": "", "small_cnn": "dropout = 0.0"}
ODD = PROJECT / "tests" / "odd_training.py"
KILL = 40  # files are renamed before the kill, which falls into the second epoch of the second network


def launched(study, runs, *, processes, kill=0, numbers="float64", **own):
    """Train by the command of the README, in double precision; `own` as in `odd_training`."""
    alone = [sys.executable]
    launcher = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--multi_gpu",
        "--num_processes",
        str(processes),
    ]
    # A configuration that asks for half precision must not change the study.
    launcher += ["--num_machines", "1", "--mixed_precision", "bf16"]
    command = [*(launcher if processes > 1 else alone), str(ODD), numbers, str(kill), str(study)]
    return subprocess.Popen(
        [*command, "--runs", str(runs), "--device", "cpu"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | own,
    )


def printed_by(process):
    out, errors = process.communicate()
    assert process.returncode == 0, errors
    return out


@pytest.fixture(scope="module")
def trained(phantom_root, tmp_path_factory):
    """Both networks, trained by one process and by two, with batches that do not divide evenly."""
    study = phantom_root.parent / "shared.toml"
    study.write_text(
        TINY_STUDY.replace("batch_size = 8", "batch_size = 7\ncheckpoint_minutes = 0")
        .replace("horizontal_flip = true", "horizontal_flip = true\nrotation = 10")
        .replace(
            "[networks.resnet18]",
            "".join(
                ['optimizer = "sgd"\n', *(f"[networks.{name}]\n{more}\n" for name, more in NETWORKS.items())]
            ),
        )
    )
    runs = tmp_path_factory.mktemp("shared")
    printed = {n: printed_by(launched(study, runs / str(n), processes=n)) for n in (1, 2)}
    return {number: runs / str(number) / "shared" for number in printed}, printed


@pytest.mark.parametrize("name", NETWORKS)
def test_two_processes_give_the_weights_of_one(trained, name):
    folders, _ = trained
    one, two = (load_file(folders[number] / name / "model.safetensors") for number in (1, 2))
    for key, value in one.items():
        torch.testing.assert_close(
            two[key], value, rtol=0, atol=1e-7, msg=lambda text, key=key: f"{key}: {text}"
        )


@pytest.mark.parametrize("name", NETWORKS)
def test_metrics_over_two_processes_count_every_image_once(trained, name):
    folders, _ = trained
    one, two = (pd.read_csv(folders[number] / name / "history.csv") for number in (1, 2))
    np.testing.assert_allclose(two.to_numpy(), one.to_numpy(), rtol=1e-4, atol=1e-6)
    for split in ("train", "val", "test"):
        said = [pd.read_csv(folders[number] / name / f"predictions_{split}.csv") for number in (1, 2)]
        assert said[0][["path", "patient", "target"]].equals(said[1][["path", "patient", "target"]])
        np.testing.assert_allclose(said[0].iloc[:, 3:], said[1].iloc[:, 3:], atol=1e-4)


def test_one_process_writes_and_prints_for_all(trained):
    folders, printed = trained
    assert printed[2].count("saved ") == len(NETWORKS)
    for text in ("parameters for 4 classes", "computed in", "epoch 1/2"):
        assert printed[2].count(text) == printed[1].count(text) == len(NETWORKS), text
    assert {path.name for path in folders[2].iterdir()} == {path.name for path in folders[1].iterdir()}


def test_two_processes_that_were_killed_go_on_to_the_same_bytes(trained, phantom_root, tmp_path):
    folders, _ = trained
    study, working = phantom_root.parent / "shared.toml", tmp_path / "shared" / "small_cnn" / "resume"
    killed = launched(study, tmp_path, processes=2, kill=KILL)
    killed.communicate()
    assert killed.returncode
    assert (working / "state.pt").is_file()
    assert not (working.parent / "model.json").exists()
    assert "going on after" in printed_by(launched(study, tmp_path, processes=2))
    for name in NETWORKS:
        for file in ("model.safetensors", "history.csv"):
            assert (tmp_path / "shared" / name / file).read_bytes() == (folders[2] / name / file).read_bytes()


def test_processes_with_and_without_units_for_bf16_agree_on_what_is_finished_and_on_the_precision(
    phantom_root, tmp_path
):
    study = phantom_root.parent / "mixed.toml"
    networks = "[networks.lenet5]\n[networks.small_cnn]\n"
    study.write_text(TINY_STUDY.replace('precision = "fp32"', "").replace("[networks.resnet18]", networks))
    options = {"processes": 2, "numbers": "float32"}
    printed_by(launched(study, tmp_path, **options, UNITS="1,1"))
    folder = tmp_path / "mixed" / "small_cnn"
    expected = (folder / "model.safetensors").read_bytes()
    shutil.rmtree(folder)
    mixed = launched(study, tmp_path, **options, UNITS="1,0")
    try:
        out, errors = mixed.communicate(timeout=120)
    finally:
        mixed.terminate()  # if one waits for the other for ever
    assert mixed.returncode == 0, errors
    assert out.count("is finished, with the same settings") == out.count("saved ") == 1
    assert read_card(folder).origin["precision"] == "bf16"
    assert (folder / "model.safetensors").read_bytes() == expected


def test_processes_with_other_numbers_of_threads_are_refused_before_anything_is_written(
    trained, phantom_root, tmp_path
):
    refused = launched(phantom_root.parent / "shared.toml", tmp_path, processes=2, THREADS="1,2")
    _, errors = refused.communicate(timeout=120)
    assert refused.returncode
    # Once at least: the launcher ends the other process, which may not have come to say it.
    assert "finetune.py: the processes differ in threads (1, 2): start all of them alike" in errors
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("processes", [1, 2, 3, 7])
def test_shares_are_whole_and_even(processes):
    for number in range(30):
        shares = [range(number)[Share(index, processes).slice(number)] for index in range(processes)]
        assert [row for share in shares for row in share] == list(range(number))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
