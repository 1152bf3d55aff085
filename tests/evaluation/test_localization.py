"""Claims about localization.py, with answers from closed forms and by hand."""

import numpy as np
import pandas as pd
import pytest
import torch
from torchvision.ops import box_iou

from evaluation import localization

# Two findings of two images each, three patients; the third image has two boxes.
TRUTH = [
    np.array([[0.2, 0.2, 0.5, 0.4]]),
    np.array([[0.0, 0.0, 0.3, 0.5]]),
    np.array([[0.6, 0.6, 0.4, 0.4], [0.0, 0.5, 0.2, 0.2]]),
    np.array([[0.4, 0.1, 0.2, 0.8]]),
]
LABELS, PATIENTS = ["Mass", "Effusion", "Mass", "Effusion"], [7, 7, 8, 9]


def located(maps, truth=TRUTH, labels=LABELS, patients=PATIENTS):
    """Return a row for each case and kind of map, as `evaluation.cam_scores.MapScores.located` has them."""
    rows = []
    for map_, boxes, label, patient in zip(maps, truth, labels, patients, strict=True):
        kinds = {"map": map_} | {name: make(map_.shape) for name, make in localization.CHANCE.items()}
        for kind, of_kind in kinds.items():
            best = localization.best_overlap(of_kind, boxes)
            rows.append({"map": kind, "label": label, "patient": patient} | best)
    return pd.DataFrame(rows)


def table_of(maps, *cases):
    return localization.overlap_table(located(maps, *cases), rng=np.random.default_rng(0))


def random_masks(n=40, shape=(20, 30), seed=0):
    """Return (N, H, W) masks with one random box each."""
    rng = np.random.default_rng(seed)
    masks = np.zeros((n, *shape), dtype=bool)
    for mask in masks:
        height, width = rng.integers(3, 10, size=2)
        top, left = rng.integers(shape[0] - height), rng.integers(shape[1] - width)
        mask[top : top + height, left : left + width] = True
    return masks


def test_the_peak_is_row_then_column():
    map_ = np.zeros((4, 7))
    map_[1, 5] = 2
    assert localization.peak(map_) == (1, 5)


def test_peak_of_a_plateau_at_the_edge_is_its_inner_end():
    map_ = np.zeros((9, 9))
    map_[2:4, :3] = 5
    assert localization.peak(map_) == (3, 2)
    assert localization.peak(map_[::-1, ::-1]) == (5, 6)


def test_a_zero_map_has_no_peak():
    assert localization.peak(np.zeros((4, 7))) is None


def test_the_mask_itself_as_map_scores_one_and_its_complement_zero():
    for mask in random_masks():
        for score in (localization.peak_inside, localization.mass_inside):
            assert score(mask * 1.0, mask) == pytest.approx(1)
            assert score(~mask * 1.0, mask) == 0


def test_an_empty_mask_is_missing_and_a_zero_map_is_a_miss():
    corner = np.zeros((3, 3), dtype=bool)
    corner[0, 0] = True
    for score in (localization.peak_inside, localization.mass_inside):
        assert np.isnan(score(np.ones((3, 3)), np.zeros((3, 3), dtype=bool)))
        assert score(np.zeros((3, 3)), corner) == 0
        assert score(np.diag([3.0, 2, 1]), corner) > 0


def test_mass_is_the_share_of_the_sum_whatever_the_scale():
    map_ = np.array([[1.0, 2.0], [3.0, 4.0]])
    mask = np.array([[False, True], [False, True]])
    assert localization.mass_inside(map_, mask) == pytest.approx(0.6)
    assert localization.mass_inside(1000 * map_, mask) == pytest.approx(0.6)


def test_the_uniform_map_holds_the_area_and_random_peaks_hit_it_as_often():
    mask = random_masks(n=1)[0]
    uniform = localization.CHANCE["uniform"](mask.shape)
    assert localization.mass_inside(uniform, mask) == pytest.approx(mask.mean())
    noise = np.random.default_rng(0).random((4000, *mask.shape))
    hits = np.mean([localization.peak_inside(map_, mask) for map_ in noise])
    assert hits == pytest.approx(mask.mean(), abs=4 * np.sqrt(mask.mean() * (1 - mask.mean()) / 4000))


def test_the_gaussian_is_centred_symmetric_and_has_its_documented_width():
    map_ = localization.centred_gaussian_map((101, 201))
    assert localization.peak(map_) == (50, 100)
    np.testing.assert_allclose(map_, map_[::-1, ::-1])
    # One sigma from the centre, a quarter of 101 rows and of 201 columns: exp(-1/2).
    assert np.interp(50 + 25.25, np.arange(101), map_[:, 100]) == pytest.approx(np.exp(-0.5), abs=1e-3)
    assert np.interp(100 + 50.25, np.arange(201), map_[50]) == pytest.approx(np.exp(-0.5), abs=1e-3)


