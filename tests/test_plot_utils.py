"""Claims about what plot_utils.py draws, read back from the figures."""

import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

import plot_utils
from grad_cam import overlay

CLASSES = ["COVID-19", "Lung Opacity", "Normal", "Viral Pneumonia"]
NETWORKS = ["vgg16", "resnet18", "densenet121"]


@pytest.fixture
def fig():
    return Figure(figsize=(9, 5), layout="constrained")


@pytest.fixture
def ax(fig):
    return fig.subplots()


def grey(seed=0, size=24):
    return np.random.default_rng(seed).integers(256, size=(size, size), dtype=np.uint8)


def legend_texts(legend):
    return [text.get_text() for text in legend.get_texts()]


def inside_figure(fig):
    """Return whether, once laid out, no label or legend lies outside of the figure (1 pixel of rounding allowed)."""
    canvas = FigureCanvasAgg(fig)
    canvas.draw()
    renderer = canvas.get_renderer()
    boxes = [artist.get_tightbbox(renderer) for artist in (*fig.axes, *fig.legends, *fig.texts)]
    width, height = fig.bbox.width, fig.bbox.height
    return all(b.x0 >= -1 and b.y0 >= -1 and b.x1 <= width + 1 and b.y1 <= height + 1 for b in boxes)


def test_importing_leaves_matplotlibs_settings_alone():
    code = "import matplotlib as m; before = dict(m.rcParams); import plot_utils; assert dict(m.rcParams) == before"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_name_keeps_its_colour_in_every_figure_with_the_same_names():
    colors = plot_utils.palette(NETWORKS)
    assert list(colors) == NETWORKS
    assert len(set(colors.values())) == len(NETWORKS)
    assert colors == plot_utils.palette(NETWORKS)


# Notebook 1


def test_sample_grid_has_a_row_a_class_on_the_fixed_grey_scale(fig):
    images = {name: [grey(10 * i + j) for j in range(3)] for i, name in enumerate(CLASSES)}
    assert plot_utils.draw_samples(fig, images) is fig
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
    plot_utils.draw_samples(fig, {"Normal": [grey()] * 3, "COVID-19": [grey()]})
    assert [len(ax.images) for ax in fig.axes] == [1, 1, 1, 1, 0, 0]


def test_class_counts_are_the_heights_and_the_numbers_of_the_bars(fig, ax):
    counts = pd.DataFrame({"train": [10, 20, 3000, 4], "test": [1, 2, 3, 0]}, index=CLASSES)
    assert plot_utils.plot_class_counts(counts, ax) is ax
    for split, bars in zip(counts.columns, ax.containers, strict=True):
        assert [bar.get_height() for bar in bars] == counts[split].to_list()
    assert [t.get_text() for t in ax.texts] == ["10", "20", "3,000", "4", "1", "2", "3", "0"]
    assert [t.get_text() for t in ax.get_xticklabels()] == CLASSES
    assert legend_texts(ax.get_legend()) == ["train", "test"]
    assert inside_figure(fig)


def test_counts_of_a_few_images_have_whole_numbers_at_the_axis(fig, ax):
    plot_utils.plot_class_counts(pd.DataFrame({"test": [1, 2]}, index=CLASSES[:2]), ax)
    fig.canvas.draw()
    assert all(tick == round(tick) for tick in ax.get_yticks())


def test_draws_are_shares_of_each_way_of_sampling(ax):
    draws = pd.DataFrame({"as they come": [10, 30], "weighted": [500, 500]}, index=CLASSES[:2])
    plot_utils.plot_draws(draws, ax)
    heights = [[bar.get_height() for bar in bars] for bars in ax.containers]
    assert heights == [[25, 75], [50, 50]]
    assert list(ax.lines[0].get_ydata()) == [50, 50]


