"""One training view, composed by hand in the recipe's order; one evaluation view, against Pillow."""

import functools
import io

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from configs import deit_tiny_flowers
from deit import rules
from deit.data import augment, decode, ops, randaugment, sources, stream, views
from tests import photos

SIZE, POSITIONS = 64, range(24)
# Not ImageNet's, so that a view that takes those is noticed. 255 x mean = 51, 114.75, 216.75.
MEAN, STD, FILL = (0.2, 0.45, 0.85), (0.3, 0.1, 0.2), (51, 115, 217)

FULL = {}  # what is changed in the `full` preset
DEIT_III = {
    "augment.crop": "simple",
    "augment.randaugment": "",
    "augment.three_augment": True,
    "augment.jitter": 0.3,
    "augment.erasing": 0.0,
}
ERASED_TOO = {**DEIT_III, "augment.erasing": 0.25}  # no published recipe: what comes after jitter
SETTINGS = {"full": FULL, "deit-iii": DEIT_III, "deit-iii with erasing": ERASED_TOO}


def make_config(**fields):
    config = deit_tiny_flowers.get_config("full")
    config.data.image_size, config.seed = SIZE, 5
    config.model.mean, config.model.std = MEAN, STD
    config.update_from_flattened_dict(fields)
    rules.validate(config)
    return config


def encoded_at(position: int) -> bytes:
    """Return another photograph at each position: files of six sizes."""
    files = list(photos.files().values())
    return files[position % len(files)]


def seed_at(position: int) -> tf.Tensor:
    return tf.constant([5 * 256 + 1, position], tf.int64)  # run seed 5, purpose 1: augmentation


# --- The steps, one picture at a time, uint8 [S, S, 3] in and out; numbers are the recipes', not a configuration's


def random_resized(encoded, seed):
    return augment.random_resized_crop(encoded, seed, size=SIZE, scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3))


def simple(encoded, seed):
    return augment.simple_crop(decode.decode(encoded), seed, size=SIZE)


def flip(image, seed):
    return image[:, ::-1] if augment.flipped(seed, probability=0.5) else image


def rand_augment(image, seed):
    """Two of the operations of magnitude 9 and spread 0.5, each by its own call of ops.py."""
    drawn = {name: value.numpy() for name, value in randaugment.draw(seed, rules.Policy(9.0, 0.5, 2)).items()}
    for op, applied, level, sign in zip(drawn["op"], drawn["applied"], drawn["level"], drawn["sign"]):
        if not applied:
            continue
        name = randaugment.OPS[op]
        value = randaugment.argument(name, tf.constant(level), tf.constant(sign))
        image = {
            "AutoContrast": ops.autocontrast,
            "Equalize": ops.equalize,
            "Invert": ops.invert,
            "Rotate": lambda image, value=value: ops.rotate(image, value, FILL),
            "Posterize": lambda image, value=value: ops.posterize(image, value),
            "Solarize": lambda image, value=value: ops.solarize(image, value),
            "SolarizeAdd": lambda image, value=value: ops.solarize_add(image, value),
            "Color": lambda image, value=value: ops.color(image, value),
            "Contrast": lambda image, value=value: ops.contrast(image, value),
            "Brightness": lambda image, value=value: ops.brightness(image, value),
            "Sharpness": lambda image, value=value: ops.sharpness(image, value),
            "ShearX": lambda image, value=value: ops.shear_x(image, value, FILL),
            "ShearY": lambda image, value=value: ops.shear_y(image, value, FILL),
            "TranslateX": lambda image, value=value: ops.translate_x(image, value * SIZE, FILL),
            "TranslateY": lambda image, value=value: ops.translate_y(image, value * SIZE, FILL),
        }[name](image)
    return image


def three_augment(image, seed):
    choice = int(augment.three_augment_choice(seed))
    if choice == 2:
        return ops.gaussian_blur(image, augment.blur_radius(seed))
    return ops.grayscale(image) if choice == 0 else ops.solarize(image, 128)


def jitter(image, seed):
    factors = augment.jitter_factors(seed, strength=0.3)
    for which in augment.jitter_order(seed).numpy():
        image = (ops.brightness, ops.contrast, ops.color)[which](image, factors[which])
    return image


def erase(image, seed):
    return augment.erase(tf.convert_to_tensor(image), seed, probability=0.25, mean=MEAN, std=STD)


STEPS = {
    "full": (random_resized, flip, rand_augment, erase),
    "deit-iii": (simple, flip, three_augment, jitter),
    "deit-iii with erasing": (simple, flip, three_augment, jitter, erase),
}


@functools.cache
def by_hand(steps: tuple) -> list[np.ndarray]:
    pictures = []
    for position in POSITIONS:
        image, seed = encoded_at(position), seed_at(position)
        for step in steps:
            image = step(image, seed)
        pictures.append(np.asarray(image))
    return pictures


