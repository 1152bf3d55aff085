"""Where the cells of a network's layer lie in the image."""

import contextlib
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.utils import _pair


class Axis(NamedTuple):
    """The centres of a layer's cells along one axis of the input.

    Attributes:
        start: position of cell 0 in pixels; the centre of pixel 0 is at 0.
        step: distance between two cells in pixels, so cell i is at start + i · step.
        length: number of pixels of the input.
    """

    start: float
    step: float
    length: int

    def sample_points(self, size: int, cells: int) -> Tensor:
        """Return the positions of the pixels of an upsampled map among the cells, as `grid_sample` expects them.

        Args:
            size: number of pixels of the upsampled map, which shows the same field of view as the input.
            cells: number of cells.

        Returns:
            (size,) positions: -1 is the first cell and 1 is the last.
        """
        pixels = (torch.arange(size) + 0.5) * (self.length / size) - 0.5
        return 2 * (pixels - self.start) / (self.step * max(cells - 1, 1)) - 1


class Grid(NamedTuple):
    """Where a layer's cells lie along the rows and the columns of the input."""

    rows: Axis
    columns: Axis

    def upsampled(self, maps: Tensor, size: tuple[int, int]) -> Tensor:
        """Return (N, K, h, w) maps of the layer as (N, K, *size), by bilinear interpolation.

        Each cell is drawn where its receptive field is centred. The outermost cells are extended to the edge.
        """
        rows = self.rows.sample_points(size[0], maps.shape[2])
        columns = self.columns.sample_points(size[1], maps.shape[3])
        points = torch.stack(torch.meshgrid(columns, rows, indexing="xy"), dim=-1).to(maps)
        points = points.expand(len(maps), -1, -1, -1)
        return functional.grid_sample(maps, points, padding_mode="border", align_corners=True)


class CellTracker(contextlib.ExitStack):
    """Context manager that follows a forward pass and computes the centres of each layer's cells.

    The arithmetic is that of receptive fields (Araujo, Norris & Sim, "Computing receptive fields of convolutional
    neural networks", Distill 2019). A layer with kernel k, stride s, padding p and dilation d turns the grid
    (start, step) into the grid (start + (d (k - 1) / 2 - p) step, s step). Only layers that change the number of
    cells count. Layers with the same number of cells, such as a block and its shortcut, share a grid.
    """

    def __init__(self, model: nn.Module, height: int, width: int) -> None:
        """Follow the passes of `model` on images of `height` by `width` pixels."""
        super().__init__()
        for layer in model.modules():
            if isinstance(layer, nn.Conv2d | nn.MaxPool2d | nn.AvgPool2d):
                self.enter_context(layer.register_forward_hook(self._follow))
        # One dictionary for the rows and one for the columns: number of cells -> axis.
        self._axes = tuple({length: Axis(0.0, 1.0, length)} for length in (height, width))

    def grid(self, height: int, width: int) -> Grid:
        """Return the grid of a layer with `height` by `width` cells. It is evenly spaced if no such layer ran."""
        axes = []
        for cells, axis_of in zip((height, width), self._axes, strict=True):
            length = next(iter(axis_of))  # of the input
            axes.append(axis_of.get(cells, Axis(0.5 * length / cells - 0.5, length / cells, length)))
        return Grid(*axes)

    def _follow(self, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        for i, axis_of in enumerate(self._axes):
            before, after = inputs[0].shape[i - 2], output.shape[i - 2]
            if before in axis_of and after != before:  # never with padding "same"
                padding = 0 if layer.padding == "valid" else layer.padding
                options = (layer.kernel_size, layer.stride, padding, getattr(layer, "dilation", 1))
                kernel, stride, padding, dilation = (_pair(option)[i] for option in options)
                start, step, length = axis_of[before]
                shift = (dilation * (kernel - 1) / 2 - padding) * step
                axis_of.setdefault(after, Axis(start + shift, stride * step, length))