def test_image_sizes_are_drawn_once_each_with_areas_in_proportion(fig, ax):
    sizes = pd.DataFrame(
        [(300, 200, "Normal")] * 40 + [(500, 600, "Normal")] * 10 + [(300, 200, "COVID-19")] * 20,
        columns=["width", "height", "class"],
    )
    plot_utils.plot_image_sizes(sizes, ax)
    normal, covid = ax.collections
    points = {
        tuple(xy): area for xy, area in zip(normal.get_offsets().tolist(), normal.get_sizes(), strict=True)
    }
    assert points[300, 200] == pytest.approx(4 * points[500, 600])
    assert covid.get_offsets().tolist() == [[300, 200]]
    assert covid.get_sizes()[0] == pytest.approx(points[300, 200] / 2)
    assert legend_texts(ax.get_legend()) == [
        "Normal: 50 images, 2 sizes",
        "COVID-19: 20 images, 1 size",
        "square",
    ]
    assert ax.get_xlim()[0] == ax.get_ylim()[0] == 0
    assert inside_figure(fig)


def test_intensity_lines_are_means_over_images_and_bands_quartiles(ax):
    edges = np.linspace(0, 255, 6)
    densities = np.random.default_rng(0).random((9, 5))
    plot_utils.plot_intensities({"Normal": densities, "COVID-19": densities + 1}, edges, ax)
    np.testing.assert_allclose(ax.lines[0].get_ydata(), densities.mean(axis=0))
    np.testing.assert_allclose(ax.lines[0].get_xdata(), [25.5, 76.5, 127.5, 178.5, 229.5])
    corners = ax.collections[0].get_paths()[0].vertices
    low, high = np.percentile(densities[:, 0], [25, 75])
    at_first = corners[np.isclose(corners[:, 0], 25.5), 1]
    assert (at_first.min(), at_first.max()) == pytest.approx((low, high))


def test_mean_images_share_one_grey_scale(fig):
    means = {name: np.full((8, 8), 40.0 * i) + np.eye(8) for i, name in enumerate(CLASSES)}
    plot_utils.draw_mean_images(fig, means)
    panels = fig.axes[:4]
    assert [ax.get_title() for ax in panels] == CLASSES
    assert {ax.images[0].get_clim() for ax in panels} == {(0, 121)}


def test_augmentations_stand_beside_their_original(fig):
    originals = [grey(0), grey(1)]
    augmented = [[image[:, ::-1], image[::-1]] for image in originals]
    plot_utils.draw_augmentations(fig, originals, augmented)
    axes = np.reshape(fig.axes, (2, 3))
    for row, original, versions in zip(axes, originals, augmented, strict=True):
        for ax, image in zip(row, [original, *versions], strict=True):
            assert np.array_equal(ax.images[0].get_array(), image)
    assert axes[0, 0].get_title() == "original"


# Notebook 2


def histories():
    rng = np.random.default_rng(0)
    columns = ["train_loss", "train_accuracy", "val_loss", "val_accuracy"]
    made = {name: pd.DataFrame(rng.random((6, 4)), columns=columns) for name in NETWORKS}
    return {name: history.assign(epoch=np.arange(1, 7)) for name, history in made.items()}


def test_learning_curves_hold_the_histories_values(fig):
    tables = histories()
    plot_utils.draw_learning_curves(fig, tables)
    colors = plot_utils.palette(NETWORKS)
    for ax, figure in zip(fig.axes, ("loss", "accuracy"), strict=True):
        lines = np.reshape(ax.lines, (3, 3))
        for name, (train, val, star) in zip(NETWORKS, lines, strict=True):
            history = tables[name]
            np.testing.assert_array_equal(train.get_ydata(), history[f"train_{figure}"])
            np.testing.assert_array_equal(val.get_ydata(), history[f"val_{figure}"])
            np.testing.assert_array_equal(val.get_xdata(), history["epoch"])
            assert (train.get_linestyle(), val.get_linestyle()) == ("--", "-")
            assert train.get_color() == val.get_color() == colors[name]
            best = history["val_loss"].argmin()
            assert star.get_xdata()[0] == best + 1
            assert star.get_ydata()[0] == history[f"val_{figure}"][best]
    assert legend_texts(fig.legends[0])[:3] == NETWORKS
    assert inside_figure(fig)


