"""Every kind of image file is read correctly, and weights, seeds and devices are right."""

import struct

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.utils.class_weight import compute_class_weight
from torchvision.transforms import v2

from studies.settings import IMAGENET_MEAN, IMAGENET_STD
from training.batches import XrayDataset
from utils import Preprocessing, class_weights, derived_generator, read_mask, read_xray, resolve_device

RAMP = np.tile(np.arange(256, dtype=np.uint8), (16, 1))


def save(tmp_path, image, name="x.png", **options):
    path = tmp_path / name
    image.save(path, **options)
    return path


def waves(side):
    """Return a square picture with fine stripes: a shift of half a pixel changes its grey levels by more than ten."""
    y, x = np.mgrid[:side, :side] * (1025 / side)
    return (120 + 60 * np.sin(x / 12 + y / 30) + 50 * np.cos(y / 9)).astype(np.uint8)


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


SIGNED = {"tiffinfo": {339: 2}}


def test_a_few_hot_pixels_do_not_blacken_a_twelve_bit_image(tmp_path):
    values = np.tile(np.linspace(0, 4095, 256).round().astype(np.uint16), (16, 1))
    expected = read_xray(save(tmp_path, Image.fromarray(values)))
    values[3, 40:44] = 65535  # 4 of 4,096
    read = read_xray(save(tmp_path, Image.fromarray(values), "hot.png"))
    assert (read[3, 40:44] == 255).all()
    expected[3, 40:44] = 255
    np.testing.assert_array_equal(read, expected)


def test_a_marker_at_full_scale_counts_as_part_of_a_sixteen_bit_image(tmp_path):
    values = np.full((64, 64), 4000, np.uint16)
    values[2:5, 2:5] = 65535  # 9 of 4,096
    read = read_xray(save(tmp_path, Image.fromarray(values)))
    assert np.unique(read).tolist() == [round(4000 / 257), 255]


def test_eight_bits_in_a_sixteen_bit_file_are_unchanged(tmp_path):
    np.testing.assert_array_equal(read_xray(save(tmp_path, Image.fromarray(RAMP.astype(np.uint16)))), RAMP)


@pytest.mark.parametrize("bits", [8, 16, 32])
def test_signed_integers_count_from_their_minimum(tmp_path, bits):
    low, high = (-100, 100) if bits == 8 else (-1024, 3071)
    values = np.tile(np.linspace(low, high, 256).round().astype(np.int32), (16, 1))
    pixels = {8: values.astype(np.uint8), 16: values.astype(np.uint16), 32: values}[bits]
    read = read_xray(save(tmp_path, Image.fromarray(pixels), "x.tif", **SIGNED)).astype(int)
    if bits == 8:
        np.testing.assert_array_equal(read, values + 100)
    else:
        assert np.abs(read - RAMP).max() <= 1


def test_integers_of_more_than_sixteen_bits_span_their_own_range(tmp_path):
    for low, high in ((-(2**31), 2**31 - 1), (0, 2**31 - 1), (0, 100_000), (10**6, 10**6 + 9_999)):
        values = np.tile(np.linspace(low, high, 256).round().astype(np.int32), (16, 1))
        assert np.abs(read_xray(save(tmp_path, Image.fromarray(values), "x.tif")).astype(int) - RAMP).max() <= 1


def test_unsigned_integers_of_32_bits_do_not_wrap(tmp_path):
    values = np.tile(np.linspace(0, 2**32 - 1, 256).round().astype(np.uint32), (16, 1))
    path = save(tmp_path, Image.fromarray(values.view(np.int32)), "x.tif")
    signed, unsigned = (struct.pack("<HHIH", 339, 3, 1, kind) for kind in (2, 1))
    assert path.read_bytes().count(signed) == 1
    path.write_bytes(path.read_bytes().replace(signed, unsigned))
    assert np.abs(read_xray(path).astype(int) - RAMP).max() <= 1


def test_floating_point_tiff_spans_its_own_range(tmp_path):
    values = np.linspace(-3, 7, 256, dtype=np.float32)[None].repeat(4, 0)
    grey = read_xray(save(tmp_path, Image.fromarray(values), "x.tif"))
    assert (grey.min(), grey.max(), grey.dtype) == (0, 255, np.uint8)
    constant = save(tmp_path, Image.fromarray(np.full((4, 4), 5, np.float32)), "y.tif")
    assert not read_xray(constant).any()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 3e38, -3e38])
