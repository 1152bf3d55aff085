"""An interrupted training continues to the same bytes; errors say what to do."""

import json
import os
import shutil
import signal
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import TINY_STUDY
from layouts import write_kermany
from safetensors.torch import save_file
from torch import nn

import finetune
from finetune import fine_tune_study, main
from networks import build_network
from studies.loading import PROJECT, load_study, load_table
from studies.settings import Training
from training.augmentation import Augmentation
from training.batches import Batches, XrayDataset
from training.checkpoints import Checkpoints
from training.loop import fine_tune
from training.provenance import provenance_of
from training.run_folder import finished_digest, replaced_results, training_folder
from utils import Preprocessing, write_whole

pytestmark = pytest.mark.slow

COMPARED = ("model.safetensors", "history.csv", "predictions_test.csv")
ODD = PROJECT / "tests" / "training" / "odd_training.py"
# The state is saved after each of an epoch's three batches, perhaps also at its end. Each run continues from the last
# state. These are the saves at which the runs are killed: in the first epoch, the second, and the third or fourth.
KILLS = (2, 5, 6)
LONGER = TINY_STUDY.replace("epochs = 2", "epochs = 5\nschedule = 'one_cycle'\ncheckpoint_minutes = 0").replace(
    "learning_rate = 1e-3", "learning_rate = 1e-3\ndropout = 0.2\nhidden_units = [8]"
)


def results(folder):
    return {name: (folder / name).read_bytes() for name in COMPARED}


def start(study, runs, script=(PROJECT / "finetune.py",)):
    command = [sys.executable, *map(str, script), str(study), "--runs", str(runs), "--device", "cpu"]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def test_three_kills_within_saves_leave_the_same_files_byte_for_byte(phantom_root, tmp_path):
    study = phantom_root.parent / "killed.toml"
    study.write_text(LONGER.replace("resnet18", "small_cnn"))
    whole = start(study, tmp_path / "whole")
    folder = tmp_path / "killed" / "killed" / "small_cnn"
    for number in KILLS:
        process = start(study, tmp_path / "killed", (ODD, "float32", number))
        _, errors = process.communicate()
        assert process.returncode == -signal.SIGKILL, errors
        assert (folder / "resume" / "state.pt").is_file()
        assert not (folder / "model.json").exists()
    last = start(study, tmp_path / "killed")
    for process in (whole, last):
        _, errors = process.communicate()
        assert process.returncode == 0, errors
    assert results(folder) == results(tmp_path / "whole" / "killed" / "small_cnn")
    assert not (folder / "resume").exists()


# --- the same in one process, at chosen moments ---


def nothing(count):
    """Do nothing."""


class Pictures(XrayDataset):
    """Random pictures in place of files; `trouble` is called before each batch, with the batch's number."""

    def __init__(self, number, trouble=nothing):
        super().__init__([""] * number, np.arange(number) % 2, Preprocessing(32, (0.5,) * 3, (0.2,) * 3))
        generator = torch.Generator().manual_seed(0)
        self.pictures = torch.randint(0, 256, (number, 1, 32, 32), dtype=torch.uint8, generator=generator)
        self.trouble, self.count = trouble, 0

    def images(self, rows):
        self.count += 1
        self.trouble(self.count)
        return self.pictures[rows]


SETTINGS = {
    "phases": [{"trainable": "head", "epochs": 2, "learning_rate": 1e-2}, {"epochs": 3, "learning_rate": 1e-2}],
    "schedule": "plateau",
    "plateau_patience": 1,
    "precision": "fp32",
}


def network():
    torch.manual_seed(1)
    layers = [nn.Conv2d(3, 6, 3, stride=4), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Dropout(0.3)]
    model = nn.Sequential(*layers)
    model.add_module("head", nn.Linear(6 * 64, 2))
    model.head_name = "head"
    return model


FLIP = Augmentation(horizontal_flip=True)  # two views: the head is trained on cached features
VARIED = Augmentation(horizontal_flip=True, rotation=10, brightness=0.2)


