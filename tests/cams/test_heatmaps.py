"""Overlays, boxes and colour bars agree with scipy and with values calculated by hand."""

import cv2
import numpy as np
import pytest
from scipy import ndimage

from cams.heatmaps import boxes_from_map, draw_boxes, overlay, with_colour_bar

WHITE = (255, 255, 255)


def grey(height, width=None, value=90):
    return np.full((height, width or height, 3), value, dtype=np.uint8)


def test_overlay_leaves_the_xray_untouched_where_the_map_is_zero():
    rng = np.random.default_rng(0)
    xray = rng.integers(0, 256, (40, 30), dtype=np.uint8)
    map_ = np.zeros((40, 30))
    map_[10:20, 5:15] = np.linspace(0.1, 1, 100).reshape(10, 10)
    colours = overlay(xray, map_, alpha=0.5)
    assert colours.shape == (40, 30, 3)
    np.testing.assert_array_equal(colours[map_ == 0], np.repeat(xray[..., None], 3, 2)[map_ == 0])
    assert (np.ptp(colours[map_ > 0.5].astype(int), axis=1) > 20).all()
    # At the peak the pixel is half X-ray and half the last colour of the colour map. Plasma ends in yellow.
    expected = 0.5 * xray[19, 14] + 0.5 * np.array([240, 249, 33])
    assert np.abs(colours[19, 14] - expected).max() <= 2


def test_overlay_refuses_wrong_shapes_and_values():
    xray = np.zeros((8, 8), np.uint8)
    with pytest.raises(ValueError, match="upsample the map"):
        overlay(xray, np.zeros((4, 4)))
    for bad in (-0.1, 1.5, np.nan):
        with pytest.raises(ValueError, match="divide it by its maximum"):
            overlay(xray, np.full((8, 8), bad))


def test_a_box_covers_its_whole_region_and_the_largest_comes_first():
    map_ = np.zeros((10, 20))
    map_[1, 2] = 3  # one pixel
    map_[5:8, 10:16] = 2
    map_[0, 19] = 0.5
    np.testing.assert_allclose(
        boxes_from_map(map_, 0.5), [[10 / 20, 5 / 10, 6 / 20, 3 / 10], [2 / 20, 1 / 10, 1 / 20, 1 / 10]]
    )
    np.testing.assert_allclose(boxes_from_map(1e-9 * map_.astype(np.float32), 1), [[0.1, 0.1, 0.05, 0.1]])
    assert len(boxes_from_map(map_, 0.5 / 3)) == 3  # a value equal to the threshold belongs to the region


def test_the_region_with_most_pixels_comes_first_not_the_largest_box():
    map_ = np.zeros((12, 12))
    map_[:4, :4] = 1  # 16 pixels
    map_[np.arange(4, 12), np.arange(4, 12)] = 0  # separates the two regions
    map_[11, 2:12] = map_[6:12, 11] = 1  # 15 pixels in an L, a box of 60
    np.testing.assert_allclose(boxes_from_map(map_, 0.5)[:, 2:] * 12, [[4, 4], [10, 6]])


def test_pixels_that_meet_at_a_corner_are_one_region():
    np.testing.assert_allclose(boxes_from_map(np.eye(5), 0.5), [[0, 0, 1, 1]])


def test_boxes_are_those_of_scipy_on_noise():
    map_ = ndimage.gaussian_filter(np.random.default_rng(0).random((60, 90)), 3)
    map_ -= map_.min()
    regions, number = ndimage.label(map_ >= 0.6 * map_.max(), structure=np.ones((3, 3)))
    expected = [
        [x.start / 90, y.start / 60, (x.stop - x.start) / 90, (y.stop - y.start) / 60]
        for y, x in ndimage.find_objects(regions)
    ]
    boxes = boxes_from_map(map_, 0.6)
    assert len(boxes) == number > 5
    np.testing.assert_allclose(sorted(boxes.tolist()), sorted(expected))


def test_a_zero_map_has_no_box_and_a_uniform_one_the_whole_image():
    assert boxes_from_map(np.zeros((4, 7)), 0.5).shape == (0, 4)
    np.testing.assert_allclose(boxes_from_map(np.ones((4, 7)), 1), [[0, 0, 1, 1]])


def test_boxes_of_several_maps_or_of_nan_are_refused():
    for map_ in (np.ones((2, 4, 4)), np.full((4, 4), np.nan)):
        with pytest.raises(ValueError, match="one map at a time"):
            boxes_from_map(map_, 0.5)


def test_a_box_is_drawn_as_an_outline_on_a_copy():
    picture = grey(20, 40)
    drawn = draw_boxes(picture, [[0.25, 0.2, 0.5, 0.5]])
    assert (picture == 90).all()
    expected = grey(20, 40)
    expected[4:14, 10:30] = 255
    expected[5:13, 11:29] = 90
    np.testing.assert_array_equal(drawn, expected)


