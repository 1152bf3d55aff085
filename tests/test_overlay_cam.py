"""The command line: one X-ray in, probabilities and an overlay out; a mistake is one line on stderr."""

import csv
import importlib.util
import json
import subprocess
import sys
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import overlay_cam
from cams.heatmaps import boxes_from_map, overlay, with_colour_bar
from cams.methods import METHODS
from datasets.phantom import CLASSES
from grad_cam import GradCAM
from inference.answers import MapOptions, Question, answer
from inference.explanations import explain
from inference.trained_networks import ModelCard, TrainedNetwork, load_network, save_network
from lungs.segmentation import LungSegmenter, load_segmenter, save_segmenter, unet
from networks import build_network
from overlay_cam import chosen_labels, main, suffixes
from utils import read_xray

PROJECT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def four_class_run(tmp_path_factory):
    """A ResNet-18 of random weights for the phantom's classes; not to be changed."""
    torch.manual_seed(0)
    card = ModelCard("resnet18", CLASSES, 64, (0.5,) * 3, (0.25,) * 3, "layer4")
    folder = tmp_path_factory.mktemp("runs") / "study" / "resnet18"
    save_network(folder, build_network("resnet18", 4), card)
    return folder


@pytest.fixture
def xray(tmp_path, phantom_root):
    """One X-ray that is not square and does not have the network's size."""
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


def test_overlay_has_the_size_of_the_xray_and_probabilities_sum_to_one(capsys, xray, four_class_run, tmp_path):
    status, out, err = call(capsys, "-i", xray, "-m", four_class_run, "-o", tmp_path / "out.png", "--json")
    assert (status, err) == (0, "")
    (record,) = json.loads(out)
    assert sum(record["probabilities"].values()) == pytest.approx(1, abs=1e-3)
    assert record["predicted"] == max(record["probabilities"], key=record["probabilities"].get)
    assert record["maps"][0]["label"] == record["predicted"]
    picture = np.asarray(Image.open(tmp_path / "out.png"))
    assert picture.shape == (75, 120, 3)


def test_probabilities_are_those_of_the_network(capsys, xray, four_class_run, tmp_path):
    trained = load_network(four_class_run)
    network, card = trained.network, trained.card
    with torch.no_grad():
        expected = card.probabilities(network(trained.preprocessing(read_xray(xray))[None]))[0]
    _, out, _ = call(capsys, "-i", xray, "-m", four_class_run, "-o", tmp_path, "--json")
    probabilities = json.loads(out)[0]["probabilities"]
    assert list(probabilities) == list(card.classes)
    np.testing.assert_allclose(list(probabilities.values()), expected.numpy(), atol=1e-4)


def test_first_page_of_a_tiff_is_answered_and_a_line_says_so(capsys, xray, four_class_run, tmp_path):
    first = Image.open(xray)
    first.save(tmp_path / "pages.tif", save_all=True, append_images=[Image.new("L", first.size)])
    _, plain, _ = call(capsys, "-i", xray, "-m", four_class_run, "-o", tmp_path, "--json")
    status, out, err = call(capsys, "-i", tmp_path / "pages.tif", "-m", four_class_run, "-o", tmp_path, "--json")
    assert (status, err) == (0, f"{tmp_path / 'pages.tif'} holds 2 images: the first is read\n")
    assert json.loads(out)[0]["probabilities"] == json.loads(plain)[0]["probabilities"]


def test_text_names_every_class_and_the_one_that_the_map_is_for(capsys, xray, four_class_run, tmp_path):
    status, out, _ = call(capsys, "-i", xray, "-m", four_class_run, "-l", "lung_opacity", "-o", tmp_path)
    assert status == 0
    for name in ("COVID-19", "Lung Opacity", "Normal", "Viral Pneumonia"):
        assert name in out
    assert "Grad-CAM for Lung Opacity" in out
    assert (tmp_path / "patient 7_cam.png").is_file()


def test_all_gives_one_map_per_class(capsys, xray, four_class_run, tmp_path):
    status, out, _ = call(capsys, "-i", xray, "-m", four_class_run, "-l", "all", "-o", tmp_path, "--json")
    assert status == 0
    written = [Path(entry["overlay"]).name for entry in json.loads(out)[0]["maps"]]
    assert written == [f"patient 7_cam_{name}.png" for name in ("covid19", "lungopacity", "normal", "viralpneumonia")]
    assert all((tmp_path / name).is_file() for name in written)


def test_xray_is_untouched_where_the_map_is_zero(capsys, noise, small_run, tmp_path):
    common = "-i", noise, "-m", small_run, "-l", "yes", "-o"
    call(capsys, *common, tmp_path / "o.png", "--alpha", "0.8")
    call(capsys, *common, tmp_path / "transparent.png", "--alpha", "0")
    grey = read_xray(noise)
    (map_,) = explain(load_network(small_run), grey, 1).maps
    zero = map_ == 0
    assert 0 < zero.mean() < 1
    picture, xray = pixels(tmp_path / "o.png"), np.repeat(grey[..., None], 3, 2)
    np.testing.assert_array_equal(picture[zero], xray[zero])
    assert np.abs(picture - overlay(grey, map_, alpha=0.8)).max() <= 1
    np.testing.assert_array_equal(pixels(tmp_path / "transparent.png"), xray)