def test_the_best_epoch_by_loss_is_the_lowest(fig):
    tables = histories()
    plot_utils.draw_learning_curves(fig, tables, best_by="val_loss")
    star = fig.axes[0].lines[2]
    assert star.get_ydata()[0] == tables["vgg16"]["val_loss"].min()


def test_grids_also_fill_a_part_of_a_figure(fig):
    left, right = fig.subfigures(1, 2)
    assert plot_utils.draw_learning_curves(left, histories()) is left
    plot_utils.draw_samples(right, {"Normal": [grey()]})
    fig.canvas.draw()
    assert len(left.axes) == 2
    assert len(right.axes) == 1


# Notebook 3


def test_confusion_texts_equal_the_counts_and_row_i_is_the_true_class(fig, ax):
    counts = np.arange(16).reshape(4, 4) ** 2
    counts[1] = 0
    plot_utils.plot_confusion(counts, CLASSES, ax)
    written = {}
    for text in ax.texts:
        column, row = text.xy
        written.setdefault((row, column), []).append(text.get_text())
    for row in range(4):
        for column in range(4):
            total = counts[row].sum()
            percent = f"{counts[row, column] / total:.1%}" if total else "–"
            assert written[row, column] == [str(counts[row, column]), percent]
    assert ax.get_ylabel() == "true class"
    assert ax.get_xlabel() == "predicted class"
    assert [t.get_text() for t in ax.get_yticklabels()] == [
        f"{name}\n(n = {n})" for name, n in zip(CLASSES, counts.sum(axis=1), strict=True)
    ]
    assert [t.get_text().replace("\n", " ") for t in ax.get_xticklabels()] == CLASSES
    # Row 0 is on top, as in the array.
    assert ax.get_ylim()[0] > ax.get_ylim()[1]
    assert inside_figure(fig)


def test_roc_curves_have_their_area_in_the_legend_and_chance_beside_them(ax):
    rates = (np.array([0, 0.2, 1]), np.array([0, 0.9, 1]))
    curves = {"Normal": (*rates, 0.8512), "COVID-19": (np.empty(0), np.empty(0), np.nan)}
    plot_utils.plot_roc(curves, ax)
    texts = legend_texts(ax.get_legend())
    assert texts == ["Normal (0.851)", "COVID-19 (no images)", "chance (0.500)"]
    chance, normal, _ = ax.lines
    np.testing.assert_array_equal(chance.get_xdata(), chance.get_ydata())
    np.testing.assert_array_equal(normal.get_xdata(), rates[0])
    np.testing.assert_array_equal(normal.get_ydata(), rates[1])


def test_whiskers_reach_from_low_to_high_and_a_missing_interval_is_a_bare_dot(fig, ax):
    rows = [
        ("vgg16", "accuracy", 0.8, 0.7, 0.85),
        ("resnet18", "accuracy", 0.9, 0.88, 0.95),
        ("vgg16", "recall", 0.6, np.nan, np.nan),
        ("resnet18", "recall", 0.7, 0.6, 0.8),
    ]
    table = pd.DataFrame(rows, columns=["network", "metric", "estimate", "low", "high"])
    plot_utils.plot_comparison(table, ax)
    for name, container in zip(["vgg16", "resnet18"], ax.containers, strict=True):
        own = table[table["network"] == name]
        markers, _, (whiskers,) = container
        np.testing.assert_allclose(markers.get_xdata().astype(float), own["estimate"])
        drawn = np.array([segment[:, 0] for segment in whiskers.get_segments() if len(segment)])
        np.testing.assert_allclose(drawn, own[["low", "high"]].dropna())
    assert [t.get_text() for t in ax.get_yticklabels()] == ["accuracy", "recall"]
    assert [t.get_text() for t in ax.texts] == ["0.800", "0.600", "0.900", "0.700"]
    assert inside_figure(fig)


