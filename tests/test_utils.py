"""From a file to a batch: every kind of file reads right, and sampling does what it says."""

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.utils.class_weight import compute_class_weight
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

from studies import IMAGENET_MEAN, IMAGENET_STD
from utils import (
    Preprocessing,
    XrayDataset,
    augmentation,
    balanced_sampler,
    class_weights,
    make_loaders,
    read_mask,
    read_xray,
    seed_everything,
)

RAMP = np.tile(np.arange(256, dtype=np.uint8), (16, 1))


def save(tmp_path, image, name="x.png", **options):
    path = tmp_path / name
    image.save(path, **options)
    return path


def test_greyscale_and_rgb_files_of_one_image_read_the_same(tmp_path):
    grey = Image.fromarray(RAMP)
    for mode in ("L", "RGB", "RGBA", "LA", "P"):
        np.testing.assert_array_equal(read_xray(save(tmp_path, grey.convert(mode))), RAMP, err_msg=mode)


def test_palette_is_looked_up_not_read_as_grey(tmp_path):
    image = Image.fromarray(RAMP, mode="P")
    image.putpalette([value for i in range(256) for value in (255 - i,) * 3])
    np.testing.assert_array_equal(read_xray(save(tmp_path, image)), 255 - RAMP)


def test_transparent_parts_are_black(tmp_path):
    rgba = np.full((4, 4, 4), 200, dtype=np.uint8)
    rgba[..., 3] = np.where(np.arange(4) < 2, 0, 255)
    assert read_xray(save(tmp_path, Image.fromarray(rgba))).tolist() == [[0, 0, 200, 200]] * 4


def test_sixteen_bits_are_scaled_not_clipped_to_white(tmp_path):
    values = np.tile(np.linspace(0, 65535, 256).round().astype(np.uint16), (16, 1))
    np.testing.assert_array_equal(read_xray(save(tmp_path, Image.fromarray(values))), RAMP)
    tiff = save(tmp_path, Image.fromarray(values), "x.tif")
    np.testing.assert_array_equal(read_xray(tiff), RAMP)


@pytest.mark.parametrize("bits", [10, 12, 14])
def test_detector_bits_in_a_sixteen_bit_file_fill_the_range(tmp_path, bits):
    values = np.tile(np.linspace(0, 2**bits - 1, 256).round().astype(np.uint16), (16, 1))
    assert np.abs(read_xray(save(tmp_path, Image.fromarray(values))).astype(int) - RAMP).max() <= 1


def test_floating_point_tiff_spans_its_own_range(tmp_path):
    values = np.linspace(-3, 7, 256, dtype=np.float32)[None].repeat(4, 0)
    grey = read_xray(save(tmp_path, Image.fromarray(values), "x.tif"))
    assert (grey.min(), grey.max(), grey.dtype) == (0, 255, np.uint8)
    constant = save(tmp_path, Image.fromarray(np.full((4, 4), 5, np.float32)), "y.tif")
    assert not read_xray(constant).any()


def test_sixteen_bit_tiff_in_which_white_is_zero_is_turned_over(tmp_path):
    values = np.tile(np.linspace(0, 65535, 256).round().astype(np.uint16), (16, 1))
    path = save(tmp_path, Image.fromarray(values), "x.tif", tiffinfo={262: 0})
    np.testing.assert_array_equal(read_xray(path), 255 - RAMP)


def test_mask_of_another_size_is_laid_over_its_xray(tmp_path):
    mask = np.zeros((256, 256), np.uint8)
    mask[64:192, 32:128] = 255
    read = read_mask(save(tmp_path, Image.fromarray(mask)), (512, 1024))
    rows, columns = np.nonzero(read)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (128, 383, 128, 511)
    assert read.dtype == bool


def test_exif_orientation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # shown after a quarter turn clockwise
    image = Image.fromarray(np.tile(RAMP[:, ::32], (2, 1)))
    path = save(tmp_path, image, exif=exif)
    assert read_xray(path).shape == (image.width, image.height)


