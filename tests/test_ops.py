"""Every op against Pillow's: on photographs at fixed parameters, and on pictures that make formulas divide by zero."""

import numpy as np
import pytest
import tensorflow as tf

from deit.data import augment, decode, ops
from tests import draws, photos
from tools import parity_cases

NAMES = sorted({case.op for case in parity_cases.IMAGE_CASES})
POINT_NAMES = sorted({case.op for case in parity_cases.IMAGE_CASES if case.bound == parity_cases.POINT})


def degenerate() -> dict[str, np.ndarray]:
    """Return pictures without contrast, with two colours, with a constant channel, and very small ones."""
    rng = np.random.RandomState(0)
    noise = rng.randint(0, 256, [40, 56, 3]).astype(np.uint8)
    one_channel = noise.copy()
    one_channel[..., 1] = 90
    return {
        **{f"constant {value}": np.full([40, 56, 3], value, np.uint8) for value in (0, 1, 77, 254, 255)},
        "one colour": np.tile(np.array([200, 30, 111], np.uint8), [40, 56, 1]),
        "two colours": np.where(noise[..., :1] < 60, [10, 200, 30], [240, 20, 35]).astype(np.uint8),
        "black and white": np.where(noise[..., :1] < 128, [0, 0, 0], [255, 255, 255]).astype(np.uint8),
        "a constant channel": one_channel,
        "one bright pixel": np.pad(np.full([1, 1, 3], 255, np.uint8), [[7, 8], [9, 6], [0, 0]]),
        "narrow range": (100 + noise % 3).astype(np.uint8),
        "8 x 8": noise[:8, :8],
        "9 x 5": noise[:9, :5],
        "noise": noise,
    }


@pytest.mark.parametrize("case", parity_cases.IMAGE_CASES, ids=str)
def test_op_is_pillows_on_photographs(case):
    found = [parity_cases.difference(case, view) for view in photos.views()]
    assert max(mean for mean, _ in found) <= case.bound, found


@pytest.mark.parametrize("case", [c for c in parity_cases.IMAGE_CASES if c.bound == parity_cases.POINT], ids=str)
def test_point_op_is_off_by_one_at_most(case):
    """The mean could hide a wrong value that few pixels have."""
    assert max(largest for _, largest in (parity_cases.difference(case, view) for view in photos.views())) <= 1


@pytest.mark.parametrize("name", NAMES)
def test_op_is_pillows_on_degenerate_pictures(name):
    for case in (case for case in parity_cases.IMAGE_CASES if case.op == name):
        for kind, picture in degenerate().items():
            mean, largest = parity_cases.difference(case, picture)
            assert mean <= case.bound, (str(case), kind, mean, largest)


@pytest.mark.parametrize("name", POINT_NAMES)
def test_point_op_is_off_by_one_at_most_on_degenerate_pictures(name):
    for case in (case for case in parity_cases.IMAGE_CASES if case.op == name):
        for kind, picture in degenerate().items():
            assert parity_cases.difference(case, picture)[1] <= 1, (str(case), kind)


@pytest.mark.parametrize("case", parity_cases.FILE_CASES, ids=str)
def test_file_to_pixels_is_pillows_for_photographs_of_every_size(case):
    found = {name: parity_cases.difference(case, encoded)[0] for name, encoded in photos.files().items()}
    assert max(found.values()) <= case.bound, found


def test_flowers_are_pillows(flowers_dir):
    table = parity_cases.rows(photos.flowers(flowers_dir, 6))
    assert not [row for row in table if row.worst_mean > row.bound]


def test_parameters_may_be_numbers():
    image = photos.small()
    for name, value, dtype in (("posterize", 3, "int32"), ("solarize", 90, "int32"), ("color", 0.3, "float32")):
        op = getattr(ops, name)
        np.testing.assert_array_equal(op(image, value), op(tf.constant(image), tf.constant(value, dtype)))
    np.testing.assert_array_equal(
        ops.rotate(image, 20.0, (1, 2, 3)), ops.rotate(image, tf.constant(20.0), tf.constant([1, 2, 3], tf.uint8))
    )