def test_good_files_of_a_folder_are_answered_and_bad_files_are_named(capsys, xray, four_class_run, tmp_path):
    (xray.parent / "broken.png").write_bytes(b"no image")
    for name in ("scan.dcm", "a.txt", "b.txt", "c.txt"):
        (xray.parent / name).write_text("not looked at")
    (xray.parent / "patient 7_cam.png").write_bytes(xray.read_bytes())  # an X-ray with the name of an overlay
    call(capsys, "-i", xray, "-m", four_class_run, "-o", xray.parent / "any name.png")
    status, out, err = call(capsys, "-i", xray.parent, "-m", four_class_run, "-o", tmp_path / "out", "--json")
    assert status == 1
    assert err.splitlines() == [
        "overlay_cam.py: 1 skipped, overlays of this program: any name.png",
        "overlay_cam.py: 4 skipped, not PNG, JPEG, TIFF or BMP: a.txt, b.txt, c.txt and 1 more",
        f"overlay_cam.py: {xray.parent / 'broken.png'} is not an image that can be read: give a PNG, JPEG, TIFF or BMP",
        "overlay_cam.py: 1 of 3 images could not be done",
    ]
    records = {Path(record["image"]).name: record for record in json.loads(out)}
    assert "error" in records["broken.png"]
    assert sorted(path.name for path in (tmp_path / "out").glob("*.png")) == [
        "patient 7_cam.png",
        "patient 7_cam_cam.png",
    ]


def test_an_overlay_is_not_taken_for_an_xray(capsys, xray, four_class_run, tmp_path):
    overlays = [tmp_path / name for name in ("a.png", "b.jpg", "c.jpeg")]
    for path in overlays:
        assert call(capsys, "-i", xray, "-m", four_class_run, "-o", path)[0] == 0
    status, out, err = call(capsys, "-i", *overlays, "-m", four_class_run, "-o", tmp_path / "out")
    assert (status, out) == (2, "")
    assert err == "overlay_cam.py: no X-rays were given, but overlays of this program: a.png, b.jpg, c.jpeg\n"
    status, out, err = call(capsys, "-i", *overlays, xray, "-m", four_class_run, "-o", tmp_path / "out", "--json")
    assert [record["image"] for record in json.loads(out)] == [str(xray)]
    assert "3 skipped, overlays of this program" in err
    # Files with the mark can still be read.
    pictures = [pixels(path) for path in overlays]
    assert np.abs(pictures[0] - pictures[1]).mean() < 8
    np.testing.assert_array_equal(pictures[1], pictures[2])


def test_images_of_one_name_do_not_overwrite_each_other(capsys, xray, four_class_run, tmp_path):
    twin = tmp_path / "other" / xray.name
    twin.parent.mkdir()
    Image.fromarray(255 - read_xray(xray)).save(twin)
    status, out, _ = call(capsys, "-i", xray, twin, "-m", four_class_run, "-o", tmp_path / "out", "--json")
    assert status == 0
    overlays = [record["maps"][0]["overlay"] for record in json.loads(out)]
    assert len(set(overlays)) == 2
    assert all(Path(path).is_file() for path in overlays)


def test_numbered_names_do_not_collide_with_names_of_xrays(capsys, xray, four_class_run, tmp_path):
    inputs = []
    for name in ("a/x.png", "b/x.png", "c/x_2.png"):
        path = tmp_path / name
        path.parent.mkdir()
        path.write_bytes(xray.read_bytes())
        inputs.append(path)
    _, out, _ = call(capsys, "-i", *inputs, "-m", four_class_run, "-o", tmp_path / "out", "--json")
    overlays = {record["maps"][0]["overlay"] for record in json.loads(out)}
    assert len(overlays) == 3 == len(list((tmp_path / "out").glob("*.png")))


@pytest.mark.parametrize("kind", ["xray", "text", "empty", "folder", "hard link", "link", "dangling link"])
@pytest.mark.parametrize(("output", "overlay"), [("o.jpg", "o_yes.jpg"), ("out", "out/noise_cam_yes.png")])
def test_only_overlays_are_replaced(capsys, noise, small_run, tmp_path, kind, output, overlay):
    """A file of each kind is in the place of the second of two overlays."""
    (tmp_path / "out").mkdir()
    obstacle = tmp_path / overlay
    {
        "xray": lambda: obstacle.write_bytes(noise.read_bytes()),
        "text": lambda: obstacle.write_text("notes"),
        "empty": obstacle.touch,
        "folder": obstacle.mkdir,
        "hard link": lambda: obstacle.hardlink_to(noise),
        "link": lambda: obstacle.symlink_to(noise),
        "dangling link": lambda: obstacle.symlink_to(tmp_path / "gone"),
    }[kind]()
    before = {path: path.lstat() for path in tmp_path.rglob("*")}
    original = noise.read_bytes()
    arguments = "-i", noise, "-m", small_run, "-o", tmp_path / output, "-l", "all"
    status, out, err = call(capsys, *arguments)
    assert (status, out) == (2, "")
    assert err == (
        f"overlay_cam.py: {obstacle} is there and is no overlay of this program: move it, or give another -o\n"
    )
    after = {path: path.lstat() for path in tmp_path.rglob("*")}
    fields = ("st_ino", "st_size", "st_mtime_ns")
    assert [[getattr(s, k) for k in fields] for s in after.values()] == [
        [getattr(s, k) for k in fields] for s in before.values()
    ]
    assert list(after) == list(before)
    assert noise.read_bytes() == original


@pytest.mark.parametrize("name", ["o.png", "o.jpg"])
def test_an_overlay_is_replaced_by_a_new_one(capsys, noise, small_run, tmp_path, name):
    common = "-i", noise, "-m", small_run, "-o", tmp_path / name
    call(capsys, *common, "--alpha", "0")
    plain = pixels(tmp_path / name)
    assert call(capsys, *common, "--alpha", "0.9")[0] == 0
    assert np.abs(pixels(tmp_path / name) - plain).max() > 50