def test_a_pixel_is_in_a_box_if_its_centre_is():
    # Columns 2.4 to 6.6 of 10: centres 2.5 to 6.5; rows 0.6 to 2.5 of 5: centre 1.5 only.
    mask = localization.box_mask([[0.24, 0.12, 0.42, 0.38]], (5, 10))
    expected = np.zeros((5, 10), dtype=bool)
    expected[1, 2:7] = True
    np.testing.assert_array_equal(mask, expected)


def test_box_masks_are_unions_and_end_at_the_border():
    mask = localization.box_mask([[-0.5, 0, 0.6, 0.1], [0.9, 0.8, 0.1, 5]], (10, 10))
    expected = np.zeros((10, 10), dtype=bool)
    expected[0, 0] = expected[8:, 9] = True
    np.testing.assert_array_equal(mask, expected)
    assert not localization.box_mask(np.zeros((0, 4)), (10, 10)).any()
    assert not localization.box_mask([[1.5, 0, 0.1, 1], [-0.3, 0, 0.01, 1]], (10, 10)).any()
    assert localization.box_mask([[0, 0, 1, 1]], (3, 7)).all()


def test_a_box_smaller_than_a_pixel_marks_the_pixel_that_holds_its_centre():
    mask = localization.box_mask([[0.38, 0.91, 0.01, 0.02]], (10, 10))
    assert np.argwhere(mask).tolist() == [[9, 3]]