def test_pixels_without_a_value_are_black_and_do_not_change_the_others(tmp_path, value):
    values = np.linspace(-3, 7, 256, dtype=np.float32)[None].repeat(16, 0)
    values[4:9, 100:200] = value
    read = read_xray(save(tmp_path, Image.fromarray(values), "x.tif"))
    expected = RAMP.copy()
    expected[4:9, 100:200] = 0
    assert np.abs(read.astype(int) - expected).max() <= 1
    inverted = read_xray(save(tmp_path, Image.fromarray(values), "y.tif", tiffinfo={262: 0}))
    assert np.abs(inverted.astype(int) - np.where(expected == 0, expected, 255 - expected))[:, 1:].max() <= 1
    path = save(tmp_path, Image.fromarray(np.full((4, 4), value, np.float32)), "none.tif")
    with pytest.raises(ValueError, match=r"none\.tif .*none of its pixels has a finite value"):
        read_xray(path)


def test_a_hot_pixel_does_not_blacken_a_floating_point_image(tmp_path):
    values = np.linspace(0, 1, 256, dtype=np.float32)[None].repeat(16, 0)
    values[3, 40], values[3, 41] = 1e6, -1e6
    read = read_xray(save(tmp_path, Image.fromarray(values), "x.tif"))
    assert read[3, 40:42].tolist() == [255, 0]
    assert np.abs(np.delete(read, 3, axis=0).astype(int) - RAMP[:15]).max() <= 1


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_twelve_bits_in_colour_channels_of_sixteen_fill_the_range(tmp_path, suffix):
    values = np.tile(np.linspace(0, 4095, 256).round().astype(np.uint16), (16, 1))
    path = str(tmp_path / f"x{suffix}")
    cv2.imwrite(path, np.dstack([values] * 3))
    assert np.abs(read_xray(path).astype(int) - RAMP).max() <= 1
    alpha = np.where(np.arange(256) < 100, 0, 65535)[None].repeat(16, 0)
    cv2.imwrite(path, np.dstack([values] * 3 + [alpha.astype(np.uint16)]))
    assert np.abs(read_xray(path).astype(int) - np.where(alpha, RAMP, 0)).max() <= 1
    colours = np.random.default_rng(0).integers(0, 65536, (8, 9, 3), dtype=np.uint16)
    cv2.imwrite(path, colours[..., ::-1])
    luma = (colours @ [0.299, 0.587, 0.114]) / 257
    assert np.abs(read_xray(path) - luma).max() <= 1


def test_sixteen_bit_tiff_in_which_white_is_zero_is_inverted(tmp_path):
    values = np.tile(np.linspace(0, 65535, 256).round().astype(np.uint16), (16, 1))
    path = save(tmp_path, Image.fromarray(values), "x.tif", tiffinfo={262: 0})
    np.testing.assert_array_equal(read_xray(path), 255 - RAMP)


def test_mask_is_resized_to_its_xray(tmp_path):
    mask = np.zeros((256, 256), np.uint8)
    mask[64:192, 32:128] = 255
    read = read_mask(save(tmp_path, Image.fromarray(mask)), (512, 1024))
    rows, columns = np.nonzero(read)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (128, 383, 128, 511)
    assert read.dtype == bool


@pytest.mark.parametrize(("side", "other"), [(512, 64), (512, 256), (300, 100), (256, 299), (100, 250)])
def test_mask_stays_in_place_when_it_is_resized(tmp_path, side, other):
    centres = np.arange(side) + 0.5
    shifts = []
    for k in range(12):  # discs at many places, so that outlines cross the new pixels in many ways
        centre, radius = side * (0.35 + 0.021 * k), side * (0.28 - 0.013 * k)
        disc = (centres[:, None] - side / 2) ** 2 + (centres - centre) ** 2 <= radius**2
        read = read_mask(save(tmp_path, Image.fromarray(disc.astype(np.uint8) * 255)), (other, other))
        _, columns = np.nonzero(read)
        shifts.append(columns.mean() + 0.5 - centre * other / side)
        assert read.mean() == pytest.approx(disc.mean(), rel=0.04)
    assert np.mean(shifts) == pytest.approx(0, abs=0.05)  # of a pixel
    assert np.abs(shifts).max() < 0.2