def test_labels_that_differ_only_in_punctuation_are_distinguished():
    card = ModelCard("resnet18", ("COVID+", "COVID-", "нет"), 32, (0, 0, 0), (1, 1, 1), "layer4")
    assert chosen_labels("COVID-", card) == [1]
    assert chosen_labels("нет", card) == [2]
    assert len(set(suffixes(chosen_labels("all", card), card))) == 3
    for unclear in ("covid", "да"):
        with pytest.raises(ValueError, match="unknown label"):
            chosen_labels(unclear, card)


def test_no_answer_is_status_2_and_one_failed_overlay_leaves_the_others(capsys, xray, four_class_run, tmp_path):
    bad = [tmp_path / f"{i}.png" for i in range(2)]
    for path in bad:
        path.write_bytes(b"no image")
    assert call(capsys, "-i", *bad, "-m", four_class_run, "-o", tmp_path / "o")[0] == 2
    twin = xray.with_name("other.png")
    twin.write_bytes(xray.read_bytes())
    (tmp_path / "o" / "other_cam.png").mkdir(parents=True)
    status, out, _ = call(capsys, "-i", xray, twin, "-m", four_class_run, "-o", tmp_path / "o", "--json")
    assert status == 1
    assert ["error" in record for record in json.loads(out)] == [False, True]
    assert (tmp_path / "o" / "patient 7_cam.png").is_file()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"-i": "gone.png"}, "no such file: gone.png"),
        ({"-i": "TEXT"}, "is not an image that can be read"),
        ({"-i": "EMPTY"}, "sub-folders are not searched; give PNG, JPEG, TIFF or BMP"),
        ({"-l": "tuberculosis"}, "choose from COVID-19, Lung Opacity, Normal, Viral Pneumonia or all"),
        ({"-m": "demo/alexnet"}, "run notebook 2"),
        ({"--colormap": "rainbows"}, "unknown colour map 'rainbows'"),
        ({"--method": "smoothgrad"}, f"unknown method 'smoothgrad': choose from {', '.join(METHODS)}"),
        ({"--layer": "layer9"}, "resnet18: no layer 'layer9' in this network: try one of layer"),
        ({"--layer": "fc"}, "resnet18: layer 'fc' gives no"),
        ({"--lungs": "EMPTY"}, "no lung model in"),
        ({"-o": "x.gif"}, ".png or .jpg"),
        ({"-o": "XRAY"}, "is no overlay of this program: move it, or give another -o"),
        ({"--device": "meta"}, "no device 'meta'"),
    ],
)
def test_a_mistake_is_one_line_with_a_remedy_and_status_2(capsys, xray, four_class_run, tmp_path, change, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.png").write_text("no image")
    stand_ins = {"TEXT": tmp_path / "text.png", "EMPTY": tmp_path / "empty", "XRAY": xray}
    change = {option: stand_ins.get(value, value) for option, value in change.items()}
    original = xray.read_bytes()
    options = {"-i": xray, "-m": four_class_run, "-o": tmp_path / "out"} | change
    status, out, err = call(capsys, *[part for option in options.items() for part in option])
    assert status == 2
    assert message in err
    assert err.count("\n") == 1
    assert out == ""
    assert xray.read_bytes() == original
    assert not (tmp_path / "out").exists()


def test_wrong_method_is_refused_before_a_network_is_loaded(capsys, xray, four_class_run, tmp_path):
    run = tmp_path / "damaged"
    run.mkdir()
    (run / "model.json").write_bytes((four_class_run / "model.json").read_bytes())
    (run / "model.safetensors").write_bytes(b"no weights")
    assert "is damaged" in call(capsys, "-i", xray, "-m", run)[2]
    assert "unknown method 'cam'" in call(capsys, "-i", xray, "-m", run, "--method", "cam")[2]


def test_alpha_out_of_range_is_refused(capsys, xray, four_class_run):
    status, _, err = call(capsys, "-i", xray, "-m", four_class_run, "--alpha", "2")
    assert (status, err) == (2, "overlay_cam.py: --alpha 2 is not between 0 and 1\n")


@pytest.mark.parametrize("share", ["0", "-0.5", "1.01", "nan"])
def test_share_for_boxes_out_of_range_is_refused(capsys, xray, four_class_run, share):
    status, _, err = call(capsys, "-i", xray, "-m", four_class_run, "--boxes", share)
    assert (status, err) == (2, f"overlay_cam.py: --boxes {share} must be above 0 and at most 1\n")


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
    runs = [run_of(tmp_path / f"run{seed}", untrained(seed, ("no", "yes"), head="sigmoid")) for seed in range(3)]
    single_records = [json.loads(call(capsys, "-i", noise, "-m", run, "-o", tmp_path, "--json")[1])[0] for run in runs]
    # A run that is named twice counts once.
    status, out, _ = call(capsys, "-i", noise, "-m", *runs, runs[0], "-o", tmp_path, "--json")
    (record,) = json.loads(out)
    assert status == 0
    assert record["networks"] == 3
    assert all("networks" not in member for member in single_records)
    expected = np.mean([list(member["probabilities"].values()) for member in single_records], axis=0)
    np.testing.assert_allclose(list(record["probabilities"].values()), expected, atol=1e-4)
    assert record["predicted"] == ("no", "yes")[expected.argmax()] == record["maps"][0]["label"]
    assert "mean of 3 networks" in call(capsys, "-i", noise, "-m", *runs, "-o", tmp_path)[1]


def test_runs_with_different_classes_are_refused_as_an_ensemble(capsys, noise, tmp_path):
    runs = [run_of(tmp_path / "".join(classes), untrained(0, classes)) for classes in (("a", "b"), ("b", "a"))]
    status, out, err = call(capsys, "-i", noise, "-m", *runs, "-o", tmp_path)
    assert (status, out) == (2, "")
    assert "an ensemble needs the same classes in the same order" in err


def test_mean_of_the_thresholds_decides_for_an_ensemble(capsys, noise, tmp_path):
    member = untrained(0, ("no", "yes"), head="sigmoid")
    with torch.no_grad():
        p = float(member.card.probabilities(member.network(member.preprocessing(read_xray(noise))[None]))[0, 1])
    runs = []
    for number, threshold in enumerate((p - 0.3, p + 0.1)):  # their mean lies 0.1 below p
        trained = untrained(0, ("no", "yes"), head="sigmoid", thresholds=(1 - threshold, threshold))
        runs.append(run_of(tmp_path / f"run{number}", trained))
    predicted = {}
    for key, chosen in {"low": runs[:1], "high": runs[1:], "both": runs}.items():
        out = call(capsys, "-i", noise, "-m", *chosen, "-o", tmp_path, "--json")[1]
        predicted[key] = json.loads(out)[0]["predicted"]
    assert predicted == {"low": "yes", "high": "no", "both": "yes"}


def test_findings_reach_their_thresholds(capsys, noise, tmp_path):
    names = ("Mass", "Edema", "Hernia")
    trained = untrained(2, names, head="sigmoid", multilabel=True)
    with torch.no_grad():
        probabilities = trained.card.probabilities(trained.network(trained.preprocessing(read_xray(noise))[None]))[0]
    thresholds = tuple(float(p) + shift for p, shift in zip(probabilities, (-0.01, 0.01, -0.01), strict=True))
    run = run_of(
        tmp_path / "run", trained._replace(card=untrained(2, names, multilabel=True, thresholds=thresholds).card)
    )
    record = json.loads(call(capsys, "-i", noise, "-m", run, "-o", tmp_path, "--json")[1])[0]
    np.testing.assert_allclose(list(record["probabilities"].values()), probabilities, atol=1e-4)
    assert record["findings"] == ["Mass", "Hernia"]
    assert "predicted" not in record
    assert record["maps"][0]["label"] == names[int(probabilities.argmax())]
    status, out, _ = call(capsys, "-i", noise, "-m", run, "-o", tmp_path, "-l", "all")
    assert status == 0
    assert "Findings: Mass, Hernia" in out
    assert out.count("Grad-CAM for") == 3


def always(folder, probabilities, thresholds=None, *, multilabel=False):
    """Return a run whose network gives every image the same probabilities and an empty map."""
    names = ("Mass", "Edema", "Hernia")[: len(probabilities)]
    head = {"head": "sigmoid", "multilabel": True} if multilabel else {}
    trained = untrained(0, names, thresholds=thresholds, **head)
    for parameter in trained.network.parameters():
        parameter.data.zero_()
    p = torch.tensor(probabilities)
    last = [module for module in trained.network.modules() if isinstance(module, torch.nn.Linear)][-1]
    last.bias.data.copy_(p.logit() if multilabel else p.log())
    return run_of(folder, trained)


def test_deciding_threshold_explains_an_empty_map(capsys, noise, tmp_path):
    run = always(tmp_path / "run", (0.69, 0.31), (None, 0.24))
    record, text = answered(capsys, "-i", noise, "-m", run, "-o", tmp_path / "o.png")
    assert record["predicted"] == "Edema"
    assert record["thresholds"] == {"Mass": None, "Edema": 0.24}
    assert text.splitlines()[1:] == [
        "  Mass   0.690",
        "  Edema  0.310  (decision threshold 0.240)",
        "  Predicted: Edema (Edema's probability 0.310 reaches its decision threshold 0.240)",
        "  Grad-CAM for Edema (empty: nothing in the image speaks for it; it is predicted because its decision "
        f"threshold is low): {tmp_path / 'o.png'}",
    ]


@pytest.mark.parametrize("thresholds", [(0.7, None), (0.3, 0.7)])  # older cards have two: class 1 decides
def test_class_without_a_threshold_is_predicted_if_the_other_misses_its_own(capsys, noise, tmp_path, thresholds):
    name, probability = ("Mass", 0.69) if thresholds[1] is None else ("Edema", 0.31)
    run = always(tmp_path / "run", (0.69, 0.31), thresholds)
    record, text = answered(capsys, "-i", noise, "-m", run, "-o", tmp_path / "o.png")
    assert record["predicted"] == ("Edema" if thresholds[1] is None else "Mass")
    line = f"({name}'s probability {probability:.3f} is below its decision threshold 0.700)"
    assert f"  Predicted: {record['predicted']} {line}\n" in text


def test_findings_without_a_probability_or_threshold_are_never_predicted(capsys, noise, tmp_path):
    run = always(tmp_path / "run", (0.6, 0.9, 0.8), (0.5, None, None), multilabel=True)
    card = json.loads((run / "model.json").read_text())
    (run / "model.json").write_text(json.dumps(card | {"unreported": ["Edema"]}))
    record, text = answered(capsys, "-i", noise, "-m", run, "-o", tmp_path / "o.png")
    assert record["findings"] == ["Mass"]
    assert record["probabilities"] == {"Mass": 0.6, "Edema": None, "Hernia": 0.8}
    assert record["thresholds"] == {"Mass": 0.5, "Edema": None, "Hernia": None}
    assert text.splitlines()[1:4] == [
        "  Hernia  0.800  (no decision: all of the validation images have it, or none)",
        "  Mass    0.600  (decision threshold 0.500)",
        "  Edema   –      (not reported: all of the training images have it, or none)",
    ]
    assert main(["-i", str(noise), str(noise.parent), "-m", str(run), "-o", str(tmp_path / "many")]) == 0
    with (tmp_path / "many" / "predictions.csv").open(newline="") as file:
        row = next(csv.DictReader(file))
    assert (row["findings"], row["Mass"], row["Edema"], row["Hernia"]) == ("Mass", "0.6000", "", "0.8000")


def test_finding_that_is_not_reported_has_no_map(capsys, noise, tmp_path):
    card = untrained(0, ("Mass", "Edema", "Hernia"), multilabel=True, unreported=("Edema",))
    run = run_of(tmp_path / "run", card)
    out = tmp_path / "out"
    status, _, err = call(capsys, "-i", noise, "-m", run, "-o", out, "-l", "edema")
    assert (status, len(err.splitlines())) == (2, 1)
    assert "no map of Edema: not reported, because all training images have it, or none" in err
    assert not out.exists()
    record, _ = answered(capsys, "-i", noise, "-m", run, "-o", out, "-l", "all")
    assert [entry["label"] for entry in record["maps"]] == ["Mass", "Hernia"]
    assert {path.name for path in out.iterdir()} == {"noise_cam_mass.png", "noise_cam_hernia.png"}
    call(capsys, "-i", noise, "-m", run, "-o", tmp_path / "hernia.png", "-l", "Hernia")
    np.testing.assert_array_equal(pixels(tmp_path / "hernia.png"), pixels(out / "noise_cam_hernia.png"))


def test_finding_is_shown_beside_its_threshold(capsys, noise, tmp_path):
    run = always(tmp_path / "run", (0.3, 0.25, 0.1), (0.2, 0.5, 0.5), multilabel=True)
    record, text = answered(capsys, "-i", noise, "-m", run, "-o", tmp_path / "o.png")
    assert record["findings"] == ["Mass"]
    assert record["thresholds"] == {"Mass": 0.2, "Edema": 0.5, "Hernia": 0.5}
    assert "  Mass    0.300  (decision threshold 0.200)\n" in text
    assert "  Edema   0.250  (decision threshold 0.500)\n" in text
    assert "  Findings: Mass (by their thresholds; these probabilities are not calibrated)\n" in text
    assert "speaks for it; it is predicted because its decision threshold is low)" in text


@pytest.mark.parametrize(
    ("probability", "threshold", "compared", "shown"),
    [
        (0.31, 0.3099, "reaches", ("0.3100", "0.3099")),
        (0.31, 0.3100002, "is below", ("0.3100000", "0.3100002")),
        (0.30998, 0.31, "is below", ("0.30998", "0.31000")),
    ],
)
def test_probability_and_threshold_get_enough_digits_to_differ(
    capsys, noise, tmp_path, probability, threshold, compared, shown
):
    run = always(tmp_path / "run", (1 - probability, probability), (None, threshold))
    record, text = answered(capsys, "-i", noise, "-m", run, "-o", tmp_path / "o.png")
    assert record["predicted"] == ("Edema" if compared == "reaches" else "Mass")
    assert record["thresholds"]["Edema"] == threshold
    assert (record["probabilities"]["Edema"] >= threshold) == (compared == "reaches")
    assert f"  Edema  {shown[0]}  (decision threshold {shown[1]})\n" in text
    assert f"(Edema's probability {shown[0]} {compared} its decision threshold {shown[1]})\n" in text


def test_network_without_thresholds_shows_none(capsys, noise, tmp_path):
    record, text = answered(capsys, "-i", noise, "-m", always(tmp_path / "run", (0.6, 0.4)), "-o", tmp_path / "o.png")
    assert "thresholds" not in record
    assert "decision threshold" not in text
    assert "(empty: nothing in the image speaks for it): " in text


def test_warning_is_one_line_on_stderr_and_not_in_the_json(capsys, noise, small_run, tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1500)  # the image has 2000; Pillow warns up to twice the limit
    status, out, err = call(capsys, "-i", noise, "-m", small_run, "-o", tmp_path / "o.png", "--json")
    assert status == 0
    assert len(json.loads(out)) == 1
    assert err.count("\n") == 1
    assert err.startswith("overlay_cam.py: WARNING Image size (2000 pixels) exceeds limit")


class HalfMask:
    """A lung masking that keeps an X-ray's left half, and finds no lungs in bright X-rays."""

    def mask_of(self, xray):
        return namedtuple("Mask", "mask reason")(xray < 0, "no lung found" if xray.mean() > 200 else None)

    def __call__(self, xray):
        return xray if self.mask_of(xray).reason else xray * (np.arange(xray.shape[1]) < 25).astype(np.uint8)


def test_record_says_whether_the_lungs_were_masked(noise, tmp_path):
    masked = untrained(0, ("no", "yes"), lung_masking=True)._replace(lungs=HalfMask())
    bright = tmp_path / "bright.png"
    Image.fromarray(np.full((40, 50), 250, np.uint8)).save(bright)
    options = MapOptions("gradcam", None, 0.5, "plasma", None, False)
    question = Question([masked], "top", options)
    records = [answer(question, path, [tmp_path / "o.png"]) for path in (noise, bright)]
    assert [record["lungs"] for record in records] == ["masked", "kept whole: no lung found"]
    plain = untrained(0, ("no", "yes"))
    assert "lungs" not in answer(Question([plain], "top", options), noise, [tmp_path / "o.png"])


# --- method, layer, boxes, bar ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small_run(tmp_path_factory):
    """A network of random weights in a study's folder; not to be changed."""
    return run_of(tmp_path_factory.mktemp("runs") / "study" / "small_cnn", untrained(0, ("no", "yes")))


def answered(capsys, *arguments):
    """Return the record and the text of a call for one image that succeeds."""
    status, out, err = call(capsys, *arguments, "--json")
    assert (status, err) == (0, "")
    (record,) = json.loads(out)
    return record, call(capsys, *arguments)[1]


def pixels(path):
    return np.asarray(Image.open(path)).astype(int)


def test_ctrl_c_before_the_first_image_is_one_line_and_status_130(capsys, noise, small_run, tmp_path, monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(overlay_cam, "load_network", interrupted)
    status, text, err = call(capsys, "-i", noise, "-m", small_run, "-o", tmp_path)
    assert (status, text, err) == (130, "", "overlay_cam.py: stopped before the first image\n")


@pytest.mark.parametrize(
    ("options", "method", "layer", "name"),
    [
        ((), "gradcam", None, "Grad-CAM for no:"),
        (("--method", "LayerCAM"), "layercam", None, "LayerCAM for no:"),
        (("--layer", "features.1.relu"), "gradcam", "features.1.relu", "Grad-CAM (features.1.relu) for no:"),
        (
            ("--method", "gradcam++", "--layer", "features.1.relu", "features.4.relu"),
            "gradcam++",
            ("features.1.relu", "features.4.relu"),
            "Grad-CAM++ (features.1.relu + features.4.relu) for no:",
        ),
    ],
)
def test_overlay_shows_the_map_of_the_named_method_and_layers(
    capsys, noise, small_run, tmp_path, options, method, layer, name
):
    record, text = answered(capsys, "-i", noise, "-m", small_run, "-o", tmp_path / "o.png", "-l", "no", *options)
    trained, grey = load_network(small_run), read_xray(noise)
    expected = overlay(grey, explain(trained, grey, 0, method=method, layer=layer).maps[0])
    assert np.abs(pixels(tmp_path / "o.png") - expected).max() <= 1
    plain = overlay(grey, explain(trained, grey, 0).maps[0])
    assert (np.abs(plain.astype(int) - expected).max() > 20) == bool(options)  # the options change the map
    assert name in text
    assert record["method"] == method
    assert record.get("layers", []) == list(options[options.index("--layer") + 1 :] if layer else [])


def test_layer_must_be_in_every_network_of_an_ensemble(capsys, noise, small_run, four_class_run, tmp_path):
    with_same_classes = untrained(1, tuple(load_network(four_class_run).card.classes))
    runs = [four_class_run, run_of(tmp_path / "same", with_same_classes)]
    status, out, err = call(capsys, "-i", noise, "-m", *runs, "-o", tmp_path / "out", "--layer", "layer4")
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert "small_cnn: no layer 'layer4'" in err
    assert not (tmp_path / "out").exists()


def test_a_layer_of_one_cell_is_no_map(capsys, noise, four_class_run, tmp_path):
    options = "-i", noise, "-m", four_class_run, "-o", tmp_path / "out", "--layer", "avgpool"
    status, out, err = call(capsys, *options)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert "layer 'avgpool' has one cell" in err
    assert not (tmp_path / "out").exists()


def test_eigen_cam_has_no_class_and_takes_no_label(capsys, noise, small_run, tmp_path):
    common = "-i", noise, "-m", small_run, "-o", tmp_path / "o.png", "--method", "EigenCAM"
    _, text = answered(capsys, *common)
    assert "Eigen-CAM of no class" in text
    status, out, err = call(capsys, *common, "-l", "all")
    assert (status, out) == (2, "")
    assert "leave out -l" in err


def test_an_overlay_that_cannot_be_put_in_place_leaves_nothing_behind(capsys, noise, small_run, tmp_path):
    (tmp_path / f"{noise.stem}_cam.png").mkdir()  # a folder of that name
    status, _, err = call(capsys, "-i", noise, "-m", small_run, "-o", tmp_path)
    assert status == 2
    assert err.count("\n") == 1
    assert not [file for file in tmp_path.iterdir() if file.name.endswith(".tmp")]


def test_peak_is_the_maximum_of_the_raw_map_and_null_where_there_is_no_common_scale(capsys, noise, small_run, tmp_path):
    trained = load_network(small_run)
    with GradCAM(trained.network) as cam:
        raw = cam(trained.preprocessing(read_xray(noise))[None], "all").raw[0].amax(dim=(1, 2))
    common = "-i", noise, "-o", tmp_path, "-l", "all", "-m", small_run
    record, _ = answered(capsys, *common)
    np.testing.assert_allclose([entry["peak"] for entry in record["maps"]], raw, rtol=1e-5)
    two_layers, _ = answered(capsys, *common, "--layer", "features.1.relu", "features.4.relu")
    two_runs, _ = answered(capsys, *common, run_of(tmp_path / "other", untrained(1, ("no", "yes"))))
    assert [e["peak"] for record in (two_layers, two_runs) for e in record["maps"]] == [None] * 4


def test_boxes_of_the_map_are_white_in_the_picture_and_listed_in_the_record(capsys, noise, small_run, tmp_path):
    layer = "features.1.relu"  # has small cells, so its map has several regions
    common = "-i", noise, "-m", small_run, "-l", "no", "--layer", layer
    answered(capsys, *common, "-o", tmp_path / "plain.png")
    record, text = answered(capsys, *common, "-o", tmp_path / "boxes.png", "--boxes", "0.8")
    (map_,) = explain(load_network(small_run), read_xray(noise), 0, layer=layer).maps
    boxes = boxes_from_map(map_, 0.8)
    assert len(boxes) > 1
    np.testing.assert_allclose(record["maps"][0]["boxes"], boxes, atol=5.1e-5)
    assert f" for no, {len(boxes)} regions above 0.8 of its maximum: " in text
    expected = pixels(tmp_path / "plain.png")
    for left, top, width, height in (boxes * (50, 40, 50, 40)).round().astype(int):
        right, bottom = left + width - 1, top + height - 1
        expected[[top, bottom], left : right + 1] = 255
        expected[top : bottom + 1, [left, right]] = 255
    np.testing.assert_array_equal(pixels(tmp_path / "boxes.png"), expected)


def test_boxes_without_a_number_use_half_the_maximum(capsys, noise, small_run, tmp_path):
    common = "-m", small_run, "-o", tmp_path, "-i", noise
    assert "boxes" not in answered(capsys, *common)[0]["maps"][0]
    half, text = answered(capsys, "--boxes", *common)
    assert half == answered(capsys, *common, "--boxes", "0.5")[0]
    assert "above 0.5 of its maximum" in text


def test_colour_bar_widens_the_picture_and_leaves_its_pixels(capsys, noise, small_run, tmp_path):
    common = "-i", noise, "-m", small_run, "--boxes", "--colormap", "turbo", "--alpha", "0.8"
    bare, _ = answered(capsys, *common, "-o", tmp_path / "bare.png")
    with_bar, _ = answered(capsys, *common, "-o", tmp_path / "bar.png", "--bar")
    picture, widened = pixels(tmp_path / "bare.png"), pixels(tmp_path / "bar.png")
    assert picture.shape == (40, 50, 3)
    assert widened.shape[0] == 40
    assert widened.shape[1] > 60
    np.testing.assert_array_equal(widened[:, :50], picture)
    assert with_bar["maps"][0]["boxes"] == bare["maps"][0]["boxes"]  # fractions of the X-ray without the bar


def test_colour_bar_of_an_ensemble_goes_from_0_to_1(capsys, noise, small_run, tmp_path):
    other = run_of(tmp_path / "other", untrained(1, ("no", "yes")))
    answered(capsys, "-i", noise, "-m", small_run, other, "-o", tmp_path / "o.png", "--bar")
    black = np.zeros((40, 50, 3), dtype=np.uint8)
    np.testing.assert_array_equal(pixels(tmp_path / "o.png")[:, 50:], with_colour_bar(black)[:, 50:])


# --- the share inside the lungs --------------------------------------------------------------------------


def dark_is_lung():
    """A U-Net with weights made by hand: pixels that are darker than the X-ray's mean are lung.

    Only the shallowest skip connection reaches the output. Its first channel takes every second pixel.
    """
    network = unet("resnet18").eval()
    for module in (*network.decoder.modules(), network.encoder.conv1, network.segmentation_head[0]):
        if isinstance(module, torch.nn.Conv2d):
            module.weight.data.zero_()
    network.encoder.conv1.weight.data[0, 0, 3, 3] = -1
    *_, skipped, last = network.decoder.blocks
    skip = skipped.conv1[0].in_channels - network.encoder.conv1.out_channels
    skipped.conv1[0].weight.data[0, skip, 1, 1] = 1
    for convolution in (skipped.conv2[0], last.conv1[0], last.conv2[0]):
        convolution.weight.data[0, 0, 1, 1] = 1
    network.segmentation_head[0].weight.data[0, 0, 1, 1] = 10
    network.segmentation_head[0].bias.data.fill_(-1)
    return LungSegmenter(network, "resnet18", 64)


@pytest.fixture(scope="module")
def lung_runs(tmp_path_factory):
    """A folder of runs with the network study/small_cnn and a lung model beside it; not to be changed."""
    runs = tmp_path_factory.mktemp("with lungs")
    run_of(runs / "study" / "small_cnn", untrained(0, ("no", "yes")))
    save_segmenter(runs / "lungs", dark_is_lung())
    return runs


LUNGS = np.zeros((64, 64), dtype=bool)
LUNGS[12:52, 8:26] = LUNGS[12:50, 38:58] = True


@pytest.fixture
def chest(tmp_path):
    """Two dark lungs in a noisy bright chest."""
    noise = np.random.default_rng(1).integers(0, 60, (64, 64))
    path = tmp_path / "chest.png"
    Image.fromarray(np.where(LUNGS, noise, 255 - noise).astype(np.uint8)).save(path)
    return path


def test_share_inside_the_lungs_is_that_of_the_model_beside_the_studies(capsys, chest, lung_runs, tmp_path):
    run = lung_runs / "study" / "small_cnn"
    record, text = answered(capsys, "-i", chest, "-m", run, "-o", tmp_path, "-l", "all")
    maps = explain(load_network(run), read_xray(chest), "all").maps
    shares = [map_[LUNGS].sum() / map_.sum() for map_ in maps]
    assert min(shares) > 0.05
    assert max(shares) < 0.95
    np.testing.assert_allclose([entry["in_lungs"] for entry in record["maps"]], shares, atol=1e-4)
    assert f"Grad-CAM for no, {100 * shares[0]:.0f} % of it inside the lungs: " in text
    assert "Lungs:" not in text  # the lungs were found, and the network does not mask them


def test_lungs_none_leaves_out_the_lungs(capsys, chest, lung_runs, tmp_path):
    run = lung_runs / "study" / "small_cnn"
    record, text = answered(capsys, "-i", chest, "-m", run, "-o", tmp_path, "--lungs", "none")
    assert "in_lungs" not in record["maps"][0]
    assert "Lungs:" not in text
    assert "inside the lungs" not in text


def test_lung_model_that_is_named_is_used(capsys, chest, small_run, lung_runs, tmp_path):
    common = "-i", chest, "-m", small_run, "-o", tmp_path
    assert "in_lungs" not in answered(capsys, *common)[0]["maps"][0]  # no lung model is beside this run
    record, _ = answered(capsys, *common, "--lungs", lung_runs / "lungs")
    (map_,) = explain(load_network(small_run), read_xray(chest)).maps
    assert record["maps"][0]["in_lungs"] == pytest.approx(map_[LUNGS].sum() / map_.sum(), abs=1e-4)


def test_implausible_lungs_give_a_reason_and_no_share(capsys, lung_runs, tmp_path):
    plain = tmp_path / "plain.png"  # nothing is darker than the mean
    Image.fromarray(np.full((64, 64), 90, dtype=np.uint8)).save(plain)
    record, text = answered(capsys, "-i", plain, "-m", lung_runs / "study" / "small_cnn", "-o", tmp_path)
    assert record["maps"][0]["in_lungs"] is None
    assert record["lungs"] == "not found (no lung found)"
    assert "\n  Lungs: not found (no lung found)\n" in text
    assert "inside the lungs" not in text


def test_damaged_lung_model_gives_one_line_and_no_shares(capsys, chest, tmp_path):
    small_run = run_of(tmp_path / "runs" / "study" / "small_cnn", untrained(0, ("no", "yes")))
    beside = small_run.parent.parent / "lungs"
    beside.mkdir()
    (beside / "model.json").write_text("{}")
    (beside / "model.safetensors").write_bytes(b"no weights")
    common = "-i", chest, chest, "-m", small_run, "-o", tmp_path / "out"
    status, out, err = call(capsys, *common, "--json")
    assert (status, err.count("\n")) == (0, 1)
    assert "shares inside the lungs are left out" in err
    assert "in_lungs" not in json.loads(out)[0]["maps"][0]
    status, out, err = call(capsys, *common, "--lungs", beside)  # an error, because --lungs names the model
    assert (status, out, err.count("\n")) == (2, "", 1)


def test_a_line_says_that_a_lung_model_knows_only_the_phantom(capsys, noise, lung_runs, tmp_path):
    lungs = load_segmenter(lung_runs / "lungs")
    save_segmenter(tmp_path / "lungs", replace(lungs, origin={"data": "synthetic phantom"}))
    run = lung_runs / "study" / "small_cnn"
    common = ("-i", noise, "-m", run, "-o", tmp_path / "o.png", "--lungs", tmp_path / "lungs")
    assert call(capsys, *common)[2] == (
        "overlay_cam.py: the lungs are outlined by a lung model that knows the synthetic phantom only\n"
    )


def test_network_that_masks_lungs_uses_its_own_lung_model_for_the_share(capsys, chest, lung_runs, tmp_path):
    run = run_of(tmp_path / "runs" / "study" / "masked", untrained(0, ("no", "yes"), lung_masking=True))
    (run / "lungs").symlink_to(lung_runs / "lungs")
    record, text = answered(capsys, "-i", chest, "-m", run, "-o", tmp_path)
    (map_,) = explain(load_network(run), read_xray(chest)).maps
    assert record["maps"][0]["in_lungs"] == pytest.approx(map_[LUNGS].sum() / map_.sum(), abs=1e-4)
    assert text.count("Lungs: masked") == 1 == text.count("Lungs:")


def test_empty_map_has_no_share_no_boxes_and_a_bar_with_the_number_0(capsys, chest, lung_runs, tmp_path):
    trained = untrained(0, ("no", "yes"))
    for parameter in trained.network.parameters():
        parameter.data.zero_()
    run = run_of(tmp_path / "zero", trained)
    options = "--boxes", "--bar", "--lungs", lung_runs / "lungs"
    record, text = answered(capsys, "-i", chest, "-m", run, "-o", tmp_path / "o.png", *options)
    (entry,) = record["maps"]
    assert (entry["empty"], entry["peak"], entry["boxes"], entry["in_lungs"]) == (True, 0, [], None)
    assert "Grad-CAM for no (empty: nothing in the image speaks for it): " in text
    grey = np.repeat(read_xray(chest)[..., None], 3, axis=2)
    np.testing.assert_array_equal(pixels(tmp_path / "o.png"), with_colour_bar(grey, peak=0))


HEAVY_PACKAGES = (
    *("pandas", "sklearn", "scipy", "matplotlib", "seaborn", "pydantic", "accelerate", "timm", "filelock"),
    "segmentation_models_pytorch",
)


@pytest.mark.slow
def test_one_xray_is_answered_without_a_heavy_import(noise, small_run, tmp_path):
    code = "import sys, overlay_cam; overlay_cam.main(sys.argv[1:]); print(*sys.modules)"
    options = ["--device", "cpu", "-i", noise, "-m", small_run, "-o", tmp_path / "o.png", "--boxes", "--bar"]
    out = subprocess.run(
        [sys.executable, "-c", code, *options], cwd=PROJECT, capture_output=True, text=True, check=True
    ).stdout
    assert "Grad-CAM for" in out  # the X-ray was answered
    imported = set(out.splitlines()[-1].split())
    assert imported.isdisjoint({*HEAVY_PACKAGES, "lungs", "training", "studies", "evaluation", "datasets"})


def test_heavy_packages_are_installed():
    """The test above cannot fail for a package that is not installed."""
    for name in HEAVY_PACKAGES:
        assert importlib.util.find_spec(name) is not None, name
