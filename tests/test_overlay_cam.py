"""The command line: one X-ray in, probabilities and an overlay out; mistakes answered in one line."""

import json
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from grad_cam import GradCAM, overlay
from networks import build_network
from overlay_cam import answer, chosen_labels, main, suffixes
from trained_networks import ModelCard, TrainedNetwork, load_network, save_network
from utils import read_xray

PROJECT = Path(__file__).parent.parent


@pytest.fixture
def xray(tmp_path, phantom_root):
    """One X-ray that is neither square nor of the network's size."""
    image = Image.open(phantom_root / "COVID" / "images" / "COVID-1.png").resize((120, 75))
    path = tmp_path / "in" / "patient 7.png"
    path.parent.mkdir()
    image.save(path)
    return path


def call(capsys, *arguments):
    status = main(["--device", "cpu", *map(str, arguments)])
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return status, captured.out, captured.err


def test_overlay_has_the_size_of_the_xray_and_probabilities_sum_to_one(capsys, xray, trained_run, tmp_path):
    status, out, err = call(capsys, "-i", xray, "-m", trained_run, "-o", tmp_path / "out.png", "--json")
    assert (status, err) == (0, "")
    (record,) = json.loads(out)
    assert sum(record["probabilities"].values()) == pytest.approx(1, abs=1e-3)
    assert record["predicted"] == max(record["probabilities"], key=record["probabilities"].get)
    assert record["maps"][0]["label"] == record["predicted"]
    picture = np.asarray(Image.open(tmp_path / "out.png"))
    assert picture.shape == (75, 120, 3)


def test_probabilities_are_the_models_own(capsys, xray, trained_run, tmp_path):
    trained = load_network(trained_run)
    network, card = trained.network, trained.card
    with torch.no_grad():
        expected = card.probabilities(network(trained.preprocessing(read_xray(xray))[None]))[0]
    _, out, _ = call(capsys, "-i", xray, "-m", trained_run, "-o", tmp_path, "--json")
    found = json.loads(out)[0]["probabilities"]
    assert list(found) == list(card.classes)
    np.testing.assert_allclose(list(found.values()), expected.numpy(), atol=1e-4)


def test_text_names_every_class_and_the_one_that_the_map_is_for(capsys, xray, trained_run, tmp_path):
    status, out, _ = call(capsys, "-i", xray, "-m", trained_run, "-l", "lung_opacity", "-o", tmp_path)
    assert status == 0
    for name in ("COVID-19", "Lung Opacity", "Normal", "Viral Pneumonia"):
        assert name in out
    assert "Grad-CAM for Lung Opacity" in out
    assert (tmp_path / "patient 7_cam.png").is_file()


def test_all_labels_give_a_map_each(capsys, xray, trained_run, tmp_path):
    status, out, _ = call(capsys, "-i", xray, "-m", trained_run, "-l", "all", "-o", tmp_path, "--json")
    assert status == 0
    written = [Path(entry["overlay"]).name for entry in json.loads(out)[0]["maps"]]
    assert written == [
        f"patient 7_cam_{name}.png" for name in ("covid19", "lungopacity", "normal", "viralpneumonia")
    ]
    assert all((tmp_path / name).is_file() for name in written)


def test_xray_is_untouched_where_the_map_is_zero(capsys, xray, trained_run, tmp_path):
    call(capsys, "-i", xray, "-m", trained_run, "-l", "normal", "-o", tmp_path / "o.png", "--alpha", "0.8")
    grey, trained = read_xray(xray), load_network(trained_run)
    with GradCAM(trained.network) as cam:
        maps = cam(trained.preprocessing(grey)[None], 2).upsampled(grey.shape)
    zero = maps[0, 0].numpy() == 0
    assert 0 < maps.numpy()[0, 0].min() < 0.9 or zero.any()  # the map says something about places
    picture = np.asarray(Image.open(tmp_path / "o.png"))
    np.testing.assert_array_equal(picture[zero], np.repeat(grey[..., None], 3, 2)[zero])
    expected = overlay(grey, maps[0, 0].numpy(), alpha=0.8)
    assert np.abs(picture.astype(int) - expected).max() <= 1
    call(capsys, "-i", xray, "-m", trained_run, "-l", "normal", "-o", tmp_path / "z.png", "--alpha", "0")
    np.testing.assert_array_equal(
        np.asarray(Image.open(tmp_path / "z.png")), np.repeat(grey[..., None], 3, 2)
    )


