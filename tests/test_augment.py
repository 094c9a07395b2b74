"""One image at a time: decoding, resizes against Pillow, the laws of the draws."""

import io

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from deit.data import augment, decode


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Return a smooth uint8 picture with some texture (noise alone would hide a wrong filter)."""
    rng = np.random.RandomState(seed)
    coarse = Image.fromarray(rng.randint(0, 256, [6, 8, 3], np.uint8)).resize((width, height), Image.BICUBIC)
    return np.clip(np.asarray(coarse, np.int32) + rng.randint(-20, 21, [height, width, 3]), 0, 255).astype(np.uint8)


def encode(image: np.ndarray, kind: str, **options) -> bytes:
    out = io.BytesIO()
    Image.fromarray(image).save(out, kind, **options)
    return out.getvalue()


def seeds(count: int) -> np.ndarray:
    return np.stack([np.full(count, 7), np.arange(count)], 1)


def mean_difference(a, b) -> float:
    return float(np.abs(np.asarray(a, np.float64) - np.asarray(b, np.float64)).mean())


@pytest.mark.parametrize("kind", ["PNG", "BMP"])
def test_lossless_formats_decode_to_the_same_pixels(kind):
    image = picture(21, 34)
    np.testing.assert_array_equal(decode.decode(encode(image, kind)), image)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "GIF", "JPEG"])
def test_grey_images_become_three_equal_channels(kind):
    grey = picture(16, 24)[..., 0]
    got = decode.decode(encode(grey, kind, **({"quality": 100} if kind == "JPEG" else {}))).numpy()
    assert got.shape == (16, 24, 3)
    np.testing.assert_allclose(got, np.repeat(grey[..., None], 3, -1), atol=2)


def test_jpeg_decodes_as_in_pillow():
    data = encode(picture(75, 101), "JPEG", quality=88)
    assert mean_difference(decode.decode(data), Image.open(io.BytesIO(data))) <= 0.1


def test_first_frame_of_an_animation_is_taken():
    frames = [Image.fromarray(np.full([8, 9, 3], value, np.uint8)) for value in (40, 200)]
    out = io.BytesIO()
    frames[0].save(out, "GIF", save_all=True, append_images=frames[1:])
    got = decode.decode(out.getvalue()).numpy()
    assert got.shape == (8, 9, 3) and (got == 40).all()


def test_alpha_is_dropped():
    image = picture(9, 9)
    rgba = np.concatenate([image, np.full([9, 9, 1], 128, np.uint8)], -1)
    np.testing.assert_array_equal(decode.decode(encode(rgba, "PNG")), image)


@pytest.mark.parametrize("bad", [b"", b"no image", encode(picture(64, 64), "JPEG")[:500]])
def test_bytes_that_are_no_image_are_an_error(bad):
    with pytest.raises(tf.errors.InvalidArgumentError):
        decode.decode(bad)


@pytest.mark.parametrize("shape", [(180, 240), (240, 180), (30, 50)])
def test_plain_evaluation_is_pillows_bilinear_resize(shape):
    image = picture(*shape)
    expected = Image.fromarray(image).resize((64, 64), Image.BILINEAR)
    got = augment.evaluation(image, size=64, crop_ratio=0.0)
    assert got.dtype == tf.uint8 and got.shape == (64, 64, 3)
    assert mean_difference(got, expected) <= 1.0


@pytest.mark.parametrize("shape", [(180, 240), (241, 180)])
def test_evaluation_with_a_ratio_resizes_the_short_side_and_crops_the_centre(shape):
    image = picture(*shape)
    size, short = 56, 64  # 56 / 0.875
    scale = short / min(shape)
    height, width = (int(side * scale) for side in shape)
    resized = np.asarray(Image.fromarray(image).resize((width, height), Image.BICUBIC))
    top, left = (height - size) // 2, (width - size) // 2
    got = augment.evaluation(image, size=size, crop_ratio=0.875)
    assert mean_difference(got, resized[top : top + size, left : left + size]) <= 1.0


def test_resize_crop_is_a_crop_of_pillows_resize():
    image, size, margin = picture(90, 120), 32, 3
    resized = np.asarray(Image.fromarray(image).resize((size + margin,) * 2, Image.BILINEAR), np.float64)
    places = set()
    for seed in seeds(60):
        got = augment.resize_crop(image, seed, size=size, margin=margin).numpy()
        errors = {
            (y, x): mean_difference(got, resized[y : y + size, x : x + size])
            for y in range(margin + 1)
            for x in range(margin + 1)
        }
        places.add(min(errors, key=errors.get))
        assert min(errors.values()) <= 1.0
    assert len(places) >= 13  # of 16; 60 draws leave more than three out in one of 10,000 cases


def test_resize_crop_without_margin_is_the_resize():
    image = picture(40, 50)
    got = augment.resize_crop(image, seeds(1)[0], size=32, margin=0)
    np.testing.assert_array_equal(got, augment.evaluation(image, size=32, crop_ratio=0.0))


def windows(height, width, count, *, scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3)) -> np.ndarray:
    draw = tf.function(lambda seed: augment.crop_window(height, width, seed, scale=scale, ratio=ratio))
    return np.stack([draw(tf.constant(seed)).numpy() for seed in seeds(count)])


def test_crop_windows_obey_the_law_of_area_and_ratio():
    height, width = 400, 400
    top, left, tall, wide = windows(height, width, 1500).T
    assert (top >= 0).all() and (left >= 0).all()
    assert (top + tall <= height).all() and (left + wide <= width).all()
    area, ratio = tall * wide / (height * width), wide / tall
    assert 0.075 < area.min() < 0.10 and 0.9 < area.max() <= 1.0
    assert ratio.min() > 0.74 and ratio.max() < 1.35
    # An independent simulation of the law: area uniform, ratio log-uniform, redrawn until it fits.
    rng = np.random.RandomState(1)
    share, aspect = rng.uniform(0.08, 1, 200_000), np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3), 200_000))
    fits = (share * aspect <= 1) & (share / aspect <= 1)
    assert abs(area.mean() - share[fits].mean()) < 0.025  # 4 standard errors of 1500 draws
    assert abs(np.log(ratio).mean()) < 0.02
    assert abs(np.log(ratio).std() - np.log(aspect[fits]).std()) < 0.015


def test_window_places_are_uniform_over_the_free_room():
    top, left, tall, wide = windows(300, 200, 800, scale=(0.25, 0.25), ratio=(1.0, 1.0)).T
    side = round((0.25 * 300 * 200) ** 0.5)
    assert (tall == side).all() and (wide == side).all()
    for offset, room in ((top, 300 - side), (left, 200 - side)):
        assert offset.min() < 0.02 * room + 1 and offset.max() > 0.98 * room - 1
        assert abs(offset.mean() - room / 2) < 4 * room / 12**0.5 / 800**0.5


def test_where_no_window_fits_the_central_one_with_the_nearest_ratio_is_taken():
    # 20 x 400: a whole-area window of ratio <= 4/3 is taller than the image.
    expected = [0, (400 - 27) // 2, 20, 27]  # 20 * 4/3 = 26.67
    assert (windows(20, 400, 5, scale=(1.0, 1.0)) == expected).all()
    expected = [(400 - 27) // 2, 0, 27, 20]  # 20 / (3/4)
    assert (windows(400, 20, 5, scale=(1.0, 1.0)) == expected).all()


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_random_resized_crop_is_pillows_resize_of_its_window(kind):
    data = encode(picture(120, 160), kind, **({"quality": 95, "subsampling": 0} if kind == "JPEG" else {}))
    image = Image.open(io.BytesIO(data)).convert("RGB")
    options = {"scale": (0.08, 1.0), "ratio": (3 / 4, 4 / 3)}
    for seed in seeds(6):
        top, left, tall, wide = augment.crop_window(120, 160, seed, **options).numpy().tolist()
        expected = image.crop((left, top, left + wide, top + tall)).resize((48, 48), Image.BICUBIC)
        got = augment.random_resized_crop(data, seed, size=48, **options)
        assert mean_difference(got, expected) <= 1.0


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "BMP", "GIF"])
def test_size_limit_holds_on_the_header_before_anything_is_decoded(kind):
    data = encode(picture(30, 50), kind, **({"quality": 95} if kind == "JPEG" else {}))
    assert decode.size(data).numpy().tolist() == [30, 50]
    options = {"size": 8, "scale": (0.5, 1.0), "ratio": (1.0, 1.0)}
    for limit in (0, 1500):
        assert decode.decode(data, max_pixels=limit).shape == (30, 50, 3)
        assert augment.random_resized_crop(data, seeds(1)[0], max_pixels=limit, **options).shape == (8, 8, 3)
    header = data[: len(data) * 3 // 4]  # what follows is missing, so only the header can have been read
    for encoded in (data, header):
        with pytest.raises(tf.errors.InvalidArgumentError):
            decode.decode(encoded, max_pixels=1499)
        with pytest.raises(tf.errors.InvalidArgumentError):
            augment.random_resized_crop(encoded, seeds(1)[0], max_pixels=1499, **options)


def test_size_limit_holds_for_the_picture_that_a_thin_image_becomes():
    data = encode(picture(2, 400), "PNG")
    assert decode.decode(data, max_pixels=800).shape == (2, 400, 3)
    assert decode.decode(data, max_pixels=64 * 64 * 200, short_side=64).shape == (2, 400, 3)  # 64 x 12,800 px
    with pytest.raises(tf.errors.InvalidArgumentError):
        decode.decode(data, max_pixels=64 * 64 * 200 - 1, short_side=64)


def test_top_down_bmp_has_a_size_too():
    data = bytearray(encode(picture(30, 50), "BMP"))
    data[22:26] = (-30).to_bytes(4, "little", signed=True)
    assert decode.size(bytes(data)).numpy().tolist() == [30, 50]


@pytest.mark.parametrize("method", ["bicubic", "bilinear"])
@pytest.mark.parametrize("shape", [(150, 181), (64, 300), (31, 17), (224, 224)])
def test_resize_is_tensorflows_antialiased_resize(method, shape):
    image = picture(*shape)
    reference = np.clip(tf.image.resize(image, [97, 112], method=method, antialias=True), 0, 255)
    got = augment.resize(image, 97, 112, method=method).numpy().astype(int)
    # Rounding, and float32's; the plain bicubic kernel, which enlarges, knows places to 1/1024 px only.
    exact = method == "bilinear" or shape != (31, 17)
    assert np.abs(got - reference).max() <= 0.5 + (1e-3 if exact else 0.1)
    assert abs((got - reference).mean()) <= 0.01


def test_flip_mirrors_with_its_probability():
    image = picture(4, 6)
    flipped = tf.function(lambda seed: augment.flip(image, seed, probability=0.25))
    mirrored = 0
    for seed in seeds(800):
        got = flipped(tf.constant(seed)).numpy()
        is_mirrored = (got == image[:, ::-1]).all()
        assert is_mirrored or (got == image).all()
        mirrored += is_mirrored
    assert abs(mirrored / 800 - 0.25) < 4 * (0.25 * 0.75 / 800) ** 0.5
    np.testing.assert_array_equal(augment.flip(image, seeds(1)[0], probability=0.0), image)
    np.testing.assert_array_equal(augment.flip(image, seeds(1)[0], probability=1.0), image[:, ::-1])


def test_every_run_purpose_position_and_draw_has_a_seed_of_its_own():
    drawn = {
        float(tf.random.stateless_uniform([], augment.draw_seed(augment.seed_of(run, purpose, position), draw)))
        for run in (0, 1, 2**31 - 1)
        for purpose in (1, 2, 3)
        for position in (0, 1, 2**31, 2**32, 2**32 + 1, 2**40)
        for draw in (1, 2, 8)
    }
    assert len(drawn) == 3 * 3 * 6 * 3


def test_neighbouring_seeds_are_uncorrelated():
    def drawn(offset):
        seed = augment.seed_of(5, 1, 0)
        draw = tf.function(lambda p: tf.random.stateless_uniform([], seed + tf.stack([tf.constant(0, tf.int64), p])))
        return np.array([draw(tf.constant(p, tf.int64)) for p in range(offset, offset + 2000)])

    values = drawn(0)
    assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 4 / 2000**0.5
    assert abs(values.mean() - 0.5) < 4 * (1 / 12 / 2000) ** 0.5
