"""Claims about localization.py, with answers from closed forms and by hand."""

import numpy as np
import pandas as pd
import pytest
import torch
from torchvision.ops import box_iou

import localization

# Two findings of two images each, three patients; the third image has two boxes.
TRUTH = [
    np.array([[0.2, 0.2, 0.5, 0.4]]),
    np.array([[0.0, 0.0, 0.3, 0.5]]),
    np.array([[0.6, 0.6, 0.4, 0.4], [0.0, 0.5, 0.2, 0.2]]),
    np.array([[0.4, 0.1, 0.2, 0.8]]),
]
LABELS, PATIENTS = ["Mass", "Effusion", "Mass", "Effusion"], [7, 7, 8, 9]


def table_of(maps, *, thresholds=localization.BOX_THRESHOLDS, **options):
    options = {"resamples": 200, "rng": np.random.default_rng(0)} | options
    kinds = {"map": maps}
    kinds |= {name: [make(np.shape(m)) for m in maps] for name, make in localization.CHANCE.items()}
    found = {k: localization.best_overlaps(m, TRUTH, thresholds=thresholds) for k, m in kinds.items()}
    return localization.overlap_table(found, LABELS, PATIENTS, **options)


def boxes(n=40, shape=(20, 30), seed=0):
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


def test_the_mask_itself_as_map_scores_one():
    masks = boxes()
    assert (localization.peak_inside(masks, masks) == 1).all()
    np.testing.assert_allclose(localization.mass_inside(masks, masks), 1)


def test_the_complement_of_the_mask_as_map_scores_zero():
    masks = boxes()
    assert (localization.peak_inside(~masks, masks) == 0).all()
    assert (localization.mass_inside(~masks, masks) == 0).all()


def test_an_empty_mask_is_missing_and_a_zero_map_is_a_miss():
    masks = np.zeros((2, 3, 3))
    masks[1, 0, 0] = 1
    for score in (localization.peak_inside, localization.mass_inside):
        np.testing.assert_array_equal(score(np.zeros((2, 3, 3)), masks), [np.nan, 0])
        np.testing.assert_array_equal(
            score(np.diag([3, 2, 1])[None].repeat(2, axis=0), masks) > 0, [False, True]
        )


def test_mass_is_the_share_of_the_sum_whatever_the_scale():
    map_ = np.array([[[1.0, 2.0], [3.0, 4.0]]])
    mask = np.array([[[0, 1], [0, 1]]])
    assert localization.mass_inside(map_, mask) == pytest.approx([0.6])
    assert localization.mass_inside(1000 * map_, 255 * mask) == pytest.approx([0.6])


def test_the_uniform_map_holds_the_area_and_random_peaks_hit_it_as_often():
    masks = boxes(n=1)
    area = masks.mean()
    assert localization.mass_inside(localization.uniform_map(masks.shape[1:])[None], masks) == pytest.approx(
        [area]
    )
    noise = np.random.default_rng(0).random((4000, *masks.shape[1:]))
    hits = localization.peak_inside(noise, np.broadcast_to(masks, noise.shape))
    assert hits.mean() == pytest.approx(area, abs=4 * np.sqrt(area * (1 - area) / 4000))


def test_the_gaussian_is_centred_symmetric_and_as_wide_as_it_says():
    map_ = localization.centred_gaussian_map((101, 201), sigma_fraction=0.2)
    assert localization.peak(map_) == (50, 100)
    np.testing.assert_allclose(map_, map_[::-1, ::-1])
    # One sigma from the centre: exp(-1/2); sigma is 20.2 rows and 40.2 columns.
    assert np.interp(50 + 20.2, np.arange(101), map_[:, 100]) == pytest.approx(np.exp(-0.5), abs=1e-3)
    assert np.interp(100 + 40.2, np.arange(201), map_[50]) == pytest.approx(np.exp(-0.5), abs=1e-3)


def test_maps_and_masks_of_two_resolutions_are_refused_with_the_remedy():
    with pytest.raises(ValueError, match="upsample the maps"):
        localization.peak_inside(np.ones((2, 7, 7)), np.ones((2, 14, 14)))