def test_good_files_of_a_folder_are_done_and_bad_ones_listed(capsys, xray, trained_run, tmp_path):
    (xray.parent / "broken.png").write_bytes(b"no image")
    (xray.parent / "notes.txt").write_text("not looked at")
    (xray.parent / "patient 7_cam.png").write_bytes(xray.read_bytes())  # an overlay of an earlier call
    status, out, err = call(capsys, "-i", xray.parent, "-m", trained_run, "-o", tmp_path / "out", "--json")
    assert status == 1
    assert "broken.png" in err
    assert "1 of 2 images" in err
    records = {Path(record["image"]).name: record for record in json.loads(out)}
    assert "error" in records["broken.png"]
    assert (tmp_path / "out" / "patient 7_cam.png").is_file()


def test_images_of_one_name_do_not_overwrite_each_other(capsys, xray, trained_run, tmp_path):
    twin = tmp_path / "other" / xray.name
    twin.parent.mkdir()
    Image.fromarray(255 - read_xray(xray)).save(twin)
    status, out, _ = call(capsys, "-i", xray, twin, "-m", trained_run, "-o", tmp_path / "out", "--json")
    assert status == 0
    overlays = [record["maps"][0]["overlay"] for record in json.loads(out)]
    assert len(set(overlays)) == 2
    assert all(Path(path).is_file() for path in overlays)


def test_numbered_names_do_not_collide_with_real_ones(capsys, xray, trained_run, tmp_path):
    inputs = []
    for name in ("a/x.png", "b/x.png", "c/x_2.png"):
        path = tmp_path / name
        path.parent.mkdir()
        path.write_bytes(xray.read_bytes())
        inputs.append(path)
    _, out, _ = call(capsys, "-i", *inputs, "-m", trained_run, "-o", tmp_path / "out", "--json")
    overlays = {record["maps"][0]["overlay"] for record in json.loads(out)}
    assert len(overlays) == 3 == len(list((tmp_path / "out").iterdir()))


def test_maps_of_all_labels_never_replace_an_xray(capsys, xray, trained_run, tmp_path):
    victim = tmp_path / "out_normal.png"
    victim.write_bytes(xray.read_bytes())
    status, _, err = call(capsys, "-i", victim, "-m", trained_run, "-o", tmp_path / "out.png", "-l", "all")
    assert status == 2
    assert "is an X-ray that was given" in err
    assert victim.read_bytes() == xray.read_bytes()


def test_labels_that_differ_in_punctuation_only_are_told_apart():
    card = ModelCard("resnet18", ("COVID+", "COVID-", "нет"), 32, (0, 0, 0), (1, 1, 1), "layer4")
    assert chosen_labels("COVID-", card) == [1]
    assert chosen_labels("нет", card) == [2]
    assert len(set(suffixes("all", card))) == 3
    for unclear in ("covid", "да"):
        with pytest.raises(ValueError, match="unknown label"):
            chosen_labels(unclear, card)


