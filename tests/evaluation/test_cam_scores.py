"""Scores of maps on the phantom, where the answers are known, and the tables of these scores."""

import copy

import cv2
import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from cams.methods import METHODS
from datasets.phantom import CLASSES, draw_phantoms
from datasets.table import XrayTable, no_boxes
from evaluation import cam_scores
from evaluation.cam_scores import score_maps
from evaluation.faithfulness import ClassifiedImages, deletion_insertion, masked_confidence
from evaluation.intervals import bootstrap_mean
from evaluation.localization import best_overlap, overlap_table
from evaluation.map_cases import MapCase, map_cases
from evaluation.map_summary import case_counts, mean_agreement, readable, summary
from evaluation.predictions import Predictions
from evaluation.randomisation import random_network, randomised, rank_correlation, verdict
from evaluation.traps import erased
from inference.explanations import cam_of
from inference.trained_networks import ModelCard, TrainedNetwork
from lungs.masking import LungMask
from networks import ARCHITECTURES, Architecture
from studies.settings import Maps
from utils import read_xray

pytestmark = pytest.mark.slow  # two networks are trained
SIZE, ILL = 96, "COVID-19"


def chests(count, first, *, marker):
    """Return phantoms and their labels: half of them are ill; the ill ones may have a marker in the corner."""
    labels = np.tile([CLASSES.index("Normal"), CLASSES.index(ILL)], count // 2)
    patients = np.arange(first, first + count)
    shortcut = ILL if marker else None
    drawn = draw_phantoms(labels, seed=0, patients=patients, size=SIZE, shortcut_class=shortcut)
    return drawn, torch.tensor(labels == CLASSES.index(ILL)).long()


def tiny_network():
    parts = []
    for before, after in ((3, 16), (16, 32), (32, 64)):
        parts += [nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
        parts += [nn.MaxPool2d(2)]
    parts += [nn.Conv2d(64, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    network = nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 2))
    network.cam_layer = "14"
    return network


@pytest.fixture(scope="module", autouse=True)
def tiny_is_an_architecture():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ARCHITECTURES, "tiny", Architecture("Tiny", tiny_network, "17", "14", classifier="17"))
        yield


@pytest.fixture(autouse=True)
def two_random_networks(monkeypatch):
    monkeypatch.setattr(cam_scores, "NETWORKS", 2)


def card(**fields):
    values = {
        "architecture": "tiny",
        "classes": ("Normal", ILL),
        "image_size": SIZE,
        "mean": (0.5,) * 3,
        "std": (0.25,) * 3,
        "cam_layer": "14",
    }
    return ModelCard(**(values | fields))


def trained_on(marker):
    """Return a network that has learnt to tell ill phantoms, with or without a marker, from normal ones."""
    drawn, labels = chests(160, 0, marker=marker)
    preprocessing = TrainedNetwork(None, card()).preprocessing
    images = torch.stack([preprocessing(image) for image in drawn.images])
    torch.manual_seed(0)
    network, epochs = tiny_network(), 7
    optimiser = torch.optim.Adam(network.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 3e-3, total_steps=epochs * 10)
    for _ in range(epochs):
        for batch in torch.randperm(len(images)).split(16):
            loss = nn.functional.cross_entropy(network(images[batch]), labels[batch])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
    return TrainedNetwork(network.eval(), card())


@pytest.fixture(scope="module")
def marked_cases(tmp_path_factory):
    """Return 24 ill phantoms with the marker, of patients that no network has seen, as files and as arrays."""
    folder = tmp_path_factory.mktemp("marked")
    drawn, labels = chests(48, 5000, marker=True)
    cases = []
    for i in np.flatnonzero(labels.numpy()):
        names = {kind: str(folder / f"{i}_{kind}.png") for kind in ("image", "lesion", "lung")}
        cv2.imwrite(names["image"], drawn.images[i])
        cv2.imwrite(names["lesion"], 255 * drawn.lesion_masks[i].astype(np.uint8))
        cv2.imwrite(names["lung"], 255 * drawn.lung_masks[i].astype(np.uint8))
        cases.append(MapCase(names["image"], f"p{i}", 1, ILL, names["lesion"], names["lung"]))
    ill = labels.numpy() == 1
    return cases, drawn.images[ill], drawn.shortcut_masks[ill]


@pytest.fixture(scope="module")
def cheat():
    return trained_on(marker=True)


@pytest.fixture(scope="module")
def honest():
    return trained_on(marker=False)


def probability(trained, xrays):
    with torch.inference_mode():
        logits = trained.network(torch.stack([trained.preprocessing(xray) for xray in xrays]))
    return trained.card.probabilities(logits)[:, 1].numpy()


def test_scores_tell_a_network_that_learnt_the_marker_from_one_that_did_not(cheat, honest, marked_cases):
    cases, xrays, markers = marked_cases
    share, lost = {}, {}
    for name, trained in (("cheat", cheat), ("honest", honest)):
        scores = score_maps(trained, cases, Maps(methods=["gradcam"], faithful=2, steps=4), seed=0)
        table = summary(scores, rng=np.random.default_rng(0))
        share[name] = table.loc["Grad-CAM", "share in lungs"]
        chance = table.loc["uniform", "share in lungs"].estimate
        without = [erased(xray, marker) for xray, marker in zip(xrays, markers, strict=True)]
        lost[name] = (probability(trained, xrays) - probability(trained, without)).mean()
    assert share["cheat"].high < chance < share["honest"].low
    assert lost["cheat"] > 0.15
    assert abs(lost["honest"]) < 0.05


def test_scores_are_those_of_the_maps_computed_by_hand(honest, marked_cases):
    cases = marked_cases[0][:5]
    scores = score_maps(honest, cases, Maps(methods=["gradcam", "layercam"], faithful=3, steps=4), seed=0)
    kinds = ["Grad-CAM", "LayerCAM", "another patient's", "centred Gaussian", "uniform"]
    assert list(scores.located["map"].unique()) == list(scores.faithful["map"].unique()) == kinds
    case = cases[3]
    xray = cv2.imread(case.path, cv2.IMREAD_GRAYSCALE)
    lung, lesion = (cv2.imread(path, cv2.IMREAD_GRAYSCALE) > 0 for path in (case.lung, case.lesion))
    with cam_of(honest, "layercam") as cam:
        map_ = cam(honest.preprocessing(xray)[None], 1).upsampled(xray.shape)[0, 0].numpy()
    row = scores.located[(scores.located["map"] == "LayerCAM") & (scores.located["path"] == case.path)].iloc[0]
    assert row["in_lungs"] == pytest.approx(map_[lung].sum() / map_.sum(), rel=1e-4)
    assert row["in_lesion"] == pytest.approx(map_[lesion].sum() / map_.sum(), rel=1e-4)
    assert row["peak"] == lesion[np.unravel_index(map_.argmax(), map_.shape)]
    uniform = scores.located[scores.located["map"] == "uniform"]
    assert uniform[uniform["path"] == case.path]["in_lungs"].item() == pytest.approx(lung.mean())
    # Average Drop of Grad-CAM by hand: the image is multiplied by its map.
    row = scores.faithful[scores.faithful["map"] == "Grad-CAM"].iloc[0]
    xray = cv2.imread(row["path"], cv2.IMREAD_GRAYSCALE)
    image = honest.preprocessing(xray)[None]
    with cam_of(honest) as cam:
        masked = image * cam(image, 1).upsampled((SIZE, SIZE))
    with torch.no_grad():
        whole, of_masked = (honest.network(x).softmax(1)[0, 1].item() for x in (image, masked))
    assert row["drop"] == pytest.approx(max(0, whole - of_masked) / whole, abs=1e-4)
    assert set(scores.faithful["path"]) == set(scores.randomised["path"])
    assert scores.faithful["path"].nunique() == 3


def test_scores_of_faithfulness_are_those_of_its_functions(honest, marked_cases):
    cases = marked_cases[0][:4]  # the network runs again on all
    scores = score_maps(honest, cases, Maps(methods=["layercam"], faithful=4, steps=4), seed=0)
    images = torch.stack([honest.preprocessing(read_xray(case.path)) for case in cases])
    with cam_of(honest, "layercam") as cam:
        trained_maps = cam(images, 1)
    ones = torch.ones(4, dtype=torch.long)
    subject = ClassifiedImages(lambda batch: honest.network(batch).softmax(1), images, ones, torch.zeros_like(images))
    maps = trained_maps.upsampled((SIZE, SIZE))[:, 0]
    areas, confidence = deletion_insertion(subject, maps, steps=4, seed=0), masked_confidence(subject, maps)
    layercam = scores.faithful[scores.faithful["map"] == "LayerCAM"]
    for name, values in (areas | confidence).items():
        np.testing.assert_allclose(layercam[name], values, atol=1e-6)
    assert np.abs(areas["deletion"] - areas["insertion"]).min() > 1e-3
    after_head = scores.randomised[scores.randomised["stage"] == 0]
    assert after_head.groupby("network").size().tolist() == [4] * 2
    seeds = np.random.SeedSequence(0).generate_state(2)
    for number in (0, 1):
        fresh = random_network(honest.card, images, seed=int(seeds[number]))
        _, head_random = next(randomised(honest.network, fresh, images[:1]))
        with cam_of(honest._replace(network=head_random), "layercam") as cam:
            expected = rank_correlation(cam(images, 1).raw[:, 0], trained_maps.raw[:, 0])
        rows = after_head[after_head["network"] == number]
        np.testing.assert_allclose(rows["correlation"], expected, atol=1e-6)
        np.testing.assert_allclose(rows["agreement"], np.abs(expected), atol=1e-6)


def test_no_random_network_is_the_one_that_the_training_started_from(marked_cases):
    cases = marked_cases[0][:4]  # the network runs again on all
    images = torch.stack([TrainedNetwork(None, card()).preprocessing(read_xray(case.path)) for case in cases])
    start = random_network(card(), images, seed=3)
    scores = score_maps(TrainedNetwork(start, card()), cases, Maps(methods=["eigencam"], faithful=4, steps=1), seed=3)
    last = scores.randomised[scores.randomised["share"] == 1]
    assert last.groupby("network")["agreement"].mean().max() < 0.95


def agreements(rng, *, mean, images=8):
    """Return (10, images) agreements with standard deviations 0.12 (networks), 0.06 (images), 0.06 (both together)."""
    return (
        mean
        + 0.12 * rng.standard_normal((10, 1))
        + 0.06 * rng.standard_normal(images)
        + 0.06 * rng.standard_normal((10, images))
    )


def over_patients_alone(agreement, rng):
    return bootstrap_mean(agreement[:3].mean(axis=0), range(agreement.shape[1]), rng=rng)


def test_the_interval_of_agreement_covers_other_random_networks_and_patients():
    rng, contains_mean = np.random.default_rng(0), []
    for _ in range(300):
        agreement = agreements(rng, mean=0.6)
        both = mean_agreement(agreement, range(8), rng=rng)
        assert both.estimate == pytest.approx(agreement.mean())
        contains_mean.append([low <= 0.6 <= high for _, low, high in (both, over_patients_alone(agreement, rng))])
    covered = np.mean(contains_mean, axis=0)
    assert covered[0] >= 0.9
    assert covered[1] < 0.6


def test_verdicts_do_not_depend_on_the_drawn_networks():
    rng = np.random.default_rng(0)
    low = mean_agreement(agreements(rng, mean=0.2), range(8), rng=rng)

    def share(words, mean, interval):
        return np.mean([verdict(interval(agreements(rng, mean=mean), rng), low) == words for _ in range(200)])

    def over_both(agreement, rng):
        return mean_agreement(agreement, range(8), rng=rng)

    # At the limit, the verdict is "undecided". If only patients are resampled, chance often decides.
    assert share("undecided", 0.7, over_both) >= 0.9
    assert share("undecided", 0.7, over_patients_alone) <= 0.6
    assert share("changes with the weights", 0.5, over_both) >= 0.9
    assert share("does not explain the decision", 0.9, over_both) >= 0.9


def test_images_of_one_patient_are_drawn_together_and_one_patient_has_no_interval():
    agreement = np.tile([0.2, 0.2, 0.8, 0.8], (10, 1))
    together = mean_agreement(agreement, list("aabb"), rng=np.random.default_rng(0))
    assert together == (0.5, pytest.approx(0.2), pytest.approx(0.8))
    with_undefined = np.column_stack([agreement, np.full(10, np.nan)])
    np.testing.assert_array_equal(mean_agreement(with_undefined, list("aabbc"), rng=np.random.default_rng(0)), together)
    alone = mean_agreement(agreement, ["a"] * 4, rng=np.random.default_rng(0))
    np.testing.assert_array_equal(alone, [0.5, np.nan, np.nan])


def test_the_summary_holds_the_means_of_the_columns_that_it_names(honest, marked_cases):
    scores = score_maps(honest, marked_cases[0][:6], Maps(methods=["gradcam"], faithful=5, steps=4), seed=0)
    table = summary(scores, rng=np.random.default_rng(0))
    names = {
        "peak in lesion": "peak",
        "share in lesion": "in_lesion",
        "share in lungs": "in_lungs",
        "probability": "probability",
        "deletion": "deletion",
        "insertion": "insertion",
        "average drop": "drop",
        "increase": "increase",
    }
    for column, field in names.items():
        frame = scores.located if field in scores.located else scores.faithful
        for kind, rows in frame.groupby("map"):
            assert table.loc[kind, column].estimate == pytest.approx(rows[field].mean())
    for column, stage in (("agreement, head random", 0), ("agreement, all random", scores.randomised["stage"].max())):
        expected = scores.randomised.loc[scores.randomised["stage"] == stage, "agreement"].mean()
        assert table.loc["Grad-CAM", column].estimate == pytest.approx(expected)
    assert "empty" not in table  # no map is empty
    grad_cam, another = (scores.located[scores.located["map"] == k] for k in ("Grad-CAM", "another patient's"))
    paired = (grad_cam["in_lesion"].to_numpy() - another["in_lesion"].to_numpy()).mean()
    assert table.loc["Grad-CAM", "share, minus another's"].estimate == pytest.approx(paired)
    expected = "6 cases, 6 with a lesion or box, 6 with lungs; the columns from probability on use 5"
    assert case_counts(scores) == expected
    uniform = scores.located[scores.located["map"] == "uniform"]
    assert (uniform["peak"] == uniform["in_lesion"]).all()
    assert (uniform["peak"] < 0.5).all()


def test_another_patients_map_is_of_another_patient_and_the_same_class():
    cases = [MapCase("", f"p{i // 2}", i % 3 == 0, "") for i in range(12)]
    for seed in range(5):
        for i, partner in enumerate(cam_scores._partners(cases, seed)):
            assert cases[partner].patient != cases[i].patient
            assert cases[partner].class_index == cases[i].class_index
    assert cam_scores._partners(cases[:2], 0) is None


def test_empty_maps_are_counted_and_have_no_score_for_lungs_or_faithfulness(honest, marked_cases):
    silent = copy.deepcopy(honest.network)
    with torch.no_grad():
        silent[-1].weight[1] = -1.0  # all evidence is against the class
    trained = honest._replace(network=silent)
    scores = score_maps(trained, marked_cases[0][:3], Maps(methods=["gradcam"], faithful=2, steps=2), seed=0)
    located = scores.located[scores.located["map"] == "Grad-CAM"]
    assert (located["empty"] == 1).all()
    assert located["in_lungs"].isna().all()
    assert (located[["peak", "in_lesion"]] == 0).all(axis=None)
    assert scores.faithful[scores.faithful["map"] == "Grad-CAM"]["deletion"].isna().all()
    assert scores.randomised["correlation"].isna().all()
    table = summary(scores, rng=np.random.default_rng(0))
    assert table.loc["Grad-CAM", "empty"].estimate == 1
    assert table.loc["uniform", "empty"].estimate == 0


def test_one_patient_has_no_interval_and_no_verdict(honest, marked_cases):
    scores = score_maps(honest, marked_cases[0][:1], Maps(methods=["gradcam"], faithful=1, steps=2), seed=0)
    table = summary(scores, rng=np.random.default_rng(0))
    assert np.isnan(table.loc["Grad-CAM", "share in lungs"].low)
    assert table.loc["Grad-CAM", "verdict"] == "undecided"
    assert table.index.to_list() == ["Grad-CAM", "centred Gaussian", "uniform"]  # there is no other patient


def test_black_around_the_lungs_stays_black_where_a_network_sees_lungs_alone(honest, marked_cases):
    # Such a network has never seen another background, so the background must not count as evidence.
    case = marked_cases[0][0]
    lung = cv2.imread(case.lung, cv2.IMREAD_GRAYSCALE) > 0
    masked = honest._replace(lungs=lambda xray: xray * lung, card=card(lung_masking=True))
    image = masked.preprocessing(read_xray(case.path))[None]
    one = torch.ones(1, dtype=torch.long)
    subject = cam_scores._subject(masked, image, one)
    outside = torch.from_numpy(~lung)
    torch.testing.assert_close(subject.baseline[0, :, outside], image[0, :, outside])
    assert (subject.baseline[0, :, ~outside] == 0).float().mean() > 0.95  # some pixels inside the lungs are black too
    assert not cam_scores._subject(honest, image, one).baseline.any()
    lungs_kept = torch.from_numpy(lung)[None].float()
    assert masked_confidence(subject, lungs_kept)["drop"] == pytest.approx(0, abs=1e-6)


def test_x_rays_of_other_shapes_are_scored_at_their_own_size(honest, marked_cases, tmp_path):
    case = marked_cases[0][0]
    cv2.imwrite(str(tmp_path / "wide.png"), cv2.resize(read_xray(case.path), (192, 96)))
    half = np.zeros((96, 192), np.uint8)
    half[:, :96] = 255
    cv2.imwrite(str(tmp_path / "half.png"), half)
    wide = case._replace(path=str(tmp_path / "wide.png"), lung=str(tmp_path / "half.png"), lesion=None)
    boxes = np.array([[0.0, 0.0, 0.5, 1.0]])
    cases = [wide._replace(boxes=boxes), marked_cases[0][1]._replace(patient="other")]
    scores = score_maps(honest, cases, Maps(methods=["gradcam"], faithful=1, steps=1), seed=0)
    uniform = scores.located[scores.located["map"] == "uniform"].iloc[0]
    assert uniform[["in_lungs", "in_lesion", "iou", "iobb"]].to_list() == pytest.approx([0.5] * 4)
    grad_cam = scores.located.iloc[0]
    with cam_of(honest) as cam:
        map_ = cam(honest.preprocessing(read_xray(wide.path))[None], 1).upsampled((96, 192))[0, 0].numpy()
    assert grad_cam["in_lungs"] == pytest.approx(map_[:, :96].sum() / map_.sum(), rel=1e-4)
    assert grad_cam[["iou", "iobb", "detected"]].to_list() == pytest.approx(list(best_overlap(map_, boxes).values()))


def test_the_verdict_is_that_eigen_cam_does_not_explain_and_grad_cam_may(honest, marked_cases, monkeypatch):
    monkeypatch.setattr(cam_scores, "NETWORKS", 10)
    scores = score_maps(honest, marked_cases[0], Maps(methods=["gradcam", "eigencam"], faithful=8, steps=2), seed=0)
    table = summary(scores, rng=np.random.default_rng(0))
    assert table.loc["Grad-CAM", "verdict"] == "changes with the weights"
    assert "does not explain" in table.loc["Eigen-CAM", "verdict"]
    assert table.loc["Eigen-CAM", "agreement, head random"].estimate == pytest.approx(1)
    assert table.loc["uniform", "verdict"] == ""
    text = readable(table)
    assert text.loc["uniform", "agreement, all random"] == "–"
    assert text.loc["Eigen-CAM", "agreement, head random"] == "1.00 (1.00–1.00)"


def test_a_model_finds_the_lungs_where_the_data_has_none(honest, marked_cases):
    cases = [case._replace(lung=None, lesion=None) for case in marked_cases[0][:2]]
    left = np.zeros((SIZE, SIZE), bool)
    left[:, : SIZE // 2] = True
    lungs = iter([LungMask(left, None), LungMask(left, "one lung only")])
    scores = score_maps(
        honest, cases, Maps(methods=["gradcam"], faithful=1, steps=1), find_lungs=lambda xray: next(lungs), seed=0
    )
    shares = scores.located[scores.located["map"] == "uniform"]["in_lungs"]
    np.testing.assert_array_equal(shares, [0.5, np.nan])
    table = summary(scores, rng=np.random.default_rng(0))
    assert "peak in lesion" not in table
    assert table.loc["uniform", "share in lungs"].estimate == 0.5


def frame_of(rows, classes):
    frame = pd.DataFrame(rows, columns=["path", "patient", "label", *classes])
    return frame.assign(split="test", mask=None, lesion=None).astype({"mask": object, "lesion": object})


def table_of(tmp_path, rows, *, findings=(), boxes=None):
    boxes = no_boxes() if boxes is None else boxes
    return XrayTable(
        frame=frame_of([(str(tmp_path / row[0]), *row[1:]) for row in rows], findings),
        classes=findings or ("Normal", ILL),
        root=tmp_path,
        has_patient_ids=True,
        multilabel=bool(findings),
        boxes=boxes,
    )


def test_cases_of_one_label_are_the_correctly_classified_test_images(tmp_path):
    table = table_of(tmp_path, [(f"{i}.png", f"p{i}", i % 2) for i in range(6)])
    probabilities = np.eye(2)[[0, 0, 0, 1, 1, 1]]  # images 1 and 4 are wrong
    names = np.array([f"{i}.png" for i in range(6)])
    predictions = Predictions(np.arange(6) % 2, probabilities, np.array([f"p{i}" for i in range(6)]), names)
    cases = map_cases(table, predictions, most=10, seed=0)
    assert [(case.path.rsplit("/")[-1], case.class_index, case.label) for case in cases] == [
        ("0.png", 0, "Normal"),
        ("2.png", 0, "Normal"),
        ("3.png", 1, ILL),
        ("5.png", 1, ILL),
    ]
    assert len(map_cases(table, predictions, most=2, seed=0)) == 2
    drawn = [[case.path for case in map_cases(table, predictions, most=3, seed=1)] for _ in range(2)]
    assert drawn[0] == drawn[1]


def test_cases_of_several_findings_have_a_box_or_else_are_all_present_findings(tmp_path):
    findings = ("Mass", "Edema")
    rows = [("a.png", "p", 0, 1, 1), ("b.png", "q", 2, 0, 0), ("c.png", "r", 1, 0, 1)]
    paths = np.array([row[0] for row in rows])
    predictions = Predictions(np.array([[1, 1], [0, 0], [0, 1]]), np.full((3, 2), 0.5), np.array(list("pqr")), paths)
    plain = map_cases(table_of(tmp_path, rows, findings=findings), predictions, most=10, seed=0)
    assert [(case.path[-5], case.label) for case in plain] == [("a", "Mass"), ("a", "Edema"), ("c", "Edema")]
    box = {"x": 0.1, "y": 0.2, "width": 0.3, "height": 0.4}
    boxes = pd.DataFrame([{"path": str(tmp_path / "c.png"), "label": 1} | box])
    (boxed,) = map_cases(table_of(tmp_path, rows, findings=findings, boxes=boxes), predictions, most=10, seed=0)
    assert (boxed.path[-5], boxed.label, boxed.boxes.tolist()) == ("c", "Edema", [[0.1, 0.2, 0.3, 0.4]])


def test_boxes_are_the_target_where_there_is_no_lesion_mask(honest, marked_cases):
    whole = np.array([[0.0, 0.0, 1.0, 1.0]])
    cases = [case._replace(boxes=whole, lesion=None) for case in marked_cases[0][:3]]
    scores = score_maps(honest, cases, Maps(methods=["gradcam"], faithful=1, steps=1), seed=0)
    np.testing.assert_allclose(scores.located[["peak", "in_lesion"]], 1)
    table = overlap_table(scores.located, rng=np.random.default_rng(0))
    assert (table.loc["uniform"]["at 0.7"] == 1).all()  # the whole image is its one region
    assert table.index.get_level_values("finding").unique().to_list() == [ILL, "all"]


def test_scoring_without_cases_is_refused_with_the_reason(honest):
    with pytest.raises(ValueError, match="none was classified correctly"):
        score_maps(honest, [], Maps(methods=["gradcam"], faithful=1, steps=1), seed=0)


def test_a_study_may_name_all_methods():
    assert Maps(methods=tuple(METHODS)).methods == tuple(METHODS)
    with pytest.raises(ValueError, match="gradcamm"):
        Maps(methods=("gradcamm",))
    with pytest.raises(ValueError, match="at least 1 item"):
        Maps(methods=())