def test_files_that_are_no_images_are_named(tmp_path):
    text = tmp_path / "notes.png"
    text.write_text("no image")
    with pytest.raises(ValueError, match=r"notes\.png is not an image"):
        read_xray(text)
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_xray(tmp_path / "gone.png")
    with pytest.raises(ValueError, match="is a folder"):
        read_xray(tmp_path)
    whole = save(tmp_path, Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64), np.uint8)))
    whole.write_bytes(whole.read_bytes()[:2000])
    with pytest.raises(ValueError, match="damaged"):
        read_xray(whole)


def test_preprocessing_equals_torchvision_transforms():
    image = np.random.default_rng(0).integers(0, 256, (70, 90), dtype=np.uint8)
    expected = v2.Compose(
        [
            v2.ToImage(),
            v2.Resize((32, 32), antialias=True),
            v2.Grayscale(num_output_channels=3),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
    )(image[..., None])
    made = Preprocessing(32, IMAGENET_MEAN, IMAGENET_STD)(image)
    assert made.shape == (3, 32, 32)
    torch.testing.assert_close(made, expected, rtol=0, atol=1e-6)


def test_flip_mirrors_about_half_of_the_images_and_is_off_by_default():
    image = torch.from_numpy(RAMP[None, :, :16].copy())
    assert augmentation(16) is None
    seed_everything(0)
    flip = augmentation(16, horizontal_flip=True)
    flipped = [torch.equal(flip(image), functional.horizontal_flip(image)) for _ in range(400)]
    assert 160 < sum(flipped) < 240


def test_crops_keep_the_size_and_show_at_least_the_smallest_share():
    # Along a ramp of one grey level a pixel, the range that is seen is the width that was cut out.
    image = torch.from_numpy(np.tile(np.arange(64, dtype=np.uint8), (64, 1))[None])
    crop = augmentation(64, smallest_crop=0.5)
    seed_everything(0)
    widths = []
    for _ in range(200):
        made = crop(image)
        assert made.shape == (1, 64, 64)
        widths.append((int(made.max()) - int(made.min()) + 1) / 64)
    assert min(widths) > (0.5 * 0.9) ** 0.5 - 0.05
    assert min(widths) < 0.8
    assert max(widths) > 0.95


def make_dataset(tmp_path, number=4, **options):
    paths = []
    for i in range(number):
        image = Image.fromarray(np.full((20, 20), 10 * i, dtype=np.uint8))
        paths.append(str(save(tmp_path, image, f"{i}.png")))
    return XrayDataset(paths, range(number), Preprocessing(16, (0, 0, 0), (1, 1, 1)), **options)


def test_decoded_images_are_kept_only_while_they_fit(tmp_path):
    dataset = make_dataset(tmp_path, cache_bytes=2 * 16 * 16)
    first = [dataset[i][0].double().mean().item() for i in range(4)]
    assert first == pytest.approx([0, 10, 20, 30], abs=1e-4)
    for path in dataset.paths:
        with open(path, "wb"):
            pass
    assert dataset[1][0].double().mean() == 10
    with pytest.raises(ValueError, match=r"3\.png"):
        dataset[3]


def test_sampler_draws_each_class_equally_often_with_replacement():
    labels = [0] * 900 + [1] * 90 + [2] * 10
    drawn = list(balanced_sampler(labels, 3, torch.Generator().manual_seed(0)))
    counts = np.bincount(np.asarray(labels)[drawn], minlength=3)
    assert len(drawn) == 1000
    # Binomial with p = 1/3: four standard deviations are 60.
    assert np.abs(counts - 1000 / 3).max() < 60
    assert len(set(drawn)) < 1000


def test_sampler_repeats_with_its_generator_and_refuses_an_absent_class():
    first, second = (
        list(balanced_sampler([0, 0, 1], 2, torch.Generator().manual_seed(seed))) for seed in (1, 1)
    )
    assert first == second
    with pytest.raises(ValueError, match="class 1"):
        balanced_sampler([0, 2, 2], 3, torch.Generator())


def test_class_weights_are_scikit_learns_balanced():
    labels = np.repeat([0, 1, 2], [50, 30, 7])
    expected = compute_class_weight("balanced", classes=np.arange(3), y=labels)
    np.testing.assert_allclose(class_weights(labels, 3).numpy(), expected, rtol=1e-6)


def test_loaders_augment_and_resample_the_training_images_only(tmp_path):
    paths = make_dataset(tmp_path, 17).paths
    rows = {
        "train": (paths[:13], [0] * 10 + [1] * 3),
        "val": (paths[13:15], [0, 1]),
        "test": (paths[15:], np.array([1, 0])),
    }
    loaders = make_loaders(
        rows,
        Preprocessing(16, (0, 0, 0), (1, 1, 1)),
        num_classes=2,
        batch_size=4,
        augment=lambda image: 255 - image,
        oversample=False,
        num_workers=0,
        generator=torch.Generator().manual_seed(0),
    )
    assert len(loaders["train"]) == 3  # a last batch of one image is left out
    means = {
        name: torch.cat([images.mean((1, 2, 3)) for images, _ in loader]) for name, loader in loaders.items()
    }
    assert means["train"].min() > 0.5
    torch.testing.assert_close(means["train_plain"] * 255, torch.arange(13) * 10.0)
    torch.testing.assert_close(means["val"] * 255, torch.tensor([130.0, 140.0]))
    assert [label for _, labels in loaders["test"] for label in labels.tolist()] == [1, 0]


def test_targets_of_several_labels_arrive_as_rows_of_0_and_1(tmp_path):
    paths = make_dataset(tmp_path, 2).paths
    targets = np.array([[1, 0, 1], [0, 0, 1]], dtype=np.uint8)
    dataset = XrayDataset(paths, targets, Preprocessing(16, (0, 0, 0), (1, 1, 1)))
    assert dataset[0][1].dtype == torch.float32
    assert [dataset[i][1].tolist() for i in (0, 1)] == targets.tolist()


def test_only_the_lungs_are_resized_where_the_preprocessing_has_them():
    image = np.full((20, 30), 200, np.uint8)
    inside = np.zeros((20, 30), bool)
    inside[:, 15:] = True
    masked = Preprocessing(
        16, (0, 0, 0), (1, 1, 1), lungs=lambda xray: np.where(inside, xray, 0).astype(np.uint8)
    )
    resized = masked.resize(image)[0]
    assert not resized[:, :7].any()
    assert (resized[:, 9:] == 200).all()


def test_the_flip_shows_both_views_equally_often_and_nothing_else():
    torch.manual_seed(0)
    image = torch.arange(6, dtype=torch.uint8).reshape(1, 2, 3)
    flip = augmentation(3, horizontal_flip=True)
    seen = [flip(image)[0, 0].tolist() for _ in range(400)]
    assert {tuple(row) for row in seen} == {(0, 1, 2), (2, 1, 0)}
    assert 160 < seen.count([2, 1, 0]) < 240  # four standard deviations


def test_what_a_shift_uncovers_is_black_and_grey_values_keep_their_range():
    torch.manual_seed(0)
    image = torch.full((1, 64, 64), 120, dtype=torch.uint8)
    moved = augmentation(64, rotation=10, translation=0.1, scale=(0.8, 0.9))
    views = torch.stack([moved(image) for _ in range(20)])
    assert views.dtype == torch.uint8
    assert views.shape == (20, 1, 64, 64)
    assert views[:, :, 20:44, 20:44].eq(120).all()  # the middle stays inside
    assert (views == 0).any(dim=(1, 2, 3)).all()
    brighter = augmentation(64, brightness=0.5)
    means = torch.stack([brighter(image).double().mean() for _ in range(200)])
    assert 60 <= means.min() < 75
    assert 165 < means.max() <= 180
