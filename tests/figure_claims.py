"""Facts that tests read from figures."""

from matplotlib.backends.backend_agg import FigureCanvasAgg


def legend_texts(legend):
    return [text.get_text() for text in legend.get_texts()]


def inside_figure(fig):
    """Return whether all labels and legends lie inside the figure after layout, within 1 pixel."""
    canvas = FigureCanvasAgg(fig)
    # Twice, because the layout places axes of a fixed aspect only in the second pass.
    canvas.draw()
    canvas.draw()
    renderer = canvas.get_renderer()
    boxes = [artist.get_tightbbox(renderer) for artist in (*fig.axes, *fig.legends, *fig.texts)]
    width, height = fig.bbox.width, fig.bbox.height
    return all(b.x0 >= -1 and b.y0 >= -1 and b.x1 <= width + 1 and b.y1 <= height + 1 for b in boxes)
