"""Where in an image the cells of a network's layer lie."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional


class Axis(NamedTuple):
    """Where the cells of a layer are centred along one axis of the input: cell i at pixel start + i · step
    (pixel 0's own centre is 0) of `length` pixels.
    """

    start: float
    step: float
    length: int

    def sample_points(self, size: int, cells: int) -> Tensor:
        """Return (size,) positions among the cells, -1 the first and 1 the last, of the pixels of an output
        of `size` pixels that shows the same field of view.
        """
        pixels = (torch.arange(size) + 0.5) * (self.length / size) - 0.5
        return 2 * (pixels - self.start) / (self.step * max(cells - 1, 1)) - 1


class Grid(NamedTuple):
    """The `Axis` of a layer's rows and of its columns."""

    rows: Axis
    columns: Axis

    def upsampled(self, maps: Tensor, size: tuple[int, int]) -> Tensor:
        """Return (N, K, h, w) maps of the layer as (N, K, *size), bilinear, each cell where its receptive field
        is centred; the outermost cells go on to the edge.
        """
        rows = self.rows.sample_points(size[0], maps.shape[2])
        columns = self.columns.sample_points(size[1], maps.shape[3])
        points = torch.stack(torch.meshgrid(columns, rows, indexing="xy"), dim=-1).to(maps)
        points = points.expand(len(maps), -1, -1, -1)
        return functional.grid_sample(maps, points, padding_mode="border", align_corners=True)


class CellTracker:
    """Follows a forward pass and works out where each layer's cells are centred.

    The arithmetic of receptive fields (Araujo, Norris & Sim, "Computing receptive fields of convolutional
    neural networks", Distill 2019): a layer with kernel k, stride s, padding p and dilation d makes of a
    grid (start, step) the grid (start + (d (k - 1) / 2 - p) step, s step). Only layers that change the number
    of cells matter; those that agree on that number, such as a block and its shortcut, agree on the grid.
    """

    def __init__(self, model: nn.Module, height: int, width: int) -> None:
        layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.MaxPool2d | nn.AvgPool2d)]
        self._hooks = [layer.register_forward_hook(self._follow) for layer in layers]
        self._known = ({height: Axis(0.0, 1.0, height)}, {width: Axis(0.0, 1.0, width)})

    def grid(self, height: int, width: int) -> Grid:
        """Return the grid of a layer of that size; even spacing where it was made in an unknown way."""
        axes = []
        for cells, known in zip((height, width), self._known, strict=True):
            full = next(iter(known))  # the input is the first size that is known
            axes.append(known.get(cells, Axis(0.5 * full / cells - 0.5, full / cells, full)))
        return Grid(*axes)

    def stop(self) -> None:
        """Follow no further pass; what is known stays."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _follow(self, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if layer.padding == "same":
            return  # as many cells as before, at the same places
        for axis, known in enumerate(self._known):
            before, after = inputs[0].shape[axis - 2], output.shape[axis - 2]
            padding = 0 if layer.padding == "valid" else _pair(layer.padding)[axis]
            kernel, stride, dilation = (
                _pair(getattr(layer, name, 1))[axis] for name in ("kernel_size", "stride", "dilation")
            )
            if before in known and after != before:
                start, step, length = known[before]
                shift = (dilation * (kernel - 1) / 2 - padding) * step
                known.setdefault(after, Axis(start + shift, stride * step, length))


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else value