def train(folder, trouble=nothing, val_trouble=nothing, augment=VARIED, on_epoch=nothing, **settings):
    """Train a small network; return its weights and history."""
    model = network()
    training = Training(**(SETTINGS | settings))
    data, val_data = Pictures(22, trouble), Pictures(9, val_trouble)
    prepare = data.preprocessing.normalise
    batches = {
        "train": Batches(data, 6, seed=4, augment=augment, prepare=prepare),
        "val": Batches(val_data, 6, prepare=prepare),
    }
    checkpoints = None if folder is None else Checkpoints(folder, {"rate": str(settings)})
    options = {"training": training, "device": "cpu", "title": "T", "checkpoints": checkpoints}
    result = fine_tune(model, batches, on_epoch=on_epoch, **options)
    return model.state_dict(), result


def assert_same(first, second):
    (weights, result), (other_weights, other_result) = first, second
    assert result.history.equals(other_result.history)
    assert result.best_epoch == other_result.best_epoch
    assert all(torch.equal(value, other_weights[key]) for key, value in weights.items())


def at(number, error):
    def trouble(count):
        if count == number:
            raise error

    return trouble


@pytest.fixture(scope="module")
def whole_training():
    """The weights and the history of a training that is not broken off."""
    return train(None)


@pytest.fixture
def heard():
    """Let Ctrl-C raise KeyboardInterrupt; processes in the background ignore Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(("augment", "number"), [*((VARIED, n) for n in (1, 5, 9, 20)), *((FLIP, n) for n in (3, 12))])
def test_an_unreadable_image_is_named_and_no_finished_batch_is_lost(tmp_path, augment, number):
    with pytest.raises(ValueError, match="broken image"):
        train(tmp_path, at(number, ValueError("broken image")), augment=augment)
    assert_same(train(tmp_path, augment=augment), train(None, augment=augment))


def test_an_unreadable_validation_image_does_not_lose_the_epoch(whole_training, tmp_path):
    with pytest.raises(ValueError, match="broken image"):
        train(tmp_path, val_trouble=at(3, ValueError("broken image")))
    batches = []
    again = train(tmp_path, trouble=batches.append)
    assert len(batches) == 3 * 4  # the epochs of the second phase; those of the first are finished
    assert_same(again, whole_training)


def test_ctrl_c_stops_the_computing_of_features_at_once(tmp_path, heard):
    def press(count):
        assert count < 3, "went on computing features"
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt, match="phase 1"):
        train(tmp_path, press, augment=FLIP)
    assert_same(train(tmp_path, augment=FLIP), train(None, augment=FLIP))


def test_ctrl_c_while_features_are_computed_again_loses_nothing(tmp_path, heard):
    def press(_):
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt, match="epoch 2/2"):
        train(tmp_path, augment=FLIP, on_epoch=press)
    with pytest.raises(KeyboardInterrupt, match="epoch 2/2"):
        train(tmp_path, press, augment=FLIP)
    assert_same(train(tmp_path, augment=FLIP), train(None, augment=FLIP))


@pytest.mark.parametrize(
    ("number", "signal_number"), [(2, signal.SIGINT), (7, signal.SIGTERM), (13, signal.SIGINT), (19, signal.SIGTERM)]
)
def test_ctrl_c_ends_the_batch_saves_and_says_how_to_go_on(whole_training, tmp_path, heard, number, signal_number):
    def press(count):
        if count == number:
            signal.raise_signal(signal_number)

    with pytest.raises(KeyboardInterrupt, match="run the same again to go on"):
        train(tmp_path, press)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert_same(train(tmp_path), whole_training)


def test_ctrl_c_during_validation_does_not_lose_the_epoch(whole_training, tmp_path, heard):
    def press(count):
        if count == 3:  # the first batch of the second validation
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt, match=r"phase 1/2 \(head\) epoch 2/2"):
        train(tmp_path, val_trouble=press)
    batches = []
    again = train(tmp_path, trouble=batches.append)
    assert len(batches) == 3 * 4  # the three epochs of the second phase
    assert_same(again, whole_training)


def test_a_loss_that_is_not_finite_is_named_and_the_state_before_it_stays(whole_training, tmp_path):
    with pytest.raises(ValueError, match="stop here"):
        train(tmp_path, at(6, ValueError("stop here first")))
    state_before = (tmp_path / "state.pt").read_bytes()

    model = network()
    data = Pictures(22)
    batches = {
        "train": Batches(data, 6, seed=4, prepare=lambda images: images.expand(-1, 3, -1, -1) * float("nan")),
        "val": Batches(Pictures(9), 6, prepare=data.preprocessing.normalise),
    }
    with pytest.raises(FloatingPointError, match=r"epoch 2: the loss is not finite \(batch 2\); set a lower"):
        fine_tune(
            model,
            batches,
            training=Training(**SETTINGS),
            device="cpu",
            title="T",
            checkpoints=Checkpoints(tmp_path, {"rate": "{}"}),
        )
    assert (tmp_path / "state.pt").read_bytes() == state_before
    assert_same(train(tmp_path), whole_training)


@pytest.mark.skipif(sys.platform == "win32", reason="no limits to the size of files")
def test_a_full_disk_is_named_and_the_last_state_stays(whole_training, tmp_path):
    import resource

    with pytest.raises(ValueError, match="later"):
        train(tmp_path, at(7, ValueError("later")))
    files_before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"cannot save the training's state .*File too large") as raised:
            train(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "the last state is kept there: make room and run the same again" in str(raised.value)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == files_before
    assert_same(train(tmp_path), whole_training)


def test_a_state_of_other_settings_is_refused_and_damage_is_named(tmp_path):
    with pytest.raises(ValueError, match="later"):
        train(tmp_path, at(7, ValueError("later")))
    with pytest.raises(ValueError, match=r"other settings \(rate = .*, now .*patience.*: go on with those, or start"):
        train(tmp_path, patience=9)
    (tmp_path / "state.pt").write_bytes((tmp_path / "state.pt").read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"no state that can be read .* start anew with --restart"):
        train(tmp_path)


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    file = tmp_path / "x"
    write_whole(file, "first")
    with pytest.raises(TypeError):
        write_whole(file, 3)
    assert file.read_text() == "first"
    assert list(tmp_path.iterdir()) == [file]


def test_a_file_that_was_written_whole_has_the_mode_of_any_new_file(tmp_path):
    (tmp_path / "ordinary").touch()
    write_whole(tmp_path / "weights", partial(save_file, {"x": torch.zeros(2)}))
    write_whole(tmp_path / "text", "text")
    assert {file.stat().st_mode for file in tmp_path.iterdir()} == {(tmp_path / "ordinary").stat().st_mode}


def test_two_writers_of_one_file_do_not_disturb_each_other(tmp_path):
    file = tmp_path / ("x" * 255)  # as long as a name can be

    def slow(unfinished):
        unfinished.write_bytes(b"slow")
        write_whole(file, b"quick")
        assert file.read_bytes() == b"quick"

    write_whole(file, slow)
    assert file.read_bytes() == b"slow"
    assert list(tmp_path.iterdir()) == [file]


# --- the run folder ---


def test_a_state_in_bf16_is_refused_without_bf16_units(phantom_root, tmp_path, capsys, monkeypatch):
    study = phantom_root.parent / "auto.toml"
    study.write_text(TINY_STUDY.replace('precision = "fp32"', "").replace("resnet18", "lenet5"))
    save = Checkpoints.save

    def broken_off(self, state):
        save(self, state)
        raise KeyboardInterrupt("stopped")

    command = [str(study), "--runs", str(tmp_path), "--device", "cpu"]
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    monkeypatch.setattr(Checkpoints, "save", broken_off)
    assert main(command) == 130
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": False})
    capsys.readouterr()
    assert main(command) == 2
    printed = capsys.readouterr()
    assert 'other settings (precision = "bf16", now "fp32"): go on with those, or start anew' in printed.err
    assert "computed in" not in printed.out


def test_a_state_of_another_version_is_refused(tmp_path):
    with pytest.raises(ValueError, match="later"):
        train(tmp_path, at(7, ValueError("later")))
    with pytest.raises(ValueError, match="holds an unfinished training of another version: start anew"):
        Checkpoints(tmp_path, {"rate": "{}", "new": 1}).saved()


def test_a_second_training_into_one_folder_is_refused(tiny_study, tmp_path):
    with (
        training_folder(tmp_path / "tiny" / "resnet18", restart=False),
        pytest.raises(ValueError, match="another process"),
    ):
        fine_tune_study(tiny_study, load_table(tiny_study), "resnet18", runs=tmp_path, device="cpu")


def write_results(folder, text, names=("model.json", "model.safetensors", "predictions_test.csv")):
    with replaced_results(folder) as results:
        for name in names:
            (results / name).write_text(text)
        (results / "lungs").mkdir()
        (results / "lungs" / "model.json").write_text(text)


def contents(folder):
    """Return the text of each file below a folder, and where each link points."""
    return {
        path.relative_to(folder).as_posix(): os.readlink(path) if path.is_symlink() else path.read_text()
        for path in folder.rglob("*")
        if path.is_symlink() or path.is_file()
    }


@pytest.fixture
def folder_with_users_files(tmp_path):
    """A run folder with older results and a user's own files, and the contents of those files."""
    folder = tmp_path / "study" / "net"
    write_results(folder, "older", ("model.json", "model.safetensors", "lungs_failed.csv"))
    (folder / "notes.txt").write_text("mine")
    (folder / "figures" / "old").mkdir(parents=True)
    (folder / "figures" / "old" / "model.json").write_text("mine too")
    (folder / "images").symlink_to("../../elsewhere")
    (folder / "figures" / "old").chmod(0o555)  # a user may protect a folder
    return folder, {"notes.txt": "mine", "figures/old/model.json": "mine too", "images": "../../elsewhere"}