@pytest.mark.parametrize("size", [5, 64, 1024])
def test_all_four_sides_of_a_box_at_or_beyond_the_border_are_visible(size):
    for box in ([0, 0, 1, 1], [-0.2, -0.5, 3, 2]):
        drawn = (draw_boxes(grey(size), [box]) == WHITE).all(axis=2)
        assert drawn[0].all()
        assert drawn[-1].all()
        assert drawn[:, 0].all()
        assert drawn[:, -1].all()
        assert not drawn[size // 2, size // 2]
    for corner in ([1, 1, 0.1, 0.1], [0.9999, 0.9999, 0.0001, 0.0001]):
        drawn = (draw_boxes(grey(size), [corner]) == WHITE).all(axis=2)
        assert drawn.sum() == drawn[-1, -1] == 1


def test_lines_are_wider_on_larger_images_and_without_boxes_nothing_changes():
    widths = [(draw_boxes(grey(size), [[0, 0, 1, 1]])[:, size // 2, 0] == 255).sum() for size in (64, 2500)]
    assert widths == [2, 20]
    np.testing.assert_array_equal(draw_boxes(grey(9), np.zeros((0, 4))), grey(9))


@pytest.mark.parametrize("height", [64, 224, 1024, 3000])
@pytest.mark.parametrize("peak", [None, 1.234e-5, 0.0123, 98765.0])
def test_the_colour_bar_leaves_the_image_unchanged_and_its_numbers_whole(height, peak):
    picture = np.random.default_rng(0).integers(0, 256, (height, 50, 3), dtype=np.uint8)
    wider = with_colour_bar(picture, peak=peak)
    assert wider.dtype == np.uint8
    assert wider.shape[0] == height
    np.testing.assert_array_equal(wider[:, :50], picture)
    bar = wider[:, 50:]
    for edge in (bar[0], bar[-1], bar[:, 0], bar[:, -1]):
        assert (edge == 0).all()
    # Three numbers are to the right of the ticks, one below the other, each at least 7 pixels high, with black between.
    coloured = np.flatnonzero((np.ptp(bar.astype(int), axis=2) > 20).any(axis=0))
    ink = bar[:, coloured[-1] + 1 :, 0] > 0
    ticks = np.flatnonzero(ink[:, 0])
    ink = ink[:, np.flatnonzero(~ink.any(axis=0))[0] :].any(axis=1)
    rows = np.flatnonzero(np.diff(np.r_[0, ink.astype(int), 0])).reshape(-1, 2)
    assert len(rows) == 3
    assert (np.diff(rows, axis=1) >= 7).all()
    # The middle of each number is at its tick.
    ticks = [group.mean() for group in np.split(ticks, np.flatnonzero(np.diff(ticks) > 1) + 1)]
    np.testing.assert_allclose(rows.mean(axis=1) - 0.5, ticks, atol=1)


def test_the_colour_bar_shows_the_overlay_on_mid_grey():
    bar = with_colour_bar(grey(256, 8), alpha=0.5, colormap="jet")[:, 8:]
    column = np.flatnonzero((np.ptp(bar.astype(int), axis=2) > 20).any(axis=0))[2]
    colours = bar[:, column][bar[:, column].any(axis=1)]
    values = np.linspace(1, 0, len(colours))[:, None]
    np.testing.assert_array_equal(
        colours, overlay(np.full(values.shape, 128, np.uint8), values, alpha=0.5, colormap="jet")[:, 0]
    )
    assert colours[-1].tolist() == [128] * 3  # no evidence, no colour
    jet = cv2.applyColorMap(np.full((1, 1), 255, np.uint8), cv2.COLORMAP_JET)[0, 0, ::-1]
    np.testing.assert_allclose(colours[0], 64 + jet / 2, atol=1)


def test_the_numbers_are_values_of_the_raw_map():
    one, same = (with_colour_bar(grey(224), peak=peak) for peak in (None, 1.0))
    np.testing.assert_array_equal(one, same)
    np.testing.assert_array_equal(  # to three digits
        with_colour_bar(grey(224), peak=3.14159), with_colour_bar(grey(224), peak=3.14)
    )
    two = with_colour_bar(grey(224), peak=2.0)
    assert one.shape[1] > two.shape[1]  # "0.5" is wider than "0", "1" and "2"


def test_the_bar_of_an_empty_map_has_one_number():
    empty = with_colour_bar(grey(224), peak=0.0)
    assert (empty[:, -20:] > 0).any(axis=(1, 2)).sum() < 20  # not higher than one number


def test_low_pictures_get_a_bar_too():
    for height in (1, 3, 16):
        assert with_colour_bar(grey(height), peak=1.0).shape[0] == height