def test_negative_or_missing_map_values_are_refused():
    with pytest.raises(ValueError, match="positive part"):
        localization.mass_inside(np.full((1, 2, 2), -1.0), np.ones((1, 2, 2)))
    with pytest.raises(ValueError, match="finite"):
        localization.mass_inside(np.full((1, 2, 2), np.nan), np.ones((1, 2, 2)))


def test_images_of_different_sizes_score_as_each_does_alone():
    rng = np.random.default_rng(0)
    maps = [rng.random(shape).astype(np.float32) for shape in ((5, 9), (12, 4), (5, 9), (30, 30))]
    masks = [map_ > 0.8 for map_ in maps]
    masks[0][...] = masks[3][...] = False
    masks[3][:20] = True
    for score in (localization.peak_inside, localization.mass_inside):
        alone = [score(map_[None], mask[None])[0] for map_, mask in zip(maps, masks, strict=True)]
        np.testing.assert_array_equal(score(maps, masks), alone)


def test_a_map_of_another_size_than_its_mask_is_refused_in_a_list_too():
    maps, masks = [np.ones((4, 4)), np.ones((7, 7))], [np.ones((4, 4)), np.ones((14, 14))]
    with pytest.raises(ValueError, match="upsample the maps"):
        localization.mass_inside(maps, masks)
    with pytest.raises(ValueError, match="1 masks for 2 maps"):
        localization.mass_inside(maps, masks[:1])
    with pytest.raises(ValueError, match="1 boxes for 2 maps"):
        localization.best_overlaps(maps, TRUTH[:1])


def test_a_peak_within_the_euclidean_tolerance_of_the_mask_is_a_hit():
    map_, mask = np.zeros((1, 20, 20)), np.zeros((1, 20, 20))
    map_[0, 10, 10] = 1
    mask[0, :8, :7] = 1  # nearest pixel (7, 6): 3 rows and 4 columns away, 5 pixels
    hits = [localization.peak_inside(map_, mask, tolerance=pixels)[0] for pixels in (0, 4, 5, 15)]
    assert hits == [0, 0, 1, 1]
    assert localization.peak_inside(np.zeros((1, 20, 20)), mask, tolerance=15) == 0
    assert np.isnan(localization.peak_inside(map_, 0 * mask, tolerance=15)).all()
    with pytest.raises(ValueError, match="distance in pixels"):
        localization.peak_inside(map_, mask, tolerance=-1)


def test_a_pixel_is_in_a_box_if_its_centre_is():
    # Columns 2.4 to 6.6 of 10: centres 2.5 to 6.5; rows 0.6 to 2.5 of 5: centre 1.5 only.
    mask = localization.box_masks([[0.24, 0.12, 0.42, 0.38]], (5, 10))
    expected = np.zeros((5, 10), dtype=bool)
    expected[1, 2:7] = True
    np.testing.assert_array_equal(mask, expected)


def test_box_masks_are_unions_and_end_at_the_border():
    mask = localization.box_masks([[-0.5, 0, 0.6, 0.1], [0.9, 0.8, 0.1, 5]], (10, 10))
    expected = np.zeros((10, 10), dtype=bool)
    expected[0, 0] = expected[8:, 9] = True
    np.testing.assert_array_equal(mask, expected)
    assert not localization.box_masks(np.zeros((0, 4)), (10, 10)).any()
    assert not localization.box_masks([[1.5, 0, 0.1, 1], [-0.3, 0, 0.01, 1]], (10, 10)).any()
    assert localization.box_masks([[0, 0, 1, 1]], (3, 7)).all()


def test_a_box_smaller_than_a_pixel_marks_the_pixel_that_holds_its_centre():
    mask = localization.box_masks([[0.38, 0.91, 0.01, 0.02]], (10, 10))
    assert np.argwhere(mask).tolist() == [[9, 3]]