NEWER = {name: "newer" for name in ("model.json", "model.safetensors", "predictions_test.csv", "lungs/model.json")}
OLDER = {name: "older" for name in ("model.json", "model.safetensors", "lungs_failed.csv", "lungs/model.json")}


def test_new_results_replace_only_the_older_ones(folder_with_users_files):
    folder, users_files = folder_with_users_files
    (folder / "resume").mkdir()
    (folder / "resume" / "state.pt").write_text("done")
    write_results(folder, "newer")
    assert contents(folder) == NEWER | users_files
    assert [path.name for path in folder.parent.iterdir()] == ["net"]


def test_incomplete_results_replace_nothing(folder_with_users_files):
    folder, users_files = folder_with_users_files
    with pytest.raises(TypeError):
        write_results(folder, None)  # no text: the first file cannot be written
    assert contents(folder) == OLDER | users_files
    assert [path.name for path in folder.parent.iterdir()] == ["net"]


class Killed(BaseException):
    """Stands for a kill: nothing on the disk changes after it."""


@pytest.fixture
def kill_at():
    """Return a function that sets the number of disk changes after which the process is killed; None for never."""
    left = [None]

    def audit(event, arguments):
        changes = event in ("os.rename", "os.remove", "os.rmdir", "os.link", "os.mkdir", "os.symlink")
        if left[0] is not None and (changes or (event == "open" and arguments[1] == "w")):
            left[0] -= 1
            if left[0] < 0:
                raise Killed

    sys.addaudithook(audit)  # Python cannot remove it; at the end it does nothing
    yield partial(left.__setitem__, 0)
    left[0] = None