def test_nothing_done_is_status_2_and_an_overlay_that_cannot_be_written_costs_no_other(
    capsys, xray, trained_run, tmp_path
):
    bad = [tmp_path / f"{i}.png" for i in range(2)]
    for path in bad:
        path.write_bytes(b"no image")
    assert call(capsys, "-i", *bad, "-m", trained_run, "-o", tmp_path / "o")[0] == 2
    twin = xray.with_name("other.png")
    twin.write_bytes(xray.read_bytes())
    (tmp_path / "o" / "other_cam.png").mkdir(parents=True)
    status, out, _ = call(capsys, "-i", xray, twin, "-m", trained_run, "-o", tmp_path / "o", "--json")
    assert status == 1
    assert ["error" in record for record in json.loads(out)] == [False, True]
    assert (tmp_path / "o" / "patient 7_cam.png").is_file()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"-i": "gone.png"}, "no such file: gone.png"),
        ({"-i": "TEXT"}, "is not an image that can be read"),
        ({"-i": "EMPTY"}, "no images in the folder"),
        ({"-l": "tuberculosis"}, "choose from COVID-19, Lung Opacity, Normal, Viral Pneumonia or all"),
        ({"-m": "demo/alexnet"}, "run notebook 2"),
        ({"--colormap": "rainbows"}, "unknown colour map 'rainbows'"),
        ({"-o": "x.gif"}, ".png or .jpg"),
        ({"-o": "XRAY"}, "is an X-ray that was given"),
        ({"--device": "meta"}, "no device 'meta'"),
    ],
)
def test_a_mistake_is_one_line_with_a_remedy_and_status_2(
    capsys, xray, trained_run, tmp_path, change, message
):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.png").write_text("no image")
    stand_ins = {"TEXT": tmp_path / "text.png", "EMPTY": tmp_path / "empty", "XRAY": xray}
    change = {option: stand_ins.get(value, value) for option, value in change.items()}
    original = xray.read_bytes()
    options = {"-i": xray, "-m": trained_run, "-o": tmp_path / "out"} | change
    status, out, err = call(capsys, *[part for option in options.items() for part in option])
    assert status == 2
    assert message in err
    assert err.count("\n") == 1
    assert out == ""
    assert xray.read_bytes() == original


def test_alpha_out_of_range_is_refused(capsys, xray, trained_run):
    with pytest.raises(SystemExit) as caught:
        call(capsys, "-i", xray, "-m", trained_run, "--alpha", "2")
    assert caught.value.code == 2
    assert "not between 0 and 1" in capsys.readouterr().err


def untrained(seed, classes, *, outputs=None, **fields):
    torch.manual_seed(seed)
    card = ModelCard("small_cnn", classes, 48, (0.5,) * 3, (0.25,) * 3, "features.4.relu", **fields)
    return TrainedNetwork(build_network("small_cnn", outputs or card.outputs).eval(), card)


def run_of(folder, trained):
    save_network(folder, trained.network, trained.card)
    return folder


@pytest.fixture
def noise(tmp_path):
    path = tmp_path / "noise.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50), dtype=np.uint8)).save(path)
    return path


def test_several_runs_are_an_ensemble_of_mean_probability(capsys, noise, tmp_path):
    runs = [
        run_of(tmp_path / f"run{seed}", untrained(seed, ("no", "yes"), head="sigmoid")) for seed in range(3)
    ]
    alone = [json.loads(call(capsys, "-i", noise, "-m", run, "-o", tmp_path, "--json")[1])[0] for run in runs]
    # A run that is named twice counts once.
    status, out, _ = call(capsys, "-i", noise, "-m", *runs, runs[0], "-o", tmp_path, "--json")
    (record,) = json.loads(out)
    assert status == 0
    assert record["networks"] == 3
    assert all("networks" not in one for one in alone)
    expected = np.mean([list(one["probabilities"].values()) for one in alone], axis=0)
    np.testing.assert_allclose(list(record["probabilities"].values()), expected, atol=1e-4)
    assert record["predicted"] == ("no", "yes")[expected.argmax()] == record["maps"][0]["label"]
    assert "mean of 3 networks" in call(capsys, "-i", noise, "-m", *runs, "-o", tmp_path)[1]


def test_runs_of_different_classes_are_no_ensemble(capsys, noise, tmp_path):
    runs = [
        run_of(tmp_path / "".join(classes), untrained(0, classes)) for classes in (("a", "b"), ("b", "a"))
    ]
    status, out, err = call(capsys, "-i", noise, "-m", *runs, "-o", tmp_path)
    assert (status, out) == (2, "")
    assert "an ensemble needs the same classes in the same order" in err


