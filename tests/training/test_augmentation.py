"""Augmentation of a batch equals torchvision's augmentation of each image, however processes share the batch."""

import pytest
import torch
from torchvision.transforms.v2 import InterpolationMode, functional

from training.augmentation import Augmentation

BILINEAR = InterpolationMode.BILINEAR
EVERYTHING = Augmentation(True, 0.6, 10, 0.1, (0.8, 1.2), 0.3, 0.3)
SIZE = 96


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def smooth(number=4, size=SIZE):
    """Return (N, 1, S, S) uint8 waves without symmetry, so long (25 pixels) that interpolations agree on them."""
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    waves = [130 + 60 * torch.sin(x / (4 + i) + 0.3) + 50 * torch.cos(y / 5 + x / 11 + i) for i in range(number)]
    return torch.stack(waves)[:, None].clamp(0, 255).round().to(torch.uint8)


def noise(number=4, size=33):
    return torch.randint(0, 256, (number, 1, size, size), generator=seeded(7), dtype=torch.uint8)


def undisturbed(number, **values):
    """Return draws that leave images as they are, except for those given as lists."""
    return (
        Augmentation()
        .draw(number, seeded())
        ._replace(**{name: torch.tensor(numbers) for name, numbers in values.items()})
    )


@pytest.mark.parametrize(
    ("angle", "shift_x", "shift_y", "scale"),
    [(9, 0, 0, 1), (-30, 0, 0, 1), (0, 0.1, -0.05, 1), (0, 0, 0, 0.8), (0, 0, 0, 1.3), (7, 0.08, 0.03, 0.9)],
)
def test_rotation_scale_and_shift_equal_torchvisions_affine(angle, shift_x, shift_y, scale):
    image = smooth(1)
    draws = undisturbed(
        1, angle=[float(angle)], shift_x=[float(shift_x)], shift_y=[float(shift_y)], scale=[float(scale)]
    )
    ours = Augmentation(rotation=180, translation=0.5, scale=(0.5, 2))(image, draws)
    expected, covered = (
        functional.affine(shown, angle, [shift_x * SIZE, shift_y * SIZE], scale, [0, 0], interpolation=BILINEAR, fill=0)
        for shown in (image.float(), torch.ones(image.shape))
    )
    inside = covered == 1  # torchvision darkens the pixels at the border twice
    assert inside.float().mean() > 0.5
    torch.testing.assert_close(ours[inside], expected[inside], atol=0.01, rtol=0)
    assert ours[covered == 0].eq(0).all()


def test_crops_equal_torchvisions_resized_crop():
    image = smooth(1)
    for left, top, width, height in [(0, 0, 48, 48), (12, 30, 60, 54), (24, 0, 72, 90)]:
        window = {"left": left, "top": top, "width": width, "height": height}
        draws = undisturbed(1, **{name: [pixels / SIZE] for name, pixels in window.items()})
        ours = Augmentation(smallest_crop=0.1)(image, draws)
        expected = functional.resized_crop(
            image.float(), top, left, height, width, [SIZE, SIZE], BILINEAR, antialias=False
        )
        torch.testing.assert_close(ours[..., 2:-2, 2:-2], expected[..., 2:-2, 2:-2], atol=0.01, rtol=0)


def test_one_interpolation_equals_torchvisions_crop_affine_and_flip_in_this_order():
    image = smooth(1)
    window = {"left": [12 / SIZE], "top": [18 / SIZE], "width": [72 / SIZE], "height": [66 / SIZE]}
    moved = {"angle": [12.0], "shift_x": [0.0625], "shift_y": [-0.03125], "scale": [1.2]}
    ours = EVERYTHING(image, undisturbed(1, flip=[True], **window, **moved))
    steps = functional.resized_crop(image.float(), 18, 12, 66, 72, [SIZE, SIZE], BILINEAR, antialias=False)
    steps = functional.affine(steps, 12, [6, -3], 1.2, [0, 0], interpolation=BILINEAR, fill=0)
    steps = functional.horizontal_flip(steps)
    interior = (..., slice(20, -20), slice(20, -20))
    torch.testing.assert_close(ours[interior], steps[interior], atol=2.0, rtol=0)  # the steps interpolate twice
    assert (ours - steps.flip(-1))[interior].abs().mean() > 20