@functools.cache
def trained(setting: str) -> list[np.ndarray]:
    view = tf.function(views.training(make_config(**SETTINGS[setting])))
    return [view(tf.constant(encoded_at(position)), seed_at(position)).numpy() for position in POSITIONS]


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_training_view_is_the_recipes_steps_in_the_recipes_order(setting):
    for position, got, expected in zip(POSITIONS, trained(setting), by_hand(STEPS[setting])):
        assert got.dtype == np.uint8 and got.shape == (SIZE, SIZE, 3)
        np.testing.assert_array_equal(got, expected, err_msg=f"position {position}")


@pytest.mark.parametrize(
    ("setting", "first", "second"),
    [
        ("full", flip, rand_augment),
        ("full", rand_augment, erase),
        ("deit-iii", three_augment, jitter),
        ("deit-iii with erasing", jitter, erase),
    ],
    ids=lambda each: getattr(each, "__name__", each),
)
def test_steps_in_another_order_would_make_other_pictures(setting, first, second):
    """So the test above can tell orders apart at these positions."""
    steps = list(STEPS[setting])
    i = steps.index(first)
    assert steps[i + 1] is second
    steps[i], steps[i + 1] = second, first
    assert any((a != b).any() for a, b in zip(by_hand(tuple(steps)), by_hand(STEPS[setting])))


@pytest.mark.parametrize("setting", SETTINGS)
def test_no_step_could_be_left_out_unnoticed(setting):
    for step in STEPS[setting][1:]:
        rest = tuple(each for each in STEPS[setting] if each is not step)
        assert any((a != b).any() for a, b in zip(by_hand(rest), by_hand(STEPS[setting]))), step.__name__


@pytest.mark.parametrize(
    ("mean", "fill"),
    [
        (MEAN, FILL),
        ((0.485, 0.456, 0.406), (124, 116, 104)),  # ImageNet's: 123.675, 116.28, 103.53
        ((0.0, 0.0, 0.0), (0, 0, 0)),  # the Keras example's
        ((-0.1, 1.2, 1.0), (0, 255, 255)),
    ],
)
def test_the_fill_colour_is_the_students_mean_in_bytes(mean, fill):
    assert views.fill_colour(make_config(**{"model.mean": mean})) == fill


def test_what_a_moved_picture_leaves_free_has_the_fill_colour():
    white = tf.io.encode_png(tf.fill([40, 40, 3], tf.constant(255, tf.uint8)))
    view = tf.function(
        views.training(make_config(**{"augment.erasing": 0.0, "augment.randaugment": "rand-m9-n1-inc1"}))
    )
    shown = set()
    for position in range(60):
        drawn = randaugment.draw(seed_at(position), rules.Policy(9.0, 0.0, 1))
        name = randaugment.OPS[int(drawn["op"][0])]
        if drawn["applied"][0] and name in ("Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY"):
            picture = view(white, seed_at(position)).numpy()
            assert {tuple(pixel) for pixel in picture.reshape([-1, 3]).tolist()} == {(255, 255, 255), FILL}, name
            shown.add(name)
    assert len(shown) >= 4


# --- Evaluation -----------------------------------------------------------------------------------------------


def evaluated(files: list[bytes], size: int, crop_ratio: float) -> np.ndarray:
    """Return the pictures of the evaluation stream, uint8 [N, S, S, 3]."""
    config = make_config(**{"data.image_size": size, "eval.crop_ratio": crop_ratio})
    source = sources.InMemory(files, np.zeros(len(files), np.int64), classes=["one", "other"])
    batches = list(stream.evaluation(source, config, batch=len(files)).as_numpy_iterator())
    assert len(batches) == 1 and batches[0]["weight"].all()
    return batches[0]["image"]


def resized_and_cropped(image: Image.Image) -> Image.Image:
    """Return torchvision's Resize(256, bicubic) and CenterCrop(224) by Pillow."""
    width, height = image.size
    short = min(width, height)
    width, height = int(256 * width / short), int(256 * height / short)
    left, top = round((width - 224) / 2), round((height - 224) / 2)
    return image.resize((width, height), Image.BICUBIC).crop((left, top, left + 224, top + 224))


@pytest.mark.parametrize(
    ("crop_ratio", "by_pillow"),
    [(0.875, resized_and_cropped), (0.0, lambda image: image.resize((224, 224), Image.BILINEAR))],
    ids=["DeiT", "Keras example"],
)
def test_an_evaluated_picture_is_pillows(crop_ratio, by_pillow):
    files = list(photos.files().values())
    for encoded, got in zip(files, evaluated(files, 224, crop_ratio), strict=True):
        np.testing.assert_array_equal(got, augment.evaluation(decode.decode(encoded), size=224, crop_ratio=crop_ratio))
        expected = np.asarray(by_pillow(Image.open(io.BytesIO(encoded)).convert("RGB")), np.int32)
        assert np.abs(got - expected).mean() <= 0.3  # of 255: Pillow rounds twice; another filter is off by 0.5 to 4
