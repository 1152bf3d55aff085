"""What tests of figures read back from them."""

from matplotlib.backends.backend_agg import FigureCanvasAgg


def legend_texts(legend):
    return [text.get_text() for text in legend.get_texts()]


def inside_figure(fig):
    """Return whether, once laid out, no label or legend lies outside of the figure (1 pixel of rounding allowed)."""
    canvas = FigureCanvasAgg(fig)
    # The second time, since the layout settles axes of a fixed aspect only then.
    canvas.draw()
    canvas.draw()
    renderer = canvas.get_renderer()
    boxes = [artist.get_tightbbox(renderer) for artist in (*fig.axes, *fig.legends, *fig.texts)]
    width, height = fig.bbox.width, fig.bbox.height
    return all(b.x0 >= -1 and b.y0 >= -1 and b.x1 <= width + 1 and b.y1 <= height + 1 for b in boxes)
