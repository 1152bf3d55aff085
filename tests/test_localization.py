"""Claims about localization.py, with answers from closed forms and by hand."""

import numpy as np
import pytest

import localization


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


def test_the_table_gives_a_perfect_map_one_and_the_uniform_map_the_area():
    masks = boxes()
    masks[:5] = False
    table = localization.pointing_table(
        masks * 1.0, masks, np.arange(40) // 2, resamples=200, rng=np.random.default_rng(0)
    )
    assert table.index.to_list() == ["map", "centred Gaussian", "uniform"]
    assert table.loc["map", ["hit_rate", "hit_rate_low", "mass", "mass_high"]].to_list() == pytest.approx(
        [1] * 4
    )
    area = masks[5:].mean(axis=(1, 2)).mean()
    assert table.loc["uniform", ["hit_rate", "mass"]].to_list() == pytest.approx([area, area])
    assert (table["images"] == 35).all()
    assert (table["hit_rate_low"] <= table["hit_rate"]).all()
    assert (table["hit_rate"] <= table["hit_rate_high"]).all()


def test_the_same_map_in_all_rows_gets_the_same_interval():
    masks = boxes()
    uniform = np.ones(masks.shape)
    table = localization.pointing_table(
        uniform, masks, np.arange(40), resamples=100, rng=np.random.default_rng(0)
    )
    columns = ["mass", "mass_low", "mass_high"]
    assert table.loc["map", columns].to_list() == table.loc["uniform", columns].to_list()


def test_maps_and_masks_of_two_resolutions_are_refused_with_the_remedy():
    with pytest.raises(ValueError, match="upsample the maps"):
        localization.peak_inside(np.ones((2, 7, 7)), np.ones((2, 14, 14)))


def test_negative_or_missing_map_values_are_refused():
    with pytest.raises(ValueError, match="positive part"):
        localization.mass_inside(np.full((1, 2, 2), -1.0), np.ones((1, 2, 2)))
    with pytest.raises(ValueError, match="finite"):
        localization.mass_inside(np.full((1, 2, 2), np.nan), np.ones((1, 2, 2)))