def test_a_kill_while_results_are_replaced_leaves_the_older_or_the_newer_ones(folder_with_users_files, kill_at):
    folder, users_files = folder_with_users_files
    state = {"resume/state.pt": "all epochs"}
    outcomes, killed, steps = set(), True, 0
    while killed:
        write_results(folder, "older", ("model.json", "model.safetensors", "lungs_failed.csv"))
        (folder / "resume").mkdir()
        (folder / "resume" / "state.pt").write_text("all epochs")
        kill_at(steps)
        try:
            write_results(folder, "newer")
            killed = False
        except Killed:
            steps += 1
        kill_at(None)
        files_now = contents(folder)
        assert files_now.items() >= users_files.items()
        # A reader finds complete results, or no model.json.
        results = {name: text for name, text in files_now.items() if not name.startswith("resume/")}
        assert "model.json" not in files_now or results in (OLDER | users_files, NEWER | users_files)
        with training_folder(folder, restart=False):
            pass
        (folder / "resume" / "process").unlink(missing_ok=True)
        assert contents(folder) in (OLDER | users_files | state, NEWER | users_files)
        outcomes.add((killed, contents(folder)["model.json"]))
    assert outcomes == {(True, "older"), (True, "newer"), (False, "newer")}
    assert steps > 15
    assert [path.name for path in folder.parent.iterdir()] == ["net"]