def test_prediction_of_an_ensemble_is_by_the_mean_of_the_thresholds(capsys, noise, tmp_path):
    member = untrained(0, ("no", "yes"), head="sigmoid")
    with torch.no_grad():
        p = float(
            member.card.probabilities(member.network(member.preprocessing(read_xray(noise))[None]))[0, 1]
        )
    runs = []
    for number, threshold in enumerate((p - 0.3, p + 0.1)):  # their mean lies 0.1 below p
        trained = untrained(0, ("no", "yes"), head="sigmoid", thresholds=(1 - threshold, threshold))
        runs.append(run_of(tmp_path / f"run{number}", trained))
    predicted = {}
    for key, chosen in {"low": runs[:1], "high": runs[1:], "both": runs}.items():
        out = call(capsys, "-i", noise, "-m", *chosen, "-o", tmp_path, "--json")[1]
        predicted[key] = json.loads(out)[0]["predicted"]
    assert predicted == {"low": "yes", "high": "no", "both": "yes"}


def test_findings_are_those_from_their_thresholds_on(capsys, noise, tmp_path):
    names = ("Mass", "Edema", "Hernia")
    trained = untrained(2, names, head="sigmoid", multilabel=True)
    with torch.no_grad():
        said = trained.card.probabilities(trained.network(trained.preprocessing(read_xray(noise))[None]))[0]
    thresholds = tuple(float(p) + shift for p, shift in zip(said, (-0.01, 0.01, -0.01), strict=True))
    run = run_of(
        tmp_path / "run",
        trained._replace(card=untrained(2, names, multilabel=True, thresholds=thresholds).card),
    )
    record = json.loads(call(capsys, "-i", noise, "-m", run, "-o", tmp_path, "--json")[1])[0]
    np.testing.assert_allclose(list(record["probabilities"].values()), said, atol=1e-4)
    assert record["findings"] == ["Mass", "Hernia"]
    assert "predicted" not in record
    assert record["maps"][0]["label"] == names[int(said.argmax())]
    status, out, _ = call(capsys, "-i", noise, "-m", run, "-o", tmp_path, "-l", "all")
    assert status == 0
    assert "Findings: Mass, Hernia" in out
    assert out.count("Grad-CAM for") == 3


class HalfMask:
    """Keeps an X-ray's left half; gives up on bright ones."""

    def mask_of(self, xray):
        return namedtuple("Mask", "mask reason")(xray < 0, "no lung found" if xray.mean() > 200 else None)

    def __call__(self, xray):
        return xray if self.mask_of(xray).reason else xray * (np.arange(xray.shape[1]) < 25).astype(np.uint8)


def test_record_says_whether_the_lungs_were_masked(noise, tmp_path):
    masked = untrained(0, ("no", "yes"), lung_masking=True)._replace(lungs=HalfMask())
    bright = tmp_path / "bright.png"
    Image.fromarray(np.full((40, 50), 250, np.uint8)).save(bright)
    options = {"alpha": 0.5, "colormap": "plasma"}
    records = [answer([masked], path, "top", [tmp_path / "out.png"], **options) for path in (noise, bright)]
    assert [record["lungs"] for record in records] == ["masked", "kept whole: no lung found"]
    assert "lungs" not in answer([untrained(0, ("no", "yes"))], noise, "top", [tmp_path / "o.png"], **options)


def test_command_line_imports_only_what_one_image_needs():
    code = "import sys, overlay_cam; print(*sys.modules)"
    modules = subprocess.run(
        [sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, check=True
    ).stdout.split()
    heavy = {
        "pandas",
        "sklearn",
        "seaborn",
        "matplotlib",
        "scipy",
        "pydantic",
        "accelerate",
        "timm",
        "segmentation_models_pytorch",
        "lung_segmentation",
        "studies",
        "finetune",
    }
    assert not heavy & set(modules)
