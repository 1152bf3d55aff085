"""Claims about the panels of X-rays that panels.py draws, read back from the figures."""

import numpy as np
import pytest
from figure_claims import inside_figure, legend_texts
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from cams.heatmaps import overlay
from cams.panels import (
    RIGHT,
    WRONG,
    CamPanel,
    CamRow,
    draw_augmentations,
    draw_cam_grid,
    draw_grad_cams,
    draw_lung_segmentations,
    draw_mean_images,
    draw_samples,
)

CLASSES = ["COVID-19", "Lung Opacity", "Normal", "Viral Pneumonia"]


@pytest.fixture
def fig():
    return Figure(figsize=(9, 5), layout="constrained")


def grey(seed=0, size=24):
    return np.random.default_rng(seed).integers(256, size=(size, size), dtype=np.uint8)


def test_sample_grid_has_a_row_for_each_class_on_a_fixed_grey_scale(fig):
    images = {name: [grey(10 * i + j) for j in range(3)] for i, name in enumerate(CLASSES)}
    assert draw_samples(fig, images) is fig
    axes = np.reshape(fig.axes, (4, 3))
    assert [row[0].get_ylabel().replace("\n", " ") for row in axes] == CLASSES
    for i, name in enumerate(CLASSES):
        for j in range(3):
            (drawn,) = axes[i, j].images
            assert np.array_equal(drawn.get_array(), images[name][j])
            assert drawn.get_clim() == (0, 255)
            assert axes[i, j].get_aspect() == 1
    assert inside_figure(fig)


def test_a_class_with_fewer_samples_leaves_places_empty(fig):
    draw_samples(fig, {"Normal": [grey()] * 3, "COVID-19": [grey()]})
    assert [len(ax.images) for ax in fig.axes] == [1, 1, 1, 1, 0, 0]


def test_mean_images_share_one_grey_scale(fig):
    means = {name: np.full((8, 8), 40.0 * i) + np.eye(8) for i, name in enumerate(CLASSES)}
    draw_mean_images(fig, means)
    panels = fig.axes[:4]
    assert [ax.get_title() for ax in panels] == CLASSES
    assert {ax.images[0].get_clim() for ax in panels} == {(0, 121)}


def test_augmentations_follow_their_original_five_in_a_row(fig):
    images = [grey(i) for i in range(8)]
    draw_augmentations(fig, images[0], images[1:])
    axes = np.reshape(fig.axes, (2, 5))
    for ax, image in zip(axes.flat, images, strict=False):
        assert np.array_equal(ax.images[0].get_array(), image)
    assert [ax.get_title() for ax in axes[0, :2]] == ["original", "augmented 1"]
    assert all(not ax.images and not ax.spines["left"].get_visible() for ax in axes[1, 3:])
    assert inside_figure(fig)


def test_lungs_are_outlined_above_the_network_input_and_failures_are_written_in_red(fig):
    mask = np.zeros((24, 24), dtype=bool)
    mask[4:20, 3:9] = True
    images = [grey(i) for i in range(3)]
    seen = [images[0] * mask, images[1] * mask, images[2]]
    draw_lung_segmentations(fig, images, [mask, mask, 0 * mask], [None, None, "one lung only"], seen)
    above, below = np.reshape(fig.axes, (2, 3))
    for i in range(3):
        assert np.array_equal(above[i].images[0].get_array(), images[i])
        assert np.array_equal(below[i].images[0].get_array(), seen[i])
    assert [len(ax.collections) for ax in above] == [1, 1, 0]
    labels = [ax.get_xlabel().replace("\n", " ") for ax in below]
    assert labels == ["", "", "kept whole: one lung only"]
    assert to_hex(below[2].xaxis.label.get_color()) == WRONG
    assert inside_figure(fig)


def test_lungs_of_a_study_without_masking_are_drawn_without_a_network_input(fig):
    mask = np.zeros((24, 24), bool)
    mask[4:20, 3:9] = True
    draw_lung_segmentations(fig, [grey(0), grey(1)], [mask, mask], [None, "one lung only"], None)
    assert len(fig.axes) == 2
    assert [ax.get_ylabel() for ax in fig.axes] == ["lungs\nfound", ""]
    assert [ax.get_xlabel().replace("\n", " ") for ax in fig.axes] == ["", "not believed: one lung only"]
    assert inside_figure(fig)


