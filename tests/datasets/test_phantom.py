"""The synthetic chest radiographs: anatomy, diseases, boxes, the planted shortcut and the data set on disk."""

import csv
import json
from itertools import combinations

import cv2
import numpy as np
import pytest

from datasets import phantom
from datasets.phantom import CLASSES, FOLDERS, draw_phantoms, lesion_boxes, main, write_phantom
from datasets.phantom_anatomy import LESIONS, shortcut_marker

SIZE = 96
COVID, OPACITY, NORMAL, VIRAL = range(4)


def drawn(label: int, count: int = 24, **options) -> phantom.Phantoms:
    return draw_phantoms([label] * count, seed=3, size=SIZE, **options)


@pytest.fixture(scope="module")
def by_class() -> list[phantom.Phantoms]:
    """Return the same 24 patients with every disease in turn."""
    return [drawn(label) for label in range(len(CLASSES))]


def halves(masks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the pixels of each (N, S, S) mask on the image's left and right of the gap between the lungs."""
    return masks[:, :, : SIZE // 2].sum((1, 2)), masks[:, :, SIZE // 2 :].sum((1, 2))


def auc(positive: np.ndarray, negative: np.ndarray) -> float:
    return float((positive[:, None] > negative[None]).mean() + 0.5 * (positive[:, None] == negative[None]).mean())


def contents(root) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


# --- the same numbers give the same picture ---------------------------------------------------------------------------


def test_same_seed_draws_the_same_bytes_and_another_seed_does_not():
    first, again = (draw_phantoms([0, 1, 2, 3], seed=5, size=64) for _ in range(2))
    for field in ("images", "labels", "lung_masks", "lesion_masks", "shortcut_masks"):
        assert np.array_equal(getattr(first, field), getattr(again, field))
    assert not np.array_equal(first.images, draw_phantoms([0, 1, 2, 3], seed=6, size=64).images)


def test_an_image_does_not_depend_on_those_drawn_with_it():
    labels, patients = [3, 0, 2, 1, 0], [4, 9, 2, 7, 0]
    together = draw_phantoms(labels, seed=1, patients=patients, size=64)
    for k in range(5):
        alone = draw_phantoms(labels[k : k + 1], seed=1, patients=patients[k : k + 1], size=64)
        assert np.array_equal(alone.images[0], together.images[k])
        assert np.array_equal(alone.lesion_masks[0], together.lesion_masks[k])


def test_shapes_and_types_hold_for_every_size_and_for_none():
    for count, size in ((3, 32), (2, 75), (1, 224), (0, 64)):
        phantoms = draw_phantoms([1] * count, seed=0, size=size)
        assert phantoms.images.dtype == np.uint8
        assert phantoms.labels.shape == (count,)
        for field in ("images", "lung_masks", "lesion_masks", "shortcut_masks"):
            assert getattr(phantoms, field).shape == (count, size, size)
            assert field == "images" or getattr(phantoms, field).dtype == bool


def test_masks_lie_at_the_same_places_at_every_size():
    small, large = (draw_phantoms([0, 1, 3], seed=2, size=size) for size in (64, 192))
    for field in ("lung_masks", "lesion_masks"):
        shrunk = getattr(large, field).reshape(3, 64, 3, 64, 3).mean((2, 4)) > 0.5
        both, either = shrunk & getattr(small, field), shrunk | getattr(small, field)
        assert (both.sum((1, 2)) / either.sum((1, 2))).min() > 0.85, field


# --- anatomy ----------------------------------------------------------------------------------------------------------


def test_lungs_are_darker_than_mediastinum_and_abdomen_and_lighter_than_air(by_class):
    normal = by_class[NORMAL]
    for image, lungs in zip(normal.images.astype(float), normal.lung_masks, strict=True):
        rows = np.flatnonzero(lungs.any(1))
        middle = image[(rows[0] + rows[-1]) // 2 :][: SIZE // 8, SIZE // 2 - 3 : SIZE // 2 + 3]
        assert image[lungs].mean() + 40 < middle.mean()
        assert image[lungs].mean() + 40 < image[-3:, SIZE // 3 : -SIZE // 3].mean()
        assert image[lungs].mean() > image.min() + 20


def test_there_are_two_lungs_and_the_image_left_one_is_larger(by_class):
    lungs = by_class[NORMAL].lung_masks
    for mask in lungs:
        assert len(lesion_boxes(mask)) == 2  # two components of a size that matters
    left, right = halves(lungs)
    assert left.mean() > 1.08 * right.mean()
    assert 0.15 < lungs.mean() < 0.45


def test_the_heart_lies_on_the_images_right(by_class):
    """Low in the chest, the gap between the lungs reaches further to the right of the spine than to the left."""
    excess = []
    for lungs in by_class[NORMAL].lung_masks:
        rows = np.flatnonzero(lungs.any(1))
        row = lungs[rows[0] + int(0.68 * (rows[-1] - rows[0]))]
        top = lungs[rows[0] + int(0.12 * (rows[-1] - rows[0]))]
        # The spine's line: the middle of the narrow gap between the lung apices.
        line = (np.flatnonzero(top[: SIZE // 2])[-1] + SIZE // 2 + np.flatnonzero(top[SIZE // 2 :])[0]) / 2
        gap = [c for c in range(*np.flatnonzero(row)[[0, -1]]) if not row[c]]
        excess.append((max(gap) - line) - (line - min(gap)))
    assert np.mean(excess) > 0.05 * SIZE
    assert np.mean(np.array(excess) > 0) > 0.9


def test_the_right_dome_on_the_images_left_stands_higher(by_class):
    higher = []
    for lungs in by_class[NORMAL].lung_masks:
        columns = np.flatnonzero(lungs.any(0))
        left, right = (columns[0] + int(share * np.ptp(columns)) for share in (0.1, 0.9))
        higher.append(np.flatnonzero(lungs[:, right])[-1] - np.flatnonzero(lungs[:, left])[-1])
    assert np.mean(higher) > 0


def test_every_class_has_a_lesion_function():
    assert set(LESIONS) == set(CLASSES)


def test_anatomy_does_not_depend_on_the_class(by_class):
    for phantoms in by_class:
        assert np.array_equal(phantoms.lung_masks, by_class[NORMAL].lung_masks)


def test_normal_lungs_are_not_empty(by_class):
    """Ribs and vessels give texture that is coarser than noise and finer than shading."""
    normal = by_class[NORMAL]
    for image, lungs in zip(normal.images, normal.lung_masks, strict=True):
        core = cv2.erode(lungs.astype(np.uint8), np.ones((5, 5))) > 0
        smooth = cv2.GaussianBlur(image.astype(float), (0, 0), 1)
        assert (smooth - cv2.GaussianBlur(smooth, (0, 0), 4))[core].std() > 1.5


# --- disease ----------------------------------------------------------------------------------------------------------


def test_lesions_lie_inside_the_lungs_and_only_the_sick_have_them(by_class):
    assert not by_class[NORMAL].lesion_masks.any()
    for label in (COVID, OPACITY, VIRAL):
        phantoms = by_class[label]
        assert not (phantoms.lesion_masks & ~phantoms.lung_masks).any()
        share = phantoms.lesion_masks.sum((1, 2)) / phantoms.lung_masks.sum((1, 2))
        assert share.min() > 0.01
        assert share.max() < 0.85


@pytest.mark.parametrize("label", [COVID, OPACITY, VIRAL])
def test_a_lesion_is_brighter_than_the_same_place_of_the_same_patient_without_it(by_class, label):
    sick, healthy = by_class[label], by_class[NORMAL]
    gain = sick.images.astype(float) - healthy.images
    inside = np.array([g[m].mean() for g, m in zip(gain, sick.lesion_masks, strict=True)])
    lung_outside = sick.lung_masks & ~sick.lesion_masks
    outside = np.array([g[m].mean() for g, m in zip(gain, lung_outside, strict=True)])
    assert inside.min() > 2
    assert (inside > 2 * outside).mean() > 0.9  # the mask is where the disease is
    assert abs(gain[~sick.lung_masks].mean()) < 3  # outside the lungs almost nothing changes


def test_covid_patches_are_bilateral_peripheral_and_basal(by_class):
    covid = by_class[COVID]
    assert np.all(np.stack(halves(covid.lesion_masks)) > 0)
    lower, outer = [], []
    for lungs, lesion in zip(covid.lung_masks, covid.lesion_masks, strict=True):
        rows, columns = np.indices(lungs.shape)
        lower.append(rows[lesion].mean() - rows[lungs].mean())
        outer.append(np.abs(columns - SIZE / 2)[lesion].mean() - np.abs(columns - SIZE / 2)[lungs].mean())
    assert np.mean(lower) > 0.05 * SIZE
    assert np.mean(outer) > 0.05 * SIZE


def test_lung_opacity_is_one_region_of_one_lung(by_class):
    left, right = halves(by_class[OPACITY].lesion_masks)
    assert np.all(np.minimum(left, right) <= 0.02 * np.maximum(left, right))
    assert 0 < np.mean(left > right) < 1  # both lungs occur
    for mask in by_class[OPACITY].lesion_masks:
        assert lesion_boxes(mask)[0][2] > 0.05  # its width


def test_viral_pneumonia_is_bilateral_and_perihilar(by_class):
    viral = by_class[VIRAL]
    assert np.all(np.stack(halves(viral.lesion_masks)) > 0)
    columns = np.abs(np.indices((SIZE, SIZE))[1] - SIZE / 2)
    inner = [
        columns[lungs].mean() - columns[lesion].mean()
        for lungs, lesion in zip(viral.lung_masks, viral.lesion_masks, strict=True)
    ]
    assert np.mean(inner) > 0.03 * SIZE


def test_consolidation_is_denser_than_ground_glass(by_class):
    def rise(label: int) -> float:
        sick = by_class[label]
        return float((sick.images.astype(float) - by_class[NORMAL].images)[sick.lesion_masks].mean())

    assert rise(OPACITY) > 1.3 * rise(COVID)


def test_mean_brightness_alone_does_not_tell_the_classes_apart(by_class):
    """Exposure changes the brightness more than disease does; perfect separation is 1, chance is 0.5."""
    means = [phantoms.images.mean((1, 2)) for phantoms in by_class]
    for first, second in combinations(range(4), 2):
        assert 0.25 < auc(means[first], means[second]) < 0.75, (first, second)


# --- boxes ------------------------------------------------------------------------------------------------------------


def test_boxes_are_fractions_largest_first_without_tiny_parts():
    mask = np.zeros((50, 100), bool)
    mask[10:20, 30:50] = True
    mask[30:45, 60:90] = True
    mask[2, 2] = True
    assert lesion_boxes(mask) == [(0.6, 0.6, 0.3, 0.3), (0.3, 0.2, 0.2, 0.2)]
    assert lesion_boxes(np.zeros((50, 100), bool)) == []


def test_boxes_enclose_the_lesions(by_class):
    for mask in np.concatenate([by_class[COVID].lesion_masks, by_class[VIRAL].lesion_masks]):
        covered = np.zeros_like(mask)
        for box in lesion_boxes(mask):
            x, y, width, height = (round(side * SIZE) for side in box)
            covered[y : y + height, x : x + width] = True
        assert (mask & ~covered).sum() <= 0.05 * mask.sum()  # tiny parts get no box


# --- the planted shortcut ---------------------------------------------------------------------------------------------


def test_the_shortcut_marks_its_class_and_no_other():
    phantoms = draw_phantoms(np.arange(40) % 4, seed=0, size=64, shortcut_class="COVID-19")
    marked = phantoms.shortcut_masks.any((1, 2))
    assert np.array_equal(marked, phantoms.labels == COVID)
    assert not (phantoms.shortcut_masks & phantoms.lung_masks).any()
    assert phantoms.images[phantoms.shortcut_masks].min() == 255
    share = phantoms.shortcut_masks[marked].mean((1, 2))
    assert 0.001 < share.min() < share.max() < 0.006


def test_the_shortcut_appears_in_its_class_at_the_rate_asked_for_and_in_no_other():
    labels = [VIRAL] * 60 + [NORMAL] * 10
    options = {"shortcut_class": "Viral Pneumonia", "shortcut_probability": 0.7}
    marked = draw_phantoms(labels, seed=0, size=32, **options).shortcut_masks.any((1, 2))
    assert 0.52 < marked[:60].mean() < 0.88  # 3 standard errors of a share of 0.7 among 60: 0.18
    assert not marked[60:].any()


@pytest.mark.parametrize("corner", [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_the_shortcut_goes_to_the_only_corner_without_lung(corner):
    lungs = np.ones((100, 100), bool)
    free = tuple(slice(0, 15) if side == 0 else slice(85, 100) for side in corner)
    lungs[free] = False
    for seed in range(8):
        marker = shortcut_marker(lungs, np.random.default_rng(seed))
        assert marker.any()
        assert not (marker & lungs).any()


def test_the_shortcut_changes_nothing_but_its_own_pixels():
    plain, planted = drawn(COVID, 8), drawn(COVID, 8, shortcut_class="COVID-19")
    assert not plain.shortcut_masks.any()
    elsewhere = ~planted.shortcut_masks
    assert np.array_equal(plain.images[elsewhere], planted.images[elsewhere])
    assert np.array_equal(plain.lesion_masks, planted.lesion_masks)


# --- the data set on disk ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "phantom"
    write_phantom(root, images_per_class=dict.fromkeys(CLASSES, 3), size=64, seed=4, shortcut_class="Normal")
    return root


def test_the_layout_is_that_of_the_covid_radiography_database(written):
    for name, folder in FOLDERS.items():
        for kind in ("images", "masks", "lesions", "shortcuts"):
            files = sorted(path.name for path in (written / folder / kind).iterdir())
            assert files == [f"{folder}-{k}.png" for k in (1, 2, 3)]
            pictures = [cv2.imread(str(written / folder / kind / file), cv2.IMREAD_UNCHANGED) for file in files]
            assert all(picture.shape == (64, 64) and picture.dtype == np.uint8 for picture in pictures)
            assert kind == "images" or set(np.unique(pictures)) <= {0, 255}
            assert kind != "lesions" or (name == "Normal") == (not np.any(pictures))
            assert kind != "shortcuts" or (name == "Normal") == np.any(pictures)
    assert sorted(path.name for path in written.iterdir()) == sorted([*FOLDERS.values(), "boxes.csv", "phantom.json"])


def test_written_boxes_are_those_of_the_written_lesions(written):
    with open(written / "boxes.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert {row["label"] for row in rows} == {"COVID-19", "Lung Opacity", "Viral Pneumonia"}
    for path in {row["path"] for row in rows}:
        lesion = cv2.imread(str(written / path.replace("/images/", "/lesions/")), cv2.IMREAD_UNCHANGED) > 0
        boxes = [tuple(float(row[key]) for key in ("x", "y", "width", "height")) for row in rows if row["path"] == path]
        assert boxes == lesion_boxes(lesion)


def test_the_settings_file_says_that_the_images_are_synthetic(written):
    settings = json.loads((written / "phantom.json").read_text(encoding="utf-8"))
    assert "synthetic" in settings["what"]
    assert settings["generator_version"] == phantom.GENERATOR_VERSION
    assert (settings["seed"], settings["size"], settings["shortcut_class"]) == (4, 64, "Normal")


def test_a_larger_set_begins_with_the_smaller_one_and_no_patient_comes_twice(written, tmp_path):
    write_phantom(
        tmp_path / "more", images_per_class=dict.fromkeys(CLASSES, 5), size=64, seed=4, shortcut_class="Normal"
    )
    more = contents(tmp_path / "more")
    for name, data in contents(written).items():
        assert name in ("boxes.csv", "phantom.json") or more[name] == data
    masks = [data for name, data in more.items() if "masks" in name]
    assert len(set(masks)) == len(masks) == 20


def test_writing_again_with_the_same_settings_changes_no_file(written):
    before = {path: path.stat().st_mtime_ns for path in written.rglob("*")}
    write_phantom(written, images_per_class=dict.fromkeys(CLASSES, 3), size=64, seed=4, shortcut_class="Normal")
    assert {path: path.stat().st_mtime_ns for path in written.rglob("*")} == before


def test_other_settings_are_refused_by_name(written):
    before = contents(written)
    with pytest.raises(ValueError, match=r"another seed, size.*(another folder|delete)"):
        write_phantom(written, images_per_class=dict.fromkeys(CLASSES, 3), size=32, seed=5, shortcut_class="Normal")
    assert contents(written) == before


def test_a_folder_that_is_no_phantom_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(FileExistsError, match=r"no phantom.*another folder"):
        write_phantom(tmp_path, images_per_class={"Normal": 1}, size=32, seed=0)
    assert contents(tmp_path) == {"thesis.txt": b"years of work"}


def test_a_write_that_fails_leaves_nothing_behind(tmp_path, monkeypatch):
    def full(mask):
        raise OSError("disk full")

    monkeypatch.setattr(phantom, "lesion_boxes", full)
    with pytest.raises(OSError, match="disk full"):
        write_phantom(tmp_path / "phantom", images_per_class={"COVID-19": 2}, size=32, seed=0)
    assert list(tmp_path.iterdir()) == []


def test_an_empty_folder_may_be_filled(tmp_path):
    write_phantom(tmp_path / "", images_per_class={"Normal": 1}, size=32, seed=0)
    assert (tmp_path / "Normal" / "images" / "Normal-1.png").is_file()
    assert not (tmp_path / "Normal" / "shortcuts").exists()


def test_the_command_line_writes_a_set_and_explains_a_refusal(tmp_path, capsys):
    arguments = [str(tmp_path / "set"), "--images-per-class", "1", "--size", "32"]
    main(arguments)
    assert len(list((tmp_path / "set").rglob("*.png"))) == 12
    with pytest.raises(SystemExit) as stop:
        main([*arguments, "--seed", "9"])
    assert stop.value.code == 2
    assert "another seed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        ([0], {"size": 8}, "at least 32"),
        ([0], {"shortcut_class": "Covid"}, "choose from COVID-19"),
        ([0], {"shortcut_class": "Normal", "shortcut_probability": 1.5}, "between 0 and 1"),
    ],
)
def test_impossible_requests_are_refused_with_the_remedy(labels, options, message):
    with pytest.raises(ValueError, match=message):
        draw_phantoms(labels, seed=0, **options)


def test_an_unknown_class_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match=r"unknown classes of the phantom \['Covid'\]: choose from COVID-19"):
        write_phantom(tmp_path / "phantom", images_per_class={"Covid": 1}, size=32, seed=0)
    with pytest.raises(ValueError, match="negative"):
        write_phantom(tmp_path / "phantom", images_per_class={"Normal": -1}, size=32, seed=0)
    with pytest.raises(ValueError, match="choose from"):
        write_phantom(tmp_path / "phantom", images_per_class={}, size=32, seed=0, shortcut_class="Covid")
    assert list(tmp_path.iterdir()) == []