def test_a_flip_alone_is_exact():
    images = noise()
    shown = Augmentation(horizontal_flip=True)(images, undisturbed(4, flip=[True, False, False, True]))
    expected = images.clone()
    expected[[0, 3]] = functional.horizontal_flip(images[[0, 3]])
    assert torch.equal(shown, expected.float())


@pytest.mark.parametrize("factor", [0.5, 0.8, 1.0, 1.3, 1.9])
def test_brightness_and_contrast_equal_torchvisions_except_for_rounding(factor):
    images = noise(8)
    brighter = Augmentation(brightness=0.9)(images, undisturbed(8, brightness=[factor] * 8))
    sharper = Augmentation(contrast=0.9)(images, undisturbed(8, contrast=[factor] * 8))
    assert (brighter - functional.adjust_brightness(images, factor)).abs().max() <= 1
    expected = torch.stack([functional.adjust_contrast(image, factor) for image in images])
    assert (sharper - expected).abs().max() <= 1
    both = Augmentation(brightness=0.9, contrast=0.9)(
        images, undisturbed(8, brightness=[factor] * 8, contrast=[0.5] * 8)
    )
    expected = [functional.adjust_contrast(functional.adjust_brightness(image, factor), 0.5) for image in images]
    assert (both - torch.stack(expected)).abs().max() <= 2


def brightest(image):
    row, column = divmod(int(image.argmax()), image.shape[-1])
    return column, row


@pytest.mark.parametrize(
    ("draws", "place"),
    [
        ({"shift_x": [8 / 33]}, (32, 16)),  # right
        ({"shift_y": [8 / 33]}, (24, 24)),  # down
        ({"angle": [90.0]}, (16, 24)),  # clockwise
        ({"scale": [0.5]}, (20, 16)),  # towards the centre
        ({"flip": [True]}, (8, 16)),
        ({"shift_x": [4 / 33], "flip": [True]}, (4, 16)),  # mirrored last
        ({"left": [20 / 33], "width": [1 / 3]}, (13, 16)),
    ],
)
def test_a_dot_moves_in_the_right_direction(draws, place):
    image = torch.zeros(1, 1, 33, 33, dtype=torch.uint8)
    image[..., 15:18, 23:26] = 100  # about (24, 16), the centre being (16, 16)
    image[..., 16, 24] = 250
    shown = Augmentation(True, 0.1, 180, 0.5, (0.1, 2))(image, undisturbed(1, **draws))
    assert brightest(shown) == place


def test_draws_are_uniform_in_their_ranges_and_independent():
    draws = EVERYTHING.draw(20_000, seeded())
    ranges = {
        "angle": (-10, 10), "shift_x": (-0.1, 0.1), "shift_y": (-0.1, 0.1), "scale": (0.8, 1.2),
        "brightness": (0.7, 1.3), "contrast": (0.7, 1.3),
    }  # fmt: skip
    for name, (low, high) in ranges.items():
        values = (getattr(draws, name).double() - low) / (high - low)
        assert -1e-6 < values.min() < 0.01, name
        assert 0.99 < values.max() < 1 + 1e-6, name
        assert values.mean() == pytest.approx(0.5, abs=0.01), name  # five standard deviations
        assert values.var() == pytest.approx(1 / 12, abs=0.005), name
    assert draws.flip.double().mean() == pytest.approx(0.5, abs=0.02)
    place = (draws.left / (1 - draws.width)).nan_to_num(0.5)
    independent = torch.stack([draws.flip.float(), place, *(getattr(draws, name) for name in ranges)])
    assert independent.corrcoef().fill_diagonal_(0).abs().max() < 0.05  # seven standard deviations


@pytest.mark.parametrize("smallest", [0.08, 0.6, 0.95])
def test_crops_lie_in_the_image_and_have_the_area_and_aspect_of_the_settings(smallest):
    draws = Augmentation(smallest_crop=smallest).draw(20_000, seeded())
    area, aspect = (draws.width * draws.height).double(), (draws.width / draws.height).double()
    assert smallest - 1e-6 < area.min() < smallest + 0.01
    assert 0.99 < area.max() < 1 + 1e-6
    assert area.mean() == pytest.approx((1 + smallest) / 2, abs=0.01)
    assert 0.9 - 1e-5 < aspect.min() < aspect.max() < 1.1 + 1e-5
    assert aspect.log().mean().abs() < 0.0065  # (log 0.9 + log 1.1) / 2 is -0.005
    for start, length in [(draws.left, draws.width), (draws.top, draws.height)]:
        assert start.min() >= 0
        assert (start + length).max() < 1 + 1e-6
        room = length < 0.99
        assert (start / (1 - length))[room].mean() == pytest.approx(0.5, abs=0.02)