def cam_rows(**masks):
    map_ = np.zeros((24, 24))
    map_[6:12, 6:12] = 1
    panels = {
        "vgg16": CamPanel(map_, "Normal", 0.9, True),
        "resnet18": CamPanel(np.zeros((24, 24)), "COVID-19", 0.6, False),
    }
    wrong = {name: panel._replace(correct=not panel.correct) for name, panel in panels.items()}
    return [CamRow(grey(0), "Normal", panels, **masks), CamRow(grey(1), "COVID-19", wrong, **masks)]


def test_cam_panels_name_the_prediction_and_mark_it_by_sign_and_colour(fig):
    rows = cam_rows()
    draw_grad_cams(fig, rows)
    axes = np.reshape(fig.axes[:6], (2, 3))
    assert [ax.get_title() for ax in axes[0]] == ["original", "vgg16", "resnet18"]
    assert [ax.get_ylabel() for ax in axes[:, 0]] == ["Normal", "COVID-19"]
    labels = [[ax.xaxis.label.get_text() for ax in row[1:]] for row in axes]
    assert labels == [["Normal 0.90 ✓", "COVID-19 0.60 ✗"], ["Normal 0.90 ✗", "COVID-19 0.60 ✓"]]
    colors = [[to_hex(ax.xaxis.label.get_color()) for ax in row[1:]] for row in axes]
    assert colors == [[RIGHT, WRONG], [WRONG, RIGHT]]
    np.testing.assert_array_equal(axes[1, 0].images[0].get_array(), rows[1].image)
    expected = overlay(rows[1].image, rows[1].panels["vgg16"].map)
    np.testing.assert_array_equal(axes[1, 1].images[0].get_array(), expected)
    assert len(fig.axes) == 7
    assert inside_figure(fig)


def test_a_map_without_positive_evidence_says_so(fig):
    draw_grad_cams(fig, cam_rows())
    notes = [[t.get_text() for t in ax.texts] for ax in fig.axes[:3]]
    assert notes == [[], [], ["no positive evidence"]]


def test_outlines_follow_the_masks_and_are_named(fig):
    lesion = np.zeros((24, 24), dtype=bool)
    lesion[3:8, 10:20] = True
    # A mask at the edge of the image is outlined there too.
    draw_grad_cams(fig, cam_rows(lesion=lesion, lung=np.ones((24, 24))))
    lung, drawn = fig.axes[1].collections
    corners = np.concatenate([path.vertices for path in drawn.get_paths()])
    assert corners.min(axis=0).tolist() == [9.5, 2.5]
    assert corners.max(axis=0).tolist() == [19.5, 7.5]
    edge = np.concatenate([path.vertices for path in lung.get_paths()])
    assert (edge.min(), edge.max()) == (-0.5, 23.5)
    assert fig.axes[1].get_xlim() == (-0.5, 23.5)
    assert legend_texts(fig.legends[0]) == ["lesion", "lung"]


def test_empty_and_missing_masks_draw_nothing(fig):
    draw_grad_cams(fig, cam_rows(lesion=np.zeros((24, 24))))
    assert all(not ax.collections for ax in fig.axes[:6])


def test_a_panel_can_have_its_own_background_and_no_mark(fig):
    map_ = np.full((24, 24), 0.5)
    masked = grey(5)
    panels = {
        "other class": CamPanel(map_, "COVID-19", 0.1, None),
        "lungs only": CamPanel(map_, "Normal", 0.8, True, image=masked),
        "not reported": CamPanel(map_, "Hernia", np.nan, None),
    }
    draw_grad_cams(fig, [CamRow(grey(), "Normal", panels)])
    _, other, lungs, unreported = fig.axes[:4]
    assert unreported.get_xlabel() == "Hernia –"
    assert other.get_xlabel() == "COVID-19 0.10"
    assert to_hex(other.xaxis.label.get_color()) not in (RIGHT, WRONG)
    np.testing.assert_array_equal(other.images[0].get_array(), overlay(grey(), map_))
    assert lungs.get_xlabel() == "Normal 0.80 ✓"
    np.testing.assert_array_equal(lungs.images[0].get_array(), overlay(masked, map_))