def test_exif_orientation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # shown after a quarter turn clockwise
    image = Image.fromarray(np.tile(RAMP[:, ::32], (2, 1)))
    path = save(tmp_path, image, exif=exif)
    assert read_xray(path).shape == (image.width, image.height)


TURNED = {
    1: lambda stored: stored,
    2: np.fliplr,
    3: lambda stored: np.rot90(stored, 2),
    4: np.flipud,
    5: np.transpose,
    6: lambda stored: np.rot90(stored, -1),
    7: lambda stored: np.rot90(stored, 2).T,
    8: np.rot90,
}


@pytest.mark.parametrize("compression", [None, "tiff_lzw"])
@pytest.mark.parametrize("orientation", TURNED)
def test_tiffs_of_every_orientation_are_turned_upright(tmp_path, orientation, compression):
    stored = np.random.default_rng(0).integers(0, 256, (20, 30), dtype=np.uint8)
    for name, image in {
        "8 bits": Image.fromarray(stored),
        "16 bits": Image.fromarray(stored * np.uint16(257)),
        "float": Image.fromarray(stored.astype(np.float32)),
        "RGB": Image.fromarray(stored).convert("RGB"),
    }.items():
        path = save(tmp_path, image, "x.tif", tiffinfo={274: orientation}, compression=compression)
        np.testing.assert_array_equal(read_xray(path), TURNED[orientation](stored), err_msg=name)


def test_first_of_several_pages_is_read_and_one_line_says_so(tmp_path, capfd):
    other = Image.fromarray(255 - RAMP)
    path = save(tmp_path, Image.fromarray(RAMP), "x.tif", save_all=True, append_images=[other, other])
    for _ in range(3):
        np.testing.assert_array_equal(read_xray(path), RAMP)
    assert capfd.readouterr() == ("", f"{path} holds 3 images: the first is read\n")
    read_xray(save(tmp_path, Image.fromarray(RAMP), "y.tif"))
    assert capfd.readouterr() == ("", "")


def noisy(size=(300, 400)):
    """Return an X-ray of stripes and noise, with a black border."""
    y, x = np.mgrid[: size[0], : size[1]]
    grey = 120 + 60 * np.sin(x / 40) * np.cos(y / 30) + np.random.default_rng(0).normal(0, 6, size)
    grey[:, :30] = grey[-40:] = 0
    return grey.clip(0, 255).astype(np.uint8)


WHOLE_JPEGS = {
    "greyscale": {},
    "progressive": {"progressive": True},
    "optimised": {"optimize": True, "quality": 30},
    "restarts": {"restart_marker_rows": 2},
}


@pytest.mark.parametrize("kind", WHOLE_JPEGS)
def test_whole_jpegs_are_read_and_cut_jpegs_are_refused(tmp_path, kind):
    for picture in (noisy(), np.zeros((65, 70), np.uint8), np.full((64, 64), 255, np.uint8)):
        path = save(tmp_path, Image.fromarray(picture), "x.jpg", **WHOLE_JPEGS[kind])
        with Image.open(path) as whole:
            np.testing.assert_array_equal(read_xray(path), np.asarray(whole))
        path.write_bytes(path.read_bytes() + b"and more")  # data after the end do not matter
        assert read_xray(path).shape == picture.shape
    path = save(tmp_path, Image.fromarray(noisy()), "x.jpg", **WHOLE_JPEGS[kind])
    data = path.read_bytes()
    for share in (0.5, 0.7, 0.9):
        place = int(len(data) * share)
        for damaged in (data[:place], data[:place] + bytes(len(data) - place), data[:place] + b"\xff\xd9"):
            path.write_bytes(damaged)
            with pytest.raises(ValueError, match=r"x\.jpg cannot be read, is it damaged\?"):
                read_xray(path)