def two_networks(phantom_root, tmp_path):
    """Return the command that trains two small networks, and their run folders."""
    study = phantom_root.parent / "two.toml"
    study.write_text(TINY_STUDY.replace("[networks.resnet18]", "[networks.lenet5]\n[networks.small_cnn]"))
    command = [str(study), "--runs", str(tmp_path), "--device", "cpu"]
    return command, [tmp_path / "two" / name for name in ("lenet5", "small_cnn")]


def written(folder):
    """Return what identifies the card's file in a run folder. A new training writes a new file."""
    status = (folder / "model.json").stat()
    return status.st_ino, status.st_mtime_ns


def test_a_network_that_is_finished_with_the_same_settings_is_not_trained_again(phantom_root, tmp_path, capsys):
    command, folders = two_networks(phantom_root, tmp_path)
    assert main([*command, "--networks", "lenet5"]) == 0
    first = written(folders[0])
    assert main(command) == 0
    assert f"{folders[0]} is finished, with the same settings and images (--restart trains it again)" in (
        capsys.readouterr().out
    )
    before = [written(folder) for folder in folders]
    assert before[0] == first
    for more in (["--networks", "lenet5", "--restart"], ["--networks", "lenet5", "--batch-size", "5"]):
        assert main([*command, *more]) == 0
        assert f"{folders[0]} holds older results: they are replaced when" in capsys.readouterr().out
        after = [written(folder) for folder in folders]
        assert after[0] != before[0]
        assert after[1] == before[1]
        before = after
    assert {path.name for path in (tmp_path / "two").iterdir()} == {"lenet5", "small_cnn"}


def test_complete_results_that_a_kill_left_are_put_in_place_without_a_training(phantom_root, tmp_path, capsys):
    command, (folder, _) = two_networks(phantom_root, tmp_path)
    command += ["--networks", "lenet5"]
    assert main(command) == 0
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    Checkpoints(folder / "resume", {}).save({"best_epoch": 0, "best_state": {}})
    (folder / "resume" / "results").mkdir()
    for path in set(folder.iterdir()) - {folder / "resume"}:
        path.rename(folder / "resume" / "results" / path.name)
    capsys.readouterr()
    assert main(command) == 0
    assert f"{folder} is finished" in capsys.readouterr().out
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before
    assert not (folder / "resume").exists()


def test_a_run_without_one_of_its_files_is_not_finished(phantom_root, tmp_path, capsys):
    command, (folder, _) = two_networks(phantom_root, tmp_path)
    command += ["--networks", "lenet5"]
    assert main(command) == 0
    lost = sorted(path for path in folder.iterdir() if path.is_file())
    assert {"model.safetensors", "history.csv", "predictions_test.csv", "splits.csv"} <= {p.name for p in lost}
    for path in lost:
        content = path.read_bytes()
        path.unlink()
        assert finished_digest(folder) is None, path
        path.write_bytes(content)
    card = folder / "model.json"
    content = card.read_text()
    card.write_text(json.dumps(json.loads(content) | {"lung_masking": True}))
    assert finished_digest(folder) is None  # lungs/ is missing
    card.write_text(content)
    before = written(folder)
    assert main(command) == 0
    assert written(folder) == before
    (folder / "predictions_test.csv").unlink()
    assert main(command) == 0
    assert (folder / "predictions_test.csv").is_file()


def digest(study, table, network):
    return provenance_of(study, table, network, "", None, Accelerator(cpu=True)).digest


def test_naming_the_default_positive_class_is_the_same_setting(tmp_path):
    write_kermany(tmp_path / "data")
    file, digests = tmp_path / "mine.toml", []
    for positive in ("", 'positive = "Pneumonia"', 'positive = "Normal"'):
        text = TINY_STUDY.replace("covid_radiography", "kermany").replace('root = "phantom"', 'root = "data"')
        file.write_text("\n".join([positive, text]))
        study = load_study(file)
        digests.append(digest(study, load_table(study), "resnet18"))
    assert digests[0] == digests[1] != digests[2]