def cam_sample(predicted="Pneumonia", truth="Pneumonia", correct=True, **more):
    map_ = np.zeros((24, 24))
    map_[6:12, 6:12] = 1
    panel = CamPanel(map_, predicted, 0.7, correct)
    return CamRow(grey(), truth, {"Grad-CAM": panel}, **more)


def test_cam_grid_has_a_row_for_each_group_and_a_note_for_an_empty_group():
    fig = Figure(figsize=(10, 7), layout="constrained")
    box = (0.25, 0.5, 0.25, 0.125)
    groups = {
        "true positive": [cam_sample(boxes=[box])] * 5,
        "false positive": [cam_sample(truth="Normal", correct=False)],
        "false negative": [],
    }
    draw_cam_grid(fig, groups)
    axes = np.reshape(fig.axes[:15], (3, 5))
    assert [[len(ax.images) for ax in row] for row in axes] == [[1] * 5, [1, 0, 0, 0, 0], [0] * 5]
    assert [row[0].get_ylabel().replace("\n", " ") for row in axes] == list(groups)
    np.testing.assert_array_equal(
        axes[0, 0].images[0].get_array(), overlay(grey(), cam_sample().panels["Grad-CAM"].map)
    )
    right, wrong = axes[:2, 0]
    assert (right.get_title(), right.get_xlabel()) == ("Pneumonia 0.70 ✓", "true: Pneumonia")
    assert (wrong.get_title(), wrong.get_xlabel()) == ("Pneumonia 0.70 ✗", "true: Normal")
    assert [to_hex(ax.title.get_color()) for ax in (right, wrong)] == [RIGHT, WRONG]
    assert [t.get_text().replace("\n", " ") for t in axes[2, 0].texts] == ["none in the test images"]
    (drawn,) = right.patches
    assert drawn.get_bbox().bounds == pytest.approx((5.5, 11.5, 6, 3))
    assert legend_texts(fig.legends[0]) == ["annotated box"]
    assert inside_figure(fig)


def test_cam_grid_of_findings_breaks_long_names_and_marks_empty_maps():
    fig = Figure(figsize=(10, 7), layout="constrained")
    shown = cam_sample("Pleural_Thickening", "Effusion, Infiltration, Pleural_Thickening")
    empty = CamPanel(np.zeros((24, 24)), "Mass", 0.7, True)
    groups = {"Pleural_Thickening": [shown] * 4, "Mass": [shown._replace(panels={"Grad-CAM": empty})]}
    draw_cam_grid(fig, groups)
    assert fig.axes[0].get_title().replace("\n", " ") == "Pleural_Thickening 0.70 ✓"
    assert [t.get_text() for t in fig.axes[4].texts] == ["no positive evidence"]
    assert not fig.legends
    assert inside_figure(fig)


def test_a_grid_without_any_sample_is_drawn(fig):
    draw_cam_grid(fig, {"false positive": [], "false negative": []})
    assert [ax.texts[0].get_text() for ax in fig.axes[:2]] == ["none in the\ntest images"] * 2


def test_annotated_boxes_are_drawn_and_named(fig):
    image = np.full((50, 100), 90, np.uint8)
    panels = {"LayerCAM": CamPanel(np.zeros((50, 100)), "Mass", 0.4, True)}
    row = CamRow(image, "Mass", panels, boxes=[(0.1, 0.2, 0.3, 0.4)])
    draw_grad_cams(fig, [row])
    original, overlaid = fig.axes[:2]
    for ax in (original, overlaid):
        (box,) = [patch for patch in ax.patches if patch.get_width() > 1]
        assert (*box.get_xy(), box.get_width(), box.get_height()) == pytest.approx((9.5, 9.5, 30, 20))
    assert [text.get_text() for text in fig.legends[0].texts] == ["annotated box"]