def test_reliability_points_are_the_filled_bins(ax):
    table = pd.DataFrame(
        {"confidence": [np.nan, 0.5, 0.9], "accuracy": [np.nan, 0.4, 0.95], "count": [0, 10, 30]}
    )
    plot_utils.plot_reliability({"vgg16": table}, ax)
    (points,) = ax.collections
    assert points.get_offsets().tolist() == [[0.5, 0.4], [0.9, 0.95]]
    small, large = points.get_sizes()
    assert large == pytest.approx(3 * small)


def cam_rows(**masks):
    map_ = np.zeros((24, 24))
    map_[6:12, 6:12] = 1
    panels = {
        "vgg16": plot_utils.CamPanel(map_, "Normal", 0.9),
        "resnet18": plot_utils.CamPanel(np.zeros((24, 24)), "COVID-19", 0.6),
    }
    return [
        plot_utils.CamRow(grey(i), truth, panels, **masks) for i, truth in enumerate(["Normal", "COVID-19"])
    ]


def test_cam_panels_say_what_was_predicted_and_mark_right_and_wrong_twice(fig):
    rows = cam_rows()
    plot_utils.draw_grad_cams(fig, rows)
    axes = np.reshape(fig.axes[:6], (2, 3))
    assert [ax.get_title() for ax in axes[0]] == ["original", "vgg16", "resnet18"]
    assert [ax.get_ylabel() for ax in axes[:, 0]] == ["Normal", "COVID-19"]
    labels = [[ax.xaxis.label.get_text() for ax in row[1:]] for row in axes]
    assert labels == [["Normal 0.90 ✓", "COVID-19 0.60 ✗"], ["Normal 0.90 ✗", "COVID-19 0.60 ✓"]]
    colors = [[to_hex(ax.xaxis.label.get_color()) for ax in row[1:]] for row in axes]
    assert colors == [[plot_utils.RIGHT, plot_utils.WRONG], [plot_utils.WRONG, plot_utils.RIGHT]]
    np.testing.assert_array_equal(axes[1, 0].images[0].get_array(), rows[1].image)
    expected = overlay(rows[1].image, rows[1].panels["vgg16"].map)
    np.testing.assert_array_equal(axes[1, 1].images[0].get_array(), expected)
    assert len(fig.axes) == 7
    assert inside_figure(fig)


def test_a_map_without_positive_evidence_says_so(fig):
    plot_utils.draw_grad_cams(fig, cam_rows())
    notes = [[t.get_text() for t in ax.texts] for ax in fig.axes[:3]]
    assert notes == [[], [], ["no positive evidence"]]


def test_outlines_follow_the_masks_and_are_named(fig):
    lesion = np.zeros((24, 24), dtype=bool)
    lesion[3:8, 10:20] = True
    # A mask that meets the image's edge is outlined there too.
    plot_utils.draw_grad_cams(fig, cam_rows(lesion=lesion, lung=np.ones((24, 24))))
    lung, drawn = fig.axes[1].collections
    corners = np.concatenate([path.vertices for path in drawn.get_paths()])
    assert corners.min(axis=0).tolist() == [9.5, 2.5]
    assert corners.max(axis=0).tolist() == [19.5, 7.5]
    edge = np.concatenate([path.vertices for path in lung.get_paths()])
    assert (edge.min(), edge.max()) == (-0.5, 23.5)
    assert fig.axes[1].get_xlim() == (-0.5, 23.5)
    assert legend_texts(fig.legends[0]) == ["lesion", "lung"]


def test_masks_that_are_empty_or_missing_draw_nothing(fig):
    plot_utils.draw_grad_cams(fig, cam_rows(lesion=np.zeros((24, 24))))
    assert all(not ax.collections for ax in fig.axes[:6])