def test_what_a_picture_leaves_free_has_the_fill_colour():
    image = np.zeros([30, 40, 3], np.uint8)
    fill = np.array([124, 116, 104])
    np.testing.assert_array_equal(ops.translate_x(image, 10.0, fill).numpy()[:, -10:], np.tile(fill, [30, 10, 1]))
    np.testing.assert_array_equal(ops.translate_y(image, -12.0, fill).numpy()[:12], np.tile(fill, [12, 40, 1]))
    np.testing.assert_array_equal(ops.rotate(image, 45.0, fill).numpy()[0, 0], fill)
    assert (ops.translate_x(image, 10.0, fill).numpy()[:, :-10] == 0).all()


@pytest.mark.parametrize(
    "name, parameters",
    [
        ("invert", ()),
        ("posterize", (8,)),
        ("solarize", (256,)),
        ("solarize_add", (0,)),
        *((name, (1.0,)) for name in ("color", "contrast", "brightness", "sharpness")),
        *((name, (0.0, (9, 9, 9))) for name in ("rotate", "shear_x", "shear_y", "translate_x", "translate_y")),
    ],
)
def test_neutral_parameters_change_nothing(name, parameters):
    image = photos.small()
    got = getattr(ops, name)(image, *parameters)
    if name == "invert":
        got = ops.invert(got)  # its own inverse
    assert got.dtype == tf.uint8
    np.testing.assert_array_equal(got, image)


def test_ops_keep_a_known_shape():
    """A batch needs static shapes: what is known before an op is known after it."""
    fixed = tf.TensorSpec([48, 32, 3], tf.uint8)
    for op, parameters in (
        *((op, ()) for op in (ops.autocontrast, ops.equalize, ops.invert, ops.grayscale)),
        *((op, (1,)) for op in (ops.posterize, ops.solarize, ops.solarize_add)),
        *((op, (0.5,)) for op in (ops.color, ops.contrast, ops.brightness, ops.sharpness, ops.gaussian_blur)),
        *((op, (0.2, (1, 2, 3))) for op in (ops.rotate, ops.shear_x, ops.shear_y, ops.translate_x, ops.translate_y)),
    ):
        made = tf.function(lambda image, op=op, parameters=parameters: op(image, *parameters))
        output = made.get_concrete_function(fixed).structured_outputs
        assert output.dtype == tf.uint8 and output.shape == [48, 32, 3], op.__name__


def test_crop_of_a_jpeg_decodes_only_its_window():
    """The lower half is missing: a window above it is read, the whole picture is not."""
    encoded = photos.files()["china.jpg"]
    broken = encoded[: int(len(encoded) * 0.6)]
    options = {"scale": (0.08, 0.08), "ratio": (1.0, 1.0)}
    above = next(
        seed
        for seed in ([7, i] for i in range(100))
        if sum(augment.crop_window(427, 640, tf.constant(seed, tf.int64), **options).numpy()[[0, 2]]) < 200
    )
    got = augment.random_resized_crop(broken, tf.constant(above, tf.int64), size=64, **options)
    expected = augment.random_resized_crop(encoded, tf.constant(above, tf.int64), size=64, **options)
    np.testing.assert_array_equal(got, expected)
    with pytest.raises(tf.errors.InvalidArgumentError):
        decode.decode(broken)


def test_a_decoded_window_is_the_whole_pictures_but_for_its_outermost_pixels():
    """There the decoder has no neighbour to smooth the halved colour channels with."""
    for encoded in photos.files().values():
        image = parity_cases.pixels(encoded)
        for seed in draws.seeds(6):
            box = augment.crop_window(*image.shape[:2], seed, scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3))
            top, left, tall, wide = box.numpy()
            got = decode.window(encoded, lambda *_, box=box: box).numpy().astype(np.int32)
            off = np.abs(got - image[top : top + tall, left : left + wide])
            assert off[1:-1, 1:-1].max() == 0 and off.mean() <= 0.1