def test_a_box_made_of_pixels_is_that_mask_at_any_size():
    for size in (3, 7, 49, 1024):
        for first in range(0, size, max(1, size // 50)):
            box = [[first / size, 0, 1 / size, 1]]
            assert np.flatnonzero(localization.box_masks(box, (1, size))).tolist() == [first]


def test_box_masks_serve_the_pointing_game():
    maps = np.zeros((2, 10, 10))
    maps[:, 3, 4] = 1
    masks = [localization.box_masks(of, (10, 10)) for of in ([[0.4, 0.3, 0.1, 0.1]], [[0.5, 0.3, 0.1, 0.1]])]
    assert localization.peak_inside(maps, masks).tolist() == [1, 0]


def test_iou_is_that_of_torchvision():
    rng = np.random.default_rng(0)
    a, b = rng.random((30, 4)) + 0.01, rng.random((20, 4)) + 0.01
    corners = [torch.tensor(np.hstack([of[:, :2], of[:, :2] + of[:, 2:]])) for of in (a, b)]
    expected = box_iou(*corners).numpy()
    assert 0 < (expected > 0).mean() < 1
    np.testing.assert_allclose(localization.iou(a, b), expected, atol=1e-12)
    assert localization.iou(np.zeros((0, 4)), b).shape == (0, 20)


def test_iobb_is_over_the_detected_box_alone():
    big, small, beside = [0.1, 0.1, 0.8, 0.8], [0.2, 0.3, 0.1, 0.2], [0.8, 0.1, 0.2, 0.4]
    np.testing.assert_allclose(
        localization.iobb([small, big, beside], [big, small]), [[1, 1], [1, 0.02 / 0.64], [0.5, 0]]
    )


def test_boxes_that_are_none_are_refused():
    with pytest.raises(ValueError, match="rows of x, y, width and height"):
        localization.iou([0.1, 0.2, 0.3, 0.4], TRUTH[0])
    with pytest.raises(ValueError, match="width and height positive"):
        localization.box_masks([[0.1, 0.2, 0.3, 0]], (10, 10))


def test_a_blob_inside_and_one_outside_give_the_better_overlap_and_two_detections():
    map_ = np.zeros((20, 20))
    map_[4:8, 4:8] = 1  # inside: 16 of the box's 80 pixels
    map_[15:, 15:] = 0.5  # above the lower threshold only
    best = localization.best_overlaps([map_], TRUTH[:1])
    assert best.detected.tolist() == [3]
    np.testing.assert_allclose([best.iou, best.iobb], [[16 / 80], [1]])
    high = localization.best_overlaps([map_], TRUTH[:1], thresholds=[0.6])
    assert high.detected.tolist() == [1]


def test_no_detection_scores_zero_and_no_true_box_is_missing():
    best = localization.best_overlaps([np.zeros((9, 9)), np.ones((5, 7))], [TRUTH[0], np.zeros((0, 4))])
    np.testing.assert_array_equal(best.iou, [0, np.nan])
    np.testing.assert_array_equal(best.iobb, [0, np.nan])
    assert best.detected.tolist() == [0, 2]


def test_the_overlap_of_the_uniform_map_is_the_largest_boxs_area():
    best = localization.best_overlaps([np.ones((12, 8))] * 4, TRUTH)
    np.testing.assert_allclose(best.iou, [0.2, 0.15, 0.16, 0.16])
    np.testing.assert_allclose(best.iobb, best.iou)


def test_maps_equal_to_their_boxes_reach_every_overlap_and_the_uniform_map_its_area():
    sizes = ((20, 30), (10, 10), (50, 40), (20, 20))  # each box ends at a pixel's edge
    maps = [localization.box_masks(of, size) for of, size in zip(TRUTH, sizes, strict=True)]
    table = table_of(maps)
    assert table.index.get_level_values("finding").unique().to_list() == ["Effusion", "Mass", "all"]
    shares = [f"at {overlap}" for overlap in localization.OVERLAPS]
    assert table.columns[:9].to_list() == ["images", "regions", *shares]
    assert (table.loc["uniform"]["regions"] == 2).all()  # one at each threshold
    assert table.loc[("map", "Mass", "IoU"), "regions"] == 3  # of one box and of two
    bounds = [f"{share} {bound}" for share in shares for bound in ("low", "high")]
    assert table.columns[9:].to_list() == bounds
    assert (table.loc["map"][shares + bounds[1::2]] == 1).all(axis=None)
    # Exact over patients: of "Effusion" and "Mass" two each, of all three.
    patients = table.loc["map"].index.get_level_values("finding").map({"Effusion": 2, "Mass": 2, "all": 3})
    for bound in bounds[::2]:
        np.testing.assert_allclose(table.loc["map"][bound], 0.025 ** (1 / patients))
    # Areas 0.2, 0.15, 0.16 (the larger), 0.16: all above 0.1, none above 0.2.
    assert (table.loc["uniform"]["at 0.1"] == 1).all()
    assert (table.loc["uniform"][shares[1:]] == 0).all(axis=None)
    counts = table["images"].unstack("finding").drop_duplicates()
    assert counts.to_numpy().tolist() == [[2, 2, 4]]


def test_a_table_about_one_patient_has_no_intervals():
    found = {"map": localization.best_overlaps([localization.box_masks(TRUTH[0], (20, 30))], TRUTH[:1])}
    table = localization.overlap_table(found, ["Mass"], [7], resamples=20, rng=np.random.default_rng(0))
    shares = [f"at {overlap}" for overlap in localization.OVERLAPS]
    assert (table[shares] == 1).all(axis=None)
    assert table[[f"{share} {bound}" for share in shares for bound in ("low", "high")]].isna().all(axis=None)


def test_the_table_counts_overlaps_above_the_threshold_by_finding():
    maps = [localization.box_masks(of, (20, 20)) * 1.0 for of in TRUTH]
    maps[0][...] = 0  # a "Mass" that nothing was detected for
    maps[1] = localization.box_masks([[0, 0, 0.1, 0.5]], (20, 20))  # a third of an "Effusion"
    table = table_of(maps)["at 0.5"].loc["map"]
    assert table["Mass"].to_dict() == {"IoU": 0.5, "IoBB": 0.5}
    assert table["Effusion"].to_dict() == {"IoU": 0.5, "IoBB": 1}
    assert table["all"].to_dict() == {"IoU": 0.5, "IoBB": 0.75}


def test_the_gaussian_row_is_that_of_gaussian_maps_given_as_maps():
    maps = [localization.centred_gaussian_map(shape) for shape in ((40, 40), (30, 50), (40, 40), (20, 60))]
    table = table_of(maps, thresholds=[0.5, 0.7], overlaps=[0.15, 0.3])
    shares = table.loc["map"][["at 0.15", "at 0.3"]]
    assert 0 < shares.to_numpy().mean() < 1
    pd.testing.assert_frame_equal(table.loc["map"], table.loc["centred Gaussian"])
    # Columns (x - 19.5) / 10 within sqrt(2 ln 2) = 1.177 of the centre: 8 to 31 of 40, 24 / 40 wide.
    detected = [[8 / 40, 8 / 40, 24 / 40, 24 / 40]]
    best = localization.best_overlaps(maps[:1], TRUTH[:1], thresholds=[0.5])
    np.testing.assert_allclose(best.iou, localization.iou(detected, TRUTH[0])[0])


def test_images_without_a_box_are_left_out_of_the_table():
    maps = [localization.box_masks(of, (20, 20)) for of in TRUTH]
    best = localization.best_overlaps([*maps, maps[0]], [*TRUTH, np.zeros((0, 4))])
    table = localization.overlap_table(
        {"map": best}, [*LABELS, "Mass"], [*PATIENTS, 1], resamples=50, rng=np.random.default_rng(0)
    )
    assert table.loc[("map", "all", "IoU"), ["images", "at 0.7"]].to_list() == [4, 1]


def test_what_of_a_true_box_lies_beyond_the_image_cannot_be_missed():
    truth = np.array([[0.8, 0.8, 0.3, 0.3]])
    best = localization.best_overlaps([localization.box_masks(truth, (20, 20))], [truth])
    np.testing.assert_allclose(best.iou, [1])
    outside = localization.best_overlaps([np.ones((4, 4))], [np.array([[1.2, 0.1, 0.2, 0.2]])])
    assert np.isnan(outside.iou).all()