def test_jpegs_with_a_hole_are_refused(tmp_path):
    path = save(tmp_path, Image.fromarray(noisy()), "x.jpg", quality=90)
    data = path.read_bytes()
    for place in range(len(data) // 4, len(data) - 1000, len(data) // 9):
        for hole, lost in ((bytes(512), 512), (b"", 64)):
            path.write_bytes(data[:place] + hole + data[place + lost :])
            with pytest.raises(ValueError, match="damaged"):
                read_xray(path)


@pytest.mark.parametrize(("suffix", "compression"), [(".png", None), (".tif", "tiff_adobe_deflate")])
def test_a_wrong_byte_in_a_file_with_checksums_is_refused(tmp_path, suffix, compression):
    options = {"compression": compression} if compression else {}
    path = save(tmp_path, Image.fromarray(noisy()), f"x{suffix}", **options)
    data = path.read_bytes()
    np.testing.assert_array_equal(read_xray(path), noisy())
    for place in range(1000, len(data) - 1000, len(data) // 9):
        path.write_bytes(data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :])
        with pytest.raises(ValueError, match="damaged"):
            read_xray(path)
        path.write_bytes(data[:place] + bytes(len(data) - place))  # the file keeps its length, as after a crash
        with pytest.raises(ValueError, match=r"damaged|not an image"):
            read_xray(path)


def test_a_bmp_of_run_lengths_is_refused_and_a_plain_one_is_read(tmp_path):
    path = save(tmp_path, Image.fromarray(RAMP), "x.bmp")
    np.testing.assert_array_equal(read_xray(path), RAMP)
    data = bytearray(path.read_bytes())
    data[30] = 1  # its compression
    path.write_bytes(data[:1078] + (bytes([255, 7, 1, 7]) + b"\0\0") * 16 + b"\0\1")
    with pytest.raises(ValueError, match=r"x\.bmp .*run lengths .*: save it as PNG"):
        read_xray(path)


def test_error_names_a_file_that_is_no_image(tmp_path):
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
    preprocessed = Preprocessing(32, IMAGENET_MEAN, IMAGENET_STD)(image)
    assert preprocessed.shape == (3, 32, 32)
    torch.testing.assert_close(preprocessed, expected, rtol=0, atol=1e-6)


def test_class_weights_are_scikit_learns_balanced():
    labels = np.repeat([0, 1, 2], [50, 30, 7])
    expected = compute_class_weight("balanced", classes=np.arange(3), y=labels)
    np.testing.assert_allclose(class_weights(labels, 3).numpy(), expected, rtol=1e-6)


def test_preprocessing_with_lungs_blackens_the_rest():
    image = np.full((20, 30), 200, np.uint8)
    inside = np.zeros((20, 30), bool)
    inside[:, 15:] = True
    masked = Preprocessing(16, (0, 0, 0), (1, 1, 1), lungs=lambda xray: np.where(inside, xray, 0).astype(np.uint8))
    resized = masked.resize(image)[0]
    assert not resized[:, :7].any()
    assert (resized[:, 9:] == 200).all()


@pytest.mark.parametrize("side", [1025, 1000])
def test_training_and_inference_read_the_same_pixels_of_a_jpeg(tmp_path, side):
    path = save(tmp_path, Image.fromarray(waves(side)), "x.jpg", quality=92)
    preprocessing = Preprocessing(64, (0, 0, 0), (1, 1, 1))
    with Image.open(path) as whole:
        expected = preprocessing.resize(np.array(whole))
    assert torch.equal(preprocessing.resize(read_xray(path)), expected)
    assert torch.equal(preprocessing.read(path), expected)
    assert torch.equal(XrayDataset([str(path)], [0], preprocessing)[torch.tensor([0])][0][0], expected)


def test_every_use_epoch_and_batch_draws_other_random_numbers():
    uses = [(seed, "order", epoch) for seed in range(5) for epoch in range(5)]
    uses += [(*use, batch) for use in uses for batch in range(5)]
    uses += [(seed, "views", *numbers) for seed, _, *numbers in uses]
    draws = {tuple(torch.rand(4, generator=derived_generator(*use)).tolist()) for use in uses}
    assert len(draws) == len(uses)
    assert torch.equal(*(torch.rand(4, generator=derived_generator(1, "order", 2)) for _ in range(2)))


def test_unknown_device_is_refused():
    assert resolve_device("cpu") == torch.device("cpu")
    for name in ("cuda:99", "gpu"):
        with pytest.raises(ValueError, match="try --device cpu"):
            resolve_device(name)
