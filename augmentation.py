"""Random views of whole batches of X-rays: what is drawn, and what the draws make of the images.

Drawing is apart from showing: several processes that share a batch draw for all of it from equal generators and
take their own rows, so the same images get the same views however many there are.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import grid_sample


class Draws(NamedTuple):
    """What was drawn for N images: (N,) CPU tensors, float32 but for `flip`, which is bool.

    The crop is `left`, `top`, `width` and `height` as fractions of the image; `angle` is in degrees, clockwise;
    shifts to the right and down are fractions of the side; the last three are factors.
    """

    flip: Tensor
    left: Tensor
    top: Tensor
    width: Tensor
    height: Tensor
    angle: Tensor
    shift_x: Tensor
    shift_y: Tensor
    scale: Tensor
    brightness: Tensor
    contrast: Tensor

    def rows(self, which: slice | Tensor) -> "Draws":
        """Return the draws of some of the images: a slice, or a tensor of indices or bool."""
        return Draws(*(values[which] for values in self))


@dataclass(frozen=True)
class Augmentation:
    """What is done to training images; nothing by default.

    `smallest_crop`: a window with this share of the image's area, or any up to the whole, is enlarged to the
    full size (width over height 0.9 to 1.1). `rotation`: up to so many degrees (0–180) to either side.
    `translation`: up to this share of the side (0–1, without 1), along either axis. `scale`: a factor from the
    first to the second. `brightness`, `contrast`: factors from 1 - b to 1 + b (b from 0, below 1). Raises
    ValueError outside of these ranges. Source: torchvision's RandomResizedCrop, RandomAffine and ColorJitter;
    unlike theirs, shifts are not rounded to pixels, and a crop that would not fit gets closer to a square
    rather than being drawn again.
    """

    horizontal_flip: bool = False
    smallest_crop: float = 1.0
    rotation: float = 0.0
    translation: float = 0.0
    scale: tuple[float, float] = (1.0, 1.0)
    brightness: float = 0.0
    contrast: float = 0.0

    def __post_init__(self) -> None:
        holds = {
            "smallest_crop": 0 < self.smallest_crop <= 1,
            "rotation": 0 <= self.rotation <= 180,
            "translation": 0 <= self.translation < 1,
            "scale": 0 < self.scale[0] <= self.scale[1],
            "brightness": 0 <= self.brightness < 1,
            "contrast": 0 <= self.contrast < 1,
        }
        if wrong := [f"{name} = {getattr(self, name)}" for name in holds if not holds[name]]:
            raise ValueError(f"out of range: {', '.join(wrong)}; see `Augmentation` for the ranges")

    @property
    def views(self) -> int | None:
        """How many views an image has: 1, nothing is done; 2, as it is and mirrored; None, any number."""
        few = {Augmentation(): 1, Augmentation(horizontal_flip=True): 2}
        return few.get(self)

    def draw(self, number: int, generator: torch.Generator) -> Draws:
        """Return draws for `number` images from a CPU generator, whose state alone decides them.

        Only what these settings use is drawn; the rest leaves an image as it is.
        """

        def uniform(low: float, high: float) -> Tensor:
            if low == high:
                return torch.full((number,), float(low))
            return torch.rand(number, generator=generator) * (high - low) + low

        flip = uniform(0, float(self.horizontal_flip)) > 0.5
        crop = torch.zeros(number), torch.zeros(number), torch.ones(number), torch.ones(number)
        if self.smallest_crop < 1:
            area = uniform(self.smallest_crop, 1)
            # A narrower aspect, not a cut, keeps a window inside of the image: its area stays as drawn.
            aspect = uniform(math.log(0.9), math.log(1.1)).clamp(area.log(), -area.log())
            width, height = (((area.log() + sign * aspect) / 2).exp() for sign in (1, -1))
            crop = uniform(0, 1) * (1 - width), uniform(0, 1) * (1 - height), width, height
        return Draws(
            flip,
            *crop,
            angle=uniform(-self.rotation, self.rotation),
            shift_x=uniform(-self.translation, self.translation),
            shift_y=uniform(-self.translation, self.translation),
            scale=uniform(*self.scale),
            brightness=uniform(1 - self.brightness, 1 + self.brightness),
            contrast=uniform(1 - self.contrast, 1 + self.contrast),
        )

    def __call__(self, images: Tensor, draws: Draws) -> Tensor:
        """Return (B, 1, S, S) uint8 images as (B, 1, S, S) float32, 0 to 255, on the same device.

        `draws`: B of them, from `draw` of the same settings (what these leave out is passed over). In order: the
        crop is enlarged, turned and scaled about the centre, shifted, mirrored, all in one interpolation
        (bilinear); then brightness, then contrast about the image's own mean. Outside of the image is black,
        into which its last half pixel fades; what lies inside it but outside of the crop may come into view.
        A flip alone is exact. Raises ValueError for other images, or another number of draws.
        """
        if images.dtype != torch.uint8 or images.shape[1:] != (1, images.shape[-1], images.shape[-1]):
            raise ValueError(f"pass (B, 1, S, S) uint8 images, not {tuple(images.shape)} {images.dtype}")
        if len(images) != len(draws.flip):
            raise ValueError(f"{len(images)} images but {len(draws.flip)} draws: take `draws.rows` of them")
        brightness, contrast, flip = (
            values.to(images.device)[:, None, None, None]
            for values in (draws.brightness, draws.contrast, draws.flip)
        )
        moved = self.smallest_crop < 1 or self.rotation or self.translation or self.scale != (1.0, 1.0)
        if self.horizontal_flip and not moved:
            images = torch.where(flip, images.flip(-1), images)
        shown = images.float()
        if moved:
            shown = grid_sample(shown, _grid(draws, images.shape[-1], images.device), align_corners=False)
            shown.clamp_(0, 255)  # the four weights add up to 1 but for rounding
        if self.brightness:
            shown.mul_(brightness).clamp_(0, 255)
        if self.contrast:
            # Row by row: one sum an image is split among threads if there are few images, and rounds differently.
            mean = shown.mean(-1, keepdim=True).mean(-2, keepdim=True)
            shown.mul_(contrast).add_(mean * (1 - contrast)).clamp_(0, 255)
        return shown

    def view(self, images: Tensor, number: int) -> Tensor:
        """Return (B, 1, S, S) images as they are for view 0, mirrored for view 1, in their own type.

        View `int(draws.flip[i])` is what a call shows of image i. Raises ValueError where there is no such view.
        """
        if number not in range(self.views or 0):
            raise ValueError(f"no view {number}: {self} has {self.views or 'any number of'} views")
        return images.flip(-1) if number else images


def _grid(draws: Draws, size: int, device: torch.device) -> Tensor:
    """Return (B, S, S, 2) float32: the place in its image, -1 to 1, that each pixel of a view shows."""
    # In float64 and rounded: the last bit of a cosine may depend on where in a tensor the angle stands.
    _, left, top, width, height, angle, shift_x, shift_y, scale, *_ = (values.double() for values in draws)
    cos, sin = angle.deg2rad().cos() / scale, angle.deg2rad().sin() / scale
    mirror, x, y = 1 - 2 * draws.flip.double(), 2 * shift_x, 2 * shift_y
    across = torch.stack([width * mirror * cos, -height * mirror * sin], 1)
    down = torch.stack([width * sin, height * cos], 1)
    origin = torch.stack(
        [
            2 * left + width - 1 - width * (cos * x + sin * y),
            2 * top + height - 1 + height * (sin * x - cos * y),
        ],
        1,
    )
    centres = (torch.arange(size, dtype=torch.float64) * 2 + 1) / size - 1
    columns = (across[..., None] * centres).to(device, torch.float32)[:, :, None]
    rows = (origin[..., None] + down[..., None] * centres).to(device, torch.float32)[..., None]
    return (columns + rows).permute(0, 2, 3, 1)  # x and y apart in memory: faster to add and to sample