def test_a_box_made_of_pixels_is_that_mask_at_any_size():
    for size in (3, 7, 49, 1024):
        for first in range(0, size, max(1, size // 50)):
            box = [[first / size, 0, 1 / size, 1]]
            assert np.flatnonzero(localization.box_mask(box, (1, size))).tolist() == [first]


def test_the_mask_of_a_box_serves_the_pointing_game():
    map_ = np.zeros((10, 10))
    map_[3, 4] = 1
    hits = [localization.peak_inside(map_, localization.box_mask([[x, 0.3, 0.1, 0.1]], (10, 10))) for x in (0.4, 0.5)]
    assert hits == [1, 0]


def test_iou_is_that_of_torchvision():
    rng = np.random.default_rng(0)
    a, b = rng.random((30, 4)) + 0.01, rng.random((20, 4)) + 0.01
    corners = [torch.tensor(np.hstack([of[:, :2], of[:, :2] + of[:, 2:]])) for of in (a, b)]
    expected = box_iou(*corners).numpy()
    assert 0 < (expected > 0).mean() < 1
    np.testing.assert_allclose(localization.box_overlaps(a, b)["iou"], expected, atol=1e-12)
    assert localization.box_overlaps(np.zeros((0, 4)), b)["iou"].shape == (0, 20)


def test_iobb_is_over_the_detected_box_alone():
    big, small, beside = [0.1, 0.1, 0.8, 0.8], [0.2, 0.3, 0.1, 0.2], [0.8, 0.1, 0.2, 0.4]
    shares = localization.box_overlaps(np.array([small, big, beside]), np.array([big, small]))["iobb"]
    np.testing.assert_allclose(shares, [[1, 1], [1, 0.02 / 0.64], [0.5, 0]])


def test_a_blob_inside_and_one_outside_give_the_better_overlap_and_two_detections():
    map_ = np.zeros((20, 20))
    map_[4:8, 4:8] = 1  # inside: 16 of the box's 80 pixels
    map_[15:, 15:] = 0.5  # above the lower threshold only
    assert localization.best_overlap(map_, TRUTH[0]) == pytest.approx({"iou": 16 / 80, "iobb": 1, "detected": 3})


def test_no_detection_scores_zero_and_no_true_box_is_missing():
    assert localization.best_overlap(np.zeros((9, 9)), TRUTH[0]) == {"iou": 0, "iobb": 0, "detected": 0}
    without_box = localization.best_overlap(np.ones((5, 7)), np.zeros((0, 4)))
    assert without_box == pytest.approx({"iou": np.nan, "iobb": np.nan, "detected": 2}, nan_ok=True)


def test_the_overlap_of_the_uniform_map_is_the_largest_boxs_area():
    for boxes_of_image, area in zip(TRUTH, (0.2, 0.15, 0.16, 0.16), strict=True):
        overlap = localization.best_overlap(np.ones((12, 8)), boxes_of_image)
        assert overlap == pytest.approx({"iou": area, "iobb": area, "detected": 2})


def test_maps_equal_to_their_boxes_reach_every_overlap_and_the_uniform_map_its_area():
    sizes = ((20, 30), (10, 10), (50, 40), (20, 20))  # each box ends at a pixel's edge
    maps = [localization.box_mask(of, size) * 1.0 for of, size in zip(TRUTH, sizes, strict=True)]
    table = table_of(maps)
    assert table.index.get_level_values("finding").unique().to_list() == ["Effusion", "Mass", "all"]
    shares = [f"at {overlap}" for overlap in localization.OVERLAPS]
    assert table.columns[:9].to_list() == ["images", "regions", *shares]
    assert (table.loc["uniform"]["regions"] == 2).all()  # one at each threshold
    assert table.loc[("map", "Mass", "IoU"), "regions"] == 3  # of one box and of two
    bounds = [f"{share} {bound}" for share in shares for bound in ("low", "high")]
    assert table.columns[9:].to_list() == bounds
    assert (table.loc["map"][shares + bounds[1::2]] == 1).all(axis=None)
    # The intervals are exact. Patients: two for "Effusion", two for "Mass", three for all.
    patients = table.loc["map"].index.get_level_values("finding").map({"Effusion": 2, "Mass": 2, "all": 3})
    for bound in bounds[::2]:
        np.testing.assert_allclose(table.loc["map"][bound], 0.025 ** (1 / patients))
    # Areas 0.2, 0.15, 0.16 (the larger), 0.16: all above 0.1, none above 0.2.
    assert (table.loc["uniform"]["at 0.1"] == 1).all()
    assert (table.loc["uniform"][shares[1:]] == 0).all(axis=None)
    counts = table["images"].unstack("finding").drop_duplicates()
    assert counts.to_numpy().tolist() == [[2, 2, 4]]


def test_a_table_about_one_patient_has_no_intervals():
    table = table_of([localization.box_mask(TRUTH[0], (20, 30)) * 1.0], TRUTH[:1], ["Mass"], [7])
    shares = [f"at {overlap}" for overlap in localization.OVERLAPS]
    assert (table.loc["map"][shares] == 1).all(axis=None)
    assert table[[f"{share} {bound}" for share in shares for bound in ("low", "high")]].isna().all(axis=None)


def test_the_table_counts_overlaps_above_the_threshold_by_finding():
    maps = [localization.box_mask(of, (20, 20)) * 1.0 for of in TRUTH]
    maps[0][...] = 0  # no box is detected for a "Mass"
    maps[1] = localization.box_mask([[0, 0, 0.1, 0.5]], (20, 20)) * 1.0  # a third of an "Effusion" box
    table = table_of(maps)["at 0.5"].loc["map"]
    assert table["Mass"].to_dict() == {"IoU": 0.5, "IoBB": 0.5}
    assert table["Effusion"].to_dict() == {"IoU": 0.5, "IoBB": 1}
    assert table["all"].to_dict() == {"IoU": 0.5, "IoBB": 0.75}


def test_the_overlap_of_a_gaussian_is_that_of_the_box_around_its_half(monkeypatch):
    # Columns (x - 19.5) / 10 within sqrt(2 ln 2) = 1.177 of the centre: 8 to 31 of 40, 24 / 40 wide.
    monkeypatch.setattr(localization, "BOX_THRESHOLDS", [0.5])
    best = localization.best_overlap(localization.centred_gaussian_map((40, 40)), TRUTH[0])
    expected = localization.box_overlaps(np.array([[8 / 40, 8 / 40, 24 / 40, 24 / 40]]), TRUTH[0])["iou"]
    assert best["iou"] == pytest.approx(expected.item())


def test_images_without_a_box_are_left_out_of_the_table():
    maps = [localization.box_mask(boxes_of_image, (20, 20)) * 1.0 for boxes_of_image in TRUTH]
    table = table_of([*maps, maps[0]], [*TRUTH, np.zeros((0, 4))], [*LABELS, "Mass"], [*PATIENTS, 1])
    assert table.loc[("map", "all", "IoU"), ["images", "at 0.7"]].to_list() == [4, 1]


def test_the_part_of_a_true_box_beyond_the_image_is_ignored():
    truth = np.array([[0.8, 0.8, 0.3, 0.3]])
    assert localization.best_overlap(localization.box_mask(truth, (20, 20)) * 1.0, truth)["iou"] == pytest.approx(1)
    assert np.isnan(localization.best_overlap(np.ones((4, 4)), np.array([[1.2, 0.1, 0.2, 0.2]]))["iou"])