def test_only_used_numbers_are_drawn():
    generator = seeded()
    before = generator.get_state()
    draws = Augmentation().draw(3, generator)
    assert torch.equal(generator.get_state(), before)
    assert [values.tolist() for values in draws] == [[bool(v)] * 3 if i == 0 else [v] * 3 for i, v in enumerate(
        (0, 0, 0, 1, 1, 0, 0, 0, 1, 1, 1))]  # fmt: skip
    assert [values.dtype for values in draws] == [torch.bool] + [torch.float32] * 10
    alone = Augmentation(brightness=0.3).draw(3, seeded())
    assert torch.equal(alone.brightness, 0.7 + 0.6 * torch.rand(3, generator=seeded()))


def test_generators_of_equal_state_give_equal_views_and_others_do_not():
    images = noise()
    first, again, other = (EVERYTHING(images, EVERYTHING.draw(4, seeded(seed))) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("size", [33, 224])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_batch_has_the_same_views_bit_for_bit_whole_and_in_parts(size, threads):
    images, draws = noise(11, size), EVERYTHING.draw(11, seeded())
    set_before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        whole = EVERYTHING(images, draws)
        for parts in ([slice(0, 5), slice(5, 11)], [slice(0, None, 3), slice(1, None, 3), slice(2, None, 3)]):
            for part in parts:
                assert torch.equal(EVERYTHING(images[part], draws.rows(part)), whole[part])
        for i in range(11):
            assert torch.equal(EVERYTHING(images[i : i + 1], draws.rows(slice(i, i + 1))), whole[i : i + 1])
    finally:
        torch.set_num_threads(set_before)
    for which in (torch.tensor([7, 2, 2]), torch.arange(11) % 2 == 0):
        assert torch.equal(EVERYTHING(images[which], draws.rows(which)), whole[which])


def test_views_are_float32_from_0_to_255_on_the_images_device_and_the_images_stay():
    images = torch.cat([noise(20), torch.full((4, 1, 33, 33), 255, dtype=torch.uint8)])
    before = images.clone()
    strong = Augmentation(True, 0.3, 180, 0.5, (0.3, 2), 0.9, 0.9)
    for augment in (EVERYTHING, strong, Augmentation(smallest_crop=0.3), Augmentation(rotation=45), Augmentation()):
        shown = augment(images, augment.draw(24, seeded()))
        assert (shown.dtype, shown.device, shown.shape) == (torch.float32, images.device, images.shape)
        assert shown.min() >= 0
        assert shown.max() <= 255
        assert torch.equal(images, before)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_views_on_a_gpu_equal_those_on_the_cpu():
    images, draws = smooth(8), EVERYTHING.draw(8, seeded())
    shown = EVERYTHING(images.cuda(), draws)
    assert shown.device.type == "cuda"
    torch.testing.assert_close(shown.cpu(), EVERYTHING(images, draws), atol=0.05, rtol=0)


def test_settings_without_augmentation_give_the_images():
    images = noise()
    assert torch.equal(Augmentation()(images, Augmentation().draw(4, seeded())), images.float())
    still = EVERYTHING(images, undisturbed(4))  # through the interpolation, with draws that change nothing
    torch.testing.assert_close(still, images.float(), atol=0.01, rtol=0)


def test_flips_have_two_views_and_the_draw_chooses_one():
    flip, images = Augmentation(horizontal_flip=True), noise()
    assert [augment.views for augment in (Augmentation(), flip, EVERYTHING)] == [1, 2, None]
    assert Augmentation(contrast=0.1).views is None
    draws = flip.draw(4, seeded())
    assert set(draws.flip.tolist()) == {True, False}
    for image, mirrored, shown in zip(images, draws.flip, flip(images, draws), strict=True):
        assert torch.equal((functional.horizontal_flip(image) if mirrored else image).float(), shown)