def test_other_starting_weights_and_other_thresholds_are_other_settings(phantom_root, tmp_path, capsys):
    (_, *command), (folder, _) = two_networks(phantom_root, tmp_path / "runs")
    study, file = tmp_path / "start.toml", tmp_path / "start.safetensors"
    text = TINY_STUDY.replace("resnet18", "lenet5").replace('root = "phantom"', f'root = "{phantom_root}"')
    study.write_text(text.replace('weights = "none"', f'weights = "{file}"'))
    command, folder = [str(study), *command], tmp_path / "runs" / "start" / "lenet5"
    weights = build_network("lenet5", 4).state_dict()
    save_file(weights, file)
    assert main(command) == 0
    before = written(folder)
    assert main(command) == 0
    assert written(folder) == before
    save_file({key: value / 2 for key, value in weights.items()}, file)
    assert main(command) == 0
    halved = written(folder)
    assert halved != before
    shutil.copy(folder / "model.json", tmp_path)  # beside the weights it names the head's classes: the head is kept
    assert main(command) == 0
    assert written(folder) != halved
    plain, table = load_study(study), load_table(load_study(study))
    digests = {
        digest(each, table, "lenet5") for each in (plain, plain.overridden(threshold="f1"), plain.overridden(seed=1))
    }
    assert len(digests) == 3
    assert digest(plain.overridden(cache_images=False), table, "lenet5") in digests


@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_during_the_last_save_stops_after_the_network_is_finished(
    phantom_root, tmp_path, capsys, monkeypatch, heard, signal_number
):
    command, (first, second) = two_networks(phantom_root, tmp_path)
    save = Checkpoints.save

    def interrupted(self, state):
        save(self, state)
        if state["place"]["phase"] == 2:  # the only phase is done
            signal.raise_signal(signal_number)

    monkeypatch.setattr(Checkpoints, "save", interrupted)
    assert main(command) == 130
    assert f"stopped, with {first} finished; run the same again to go on" in capsys.readouterr().err
    assert not second.exists()
    before = written(first)
    monkeypatch.undo()
    assert main(command) == 0
    assert written(first) == before
    assert (second / "model.json").is_file()


def test_other_settings_are_refused_before_results_are_replaced(phantom_root, tmp_path, capsys):
    file = phantom_root.parent / "pair.toml"
    file.write_text(TINY_STUDY.replace("[networks.resnet18]", "[networks.lenet5]\n[networks.small_cnn]"))
    command, study = [str(file), "--runs", str(tmp_path), "--device", "cpu"], load_study(file)
    assert main([*command, "--networks", "lenet5"]) == 0
    before = (tmp_path / "pair" / "lenet5" / "model.json").read_bytes()
    settings = finetune._checked_job(study, load_table(study), "small_cnn", tmp_path, "cpu").provenance.settings
    Checkpoints(tmp_path / "pair" / "small_cnn" / "resume", settings).save({"best_epoch": 0, "best_state": {}})
    names_before = sorted(path.name for path in (tmp_path / "pair").iterdir())
    capsys.readouterr()
    assert main([*command, "--epochs", "7"]) == 2
    assert "other settings (epochs = 2, now 7): go on with those, or start anew" in capsys.readouterr().err
    assert (tmp_path / "pair" / "lenet5" / "model.json").read_bytes() == before
    assert sorted(path.name for path in (tmp_path / "pair").iterdir()) == names_before
    assert main([*command, "--seed", "5"]) == 2  # other splits too
    assert "with other settings (seed = 0, now 5)" in capsys.readouterr().err


def test_seeds_have_folders_of_their_own_and_the_same_splits(phantom_root, tmp_path, capsys):
    study = phantom_root.parent / "seeds.toml"
    study.write_text(TINY_STUDY.replace("[networks.resnet18]", "[networks.lenet5]"))
    command = [str(study), "--runs", str(tmp_path), "--device", "cpu"]
    assert main([*command, "--seeds", "0"]) == 0
    before = written(tmp_path / "seeds" / "lenet5")
    assert main([*command, "--seeds", "0,3"]) == 0
    assert written(tmp_path / "seeds" / "lenet5") == before
    first, second = (tmp_path / name / "lenet5" for name in ("seeds", "seeds-seed3"))
    assert (first / "splits.csv").read_bytes() == (second / "splits.csv").read_bytes()
    assert (first / "model.safetensors").read_bytes() != (second / "model.safetensors").read_bytes()
    assert main([*command, "--seeds", "0,x"]) == 2
    assert "give whole numbers" in capsys.readouterr().err
    assert main([*command, "--seeds", "0", "--seed", "1"]) == 2
    assert load_study(study).repeated(3).name == "seeds-seed3"
