"""What augment.py draws, ten thousand times, against NumPy twins of the stated laws; and what it does with a draw."""

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from scipy import stats

from deit import rules
from deit.data import augment, randaugment
from tests import draws, photos

TWINS = 40_000  # simulated draws beside our 10,000
SCALE, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)


def off(got, expected) -> float:
    """Return the mean absolute difference."""
    return float(np.abs(np.asarray(got, np.int32) - np.asarray(expected, np.int32)).mean())


def first_that_fits(tall: np.ndarray, wide: np.ndarray, fits: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return height, width and "found" [n] of the first of several tries [n, tries]."""
    rows, first = np.arange(len(fits)), fits.argmax(1)
    return tall[rows, first], wide[rows, first], fits.any(1)


# --- the window of a random-resized crop --------------------------------------------------------------------


def crop_twin(height: int, width: int, *, scale=SCALE, ratio=RATIO, seed: int = 0) -> np.ndarray:
    """torchvision's loop: ten tries of area and ratio, else the central window with the nearest ratio: [n, 4]."""
    rng = np.random.RandomState(seed)
    area = rng.uniform(*scale, [TWINS, 10]) * height * width
    aspect = np.exp(rng.uniform(*np.log(ratio), [TWINS, 10]))
    wide, tall = np.round(np.sqrt(area * aspect)), np.round(np.sqrt(area / aspect))
    tall, wide, found = first_that_fits(tall, wide, (wide > 0) & (wide <= width) & (tall > 0) & (tall <= height))
    top = np.where(found, rng.randint(0, np.where(found, height - tall, 0).astype(int) + 1), 0)
    left = np.where(found, rng.randint(0, np.where(found, width - wide, 0).astype(int) + 1), 0)
    whole_h = round(width / ratio[0]) if width / height < ratio[0] else height
    whole_w = round(height * ratio[1]) if width / height > ratio[1] else width
    fallback = [(height - whole_h) // 2, (width - whole_w) // 2, whole_h, whole_w]
    return np.where(found[:, None], np.stack([top, left, tall, wide], 1), fallback)


@pytest.mark.parametrize("height, width", [(400, 400), (240, 320), (500, 210), (64, 400)])
def test_crop_windows_have_torchvisions_law(height, width):
    got = draws.sample(lambda seed: augment.crop_window(height, width, seed, scale=SCALE, ratio=RATIO))
    twin = crop_twin(height, width)
    assert (got >= 0).all() and (got[:, 2:] >= 1).all()
    assert (got[:, 0] + got[:, 2] <= height).all() and (got[:, 1] + got[:, 3] <= width).all()
    for ours, theirs in zip(got.T, twin.T):
        draws.assert_same_law(ours, theirs)
    draws.assert_same_law(got[:, 2] * got[:, 3], twin[:, 2] * twin[:, 3])
    draws.assert_same_law(got[:, 3] / got[:, 2], twin[:, 3] / twin[:, 2])


def test_area_is_uniform_and_ratio_log_uniform_where_every_window_fits():
    side, scale = 2000, (0.08, 0.5)
    *_, tall, wide = draws.sample(lambda seed: augment.crop_window(side, side, seed, scale=scale, ratio=RATIO)).T
    draws.assert_law(tall * wide / side**2, stats.uniform(0.08, 0.42))
    low, high = np.log(RATIO)
    draws.assert_law(np.log(wide / tall), stats.uniform(low, high - low))
    draws.assert_unrelated([tall * wide, np.log(wide / tall)], ["area", "ratio"])


def test_where_a_window_lies_is_uniform():
    top, left, *_ = draws.sample(lambda s: augment.crop_window(29, 25, s, scale=(0.5517, 0.5517), ratio=(1.0, 1.0))).T
    draws.assert_uniform_choice(top * 6 + left, 10 * 6)  # 20 x 20 px: 10 rows and 6 columns to lie at


# --- the simple crop of DeiT-III ----------------------------------------------------------------------------


def coordinates(height: int, width: int) -> np.ndarray:
    """Return a picture whose red is 3 x row and green 3 x column, up to 80 px."""
    return np.stack([*(3 * np.indices([height, width])), np.zeros([height, width])], -1).astype(np.uint8)


@pytest.mark.parametrize("height, width", [(24, 24), (24, 40), (40, 24)])
def test_simple_crop_lies_anywhere_in_the_padded_picture(height, width):
    """Without a resize the pixel in the middle of the crop tells where it was taken; the padding is 4 px."""
    image = coordinates(height, width)
    middle = draws.sample(lambda seed: augment.simple_crop(image, seed, size=24)[12, 12])
    row, column = (middle[:, axis].astype(int) // 3 - 12 + 4 for axis in (0, 1))
    rows, columns = height + 8 - 24 + 1, width + 8 - 24 + 1
    assert (middle[:, :2] % 3 == 0).all() and row.min() >= 0 and row.max() < rows
    draws.assert_uniform_choice(row * columns + column, rows * columns)


def test_simple_crop_reflects_without_repeating_the_edge():
    image = coordinates(24, 31)
    padded = np.pad(image, [[4, 4], [4, 4], [0, 0]], "reflect")
    for seed in draws.seeds(40):
        got = augment.simple_crop(image, seed, size=24).numpy()
        top, left = (int(got[12, 12, axis]) // 3 - 12 + 4 for axis in (0, 1))
        np.testing.assert_array_equal(got, padded[top : top + 24, left : left + 24])


@pytest.mark.parametrize("name", ["china.jpg", "upright", "small"])
def test_simple_crop_is_a_crop_of_pillows_resize(name):
    """The short side becomes 40 px, the long side is cut off to whole pixels; bicubic."""
    image, size = np.asarray(photos.opened(name)), 40
    least = min(image.shape[:2])
    height, width = (int(size * side / least) for side in image.shape[:2])
    resized = np.asarray(Image.fromarray(image).resize((width, height), Image.BICUBIC))
    padded = np.pad(resized, [[4, 4], [4, 4], [0, 0]], "reflect")
    for seed in draws.seeds(5):
        got = augment.simple_crop(image, seed, size=size)
        assert got.dtype == tf.uint8 and got.shape == [size, size, 3]
        places = [(y, x) for y in range(height + 9 - size) for x in range(width + 9 - size)]
        assert min(off(got, padded[y : y + size, x : x + size]) for y, x in places) <= 1.0


# --- flip, jitter, 3-Augment --------------------------------------------------------------------------------


def test_flip_has_its_probability():
    image = coordinates(1, 2)
    flipped = draws.sample(lambda seed: augment.flip(image, seed, probability=0.5))[:, 0, 0, 1] == 3
    draws.assert_probability(flipped, 0.5)


@pytest.mark.parametrize("strength", [0.3, 0.4, 1.0])
def test_jitter_factors_are_uniform_around_one(strength):
    factors = draws.sample(lambda seed: augment.jitter_factors(seed, strength=strength))
    assert factors.dtype == np.float32 and factors.shape == (draws.COUNT, 3)
    for column in factors.T:
        draws.assert_law(column, stats.uniform(1 - strength, 2 * strength))
    draws.assert_unrelated(factors.T, ["brightness", "contrast", "saturation"])


def test_jitter_takes_every_order_equally_often():
    orders = draws.sample(augment.jitter_order)
    assert orders.dtype == np.int32 and (np.sort(orders, 1) == [0, 1, 2]).all()
    draws.assert_uniform_choice(orders[:, 0] * 2 + (orders[:, 1] > orders[:, 2]), 6)


def test_jitter_is_pillows_in_the_drawn_order():
    image = photos.views()[1]
    enhance = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
    orders = set()
    for seed in draws.seeds(12):
        factors, order = augment.jitter_factors(seed, strength=0.3).numpy(), augment.jitter_order(seed).numpy()
        orders.add(tuple(order))
        expected = Image.fromarray(image)
        for which in order:
            expected = enhance[which](expected).enhance(float(factors[which]))
        got = augment.jitter(image, seed, strength=0.3)
        assert got.dtype == tf.uint8
        assert off(got, expected) <= 1.0, (factors, order)
    assert len(orders) >= 4


def test_jitter_of_no_strength_changes_nothing():
    np.testing.assert_array_equal(augment.jitter(photos.small(), draws.seeds(1)[0], strength=0.0), photos.small())


def test_three_augment_chooses_evenly():
    draws.assert_uniform_choice(draws.sample(augment.three_augment_choice), 3)


def test_blur_radius_is_uniform():
    draws.assert_law(draws.sample(augment.blur_radius), stats.uniform(0.1, 1.9))


def test_three_augment_does_what_it_chose():
    image = photos.views()[1]
    pillow = Image.fromarray(image)
    seen = set()
    for seed in draws.seeds(24):
        choice, radius = int(augment.three_augment_choice(seed)), float(augment.blur_radius(seed))
        expected = (
            lambda: pillow.convert("L").convert("RGB"),
            lambda: ImageOps.solarize(pillow, 128),
            lambda radius=radius: pillow.filter(ImageFilter.GaussianBlur(radius)),
        )[choice]()
        got = augment.three_augment(image, seed)
        assert got.dtype == tf.uint8
        assert off(got, expected) <= (1.0, 1.0, 2.0)[choice], (choice, radius)
        seen.add(choice)
    assert seen == {0, 1, 2}


# --- random erasing -----------------------------------------------------------------------------------------


def erase_twin(height: int, width: int, probability: float, seed: int = 0) -> np.ndarray:
    """timm's loop: ten tries of area and aspect for a box smaller than the picture on both axes: [n, 4], 0: none."""
    rng = np.random.RandomState(seed)
    area = rng.uniform(0.02, 1 / 3, [TWINS, 10]) * height * width
    aspect = np.exp(rng.uniform(np.log(0.3), np.log(1 / 0.3), [TWINS, 10]))
    tall, wide = np.round(np.sqrt(area * aspect)), np.round(np.sqrt(area / aspect))
    tall, wide, found = first_that_fits(tall, wide, (tall < height) & (wide < width))
    found &= rng.uniform(size=TWINS) < probability
    tall, wide = np.where(found, tall, 0), np.where(found, wide, 0)
    top, left = (rng.randint(0, (a - b).astype(int) + 1) for a, b in ((height, tall), (width, wide)))
    return np.stack([top, left, tall, wide], 1) * found[:, None]


@pytest.mark.parametrize("height, width, probability", [(224, 224, 0.25), (224, 224, 1.0), (30, 200, 1.0), (8, 9, 0.5)])
def test_erased_boxes_have_timms_law(height, width, probability):
    got = draws.sample(lambda seed: augment.erase_box(height, width, seed, probability=probability))
    twin = erase_twin(height, width, probability)
    assert got.dtype == np.int32
    draws.assert_same_share(got[:, 2] > 0, twin[:, 2] > 0)
    got, twin = got[got[:, 2] > 0], twin[twin[:, 2] > 0]
    assert (got >= 0).all() and (got[:, 2] < height).all() and (got[:, 3] < width).all()
    assert (got[:, 0] + got[:, 2] <= height).all() and (got[:, 1] + got[:, 3] <= width).all()
    for ours, theirs in zip(got.T, twin.T):
        draws.assert_same_law(ours, theirs)
    draws.assert_same_law(got[:, 2] * got[:, 3], twin[:, 2] * twin[:, 3])
    draws.assert_same_law(got[:, 2] / got[:, 3], twin[:, 2] / twin[:, 3])


def test_erasing_happens_with_its_probability():
    for probability in (0.0, 0.25, 1.0):
        boxes = draws.sample(lambda seed, p=probability: augment.erase_box(224, 224, seed, probability=p))
        draws.assert_probability(boxes[:, 2] > 0, probability)


def test_area_and_aspect_of_a_box_are_uniform_and_log_uniform_where_all_fit():
    """A quarter of the area at aspect 3.3 is 0.91 of the side: smaller ones always fit, so nothing is redrawn."""
    boxes = draws.sample(lambda seed: augment.erase_box(2000, 2000, seed, probability=1.0))
    area = boxes[:, 2] * boxes[:, 3] / 2000**2
    aspect = np.log(boxes[:, 2] / boxes[:, 3])
    some = area < 0.25
    draws.assert_law(area[some], stats.uniform(0.02, 0.23))
    draws.assert_law(aspect[some], stats.uniform(np.log(0.3), -2 * np.log(0.3)))


def test_erased_pixels_are_the_box_and_nothing_else():
    image = tf.zeros([64, 80, 3], tf.uint8)
    for seed in draws.seeds(30):
        top, left, tall, wide = augment.erase_box(64, 80, seed, probability=0.5).numpy()
        got = augment.erase(image, seed, probability=0.5, mean=(0.5,) * 3, std=(0.05,) * 3).numpy()
        expected = np.zeros([64, 80, 3], bool)
        expected[top : top + tall, left : left + wide] = True
        np.testing.assert_array_equal(got > 0, expected)


def test_erased_pixels_are_normal_in_the_students_scale():
    """Each value by itself: (x / 255 - mean) / std is N(0, 1), up to the rounding to bytes."""
    mean, std = np.array([0.40, 0.5, 0.55]), np.array([0.08, 0.06, 0.09])
    image, found = tf.zeros([96, 96, 3], tf.uint8), []
    for seed in draws.seeds(40):
        top, left, tall, wide = augment.erase_box(96, 96, seed, probability=1.0).numpy()
        got = augment.erase(image, seed, probability=1.0, mean=mean.tolist(), std=std.tolist()).numpy()
        found.append((got[top : top + tall, left : left + wide].reshape([-1, 3]) / 255 - mean) / std)
    values = np.concatenate(found)
    count = len(values)
    assert count > 20_000
    assert np.abs(values.mean(0)).max() < 5 / count**0.5
    assert (
        np.abs(values.std(0) - 1).max() < 5 / (2 * count) ** 0.5 + 0.002
    )  # the rounding adds 1 / 12 of a step squared
    spread = np.random.RandomState(0).uniform(-0.5, 0.5, values.shape) / 255 / std  # undoes the steps
    for column in (values + spread).T:
        assert stats.kstest(column, stats.norm.cdf).statistic < 0.015
    draws.assert_unrelated([*values.T, np.roll(values[:, 0], 1)], ["red", "green", "blue", "the next red"])
    assert len({tuple(f[:2].ravel()) for f in found}) == len(found)  # another noise for every seed


def test_erased_pixels_are_clipped_to_bytes():
    mean, std = (0.9, 0.1, 0.5), (0.229, 0.224, 0.225)
    got = augment.erase(
        tf.fill([96, 96, 3], tf.constant(7, tf.uint8)), draws.seeds(3)[2], probability=1.0, mean=mean, std=std
    ).numpy()
    top, left, tall, wide = augment.erase_box(96, 96, draws.seeds(3)[2], probability=1.0).numpy()
    inside = got[top : top + tall, left : left + wide].reshape([-1, 3])
    for column, bound, law in (
        (0, 255, stats.norm.sf(254.5 / 255, 0.9, 0.229)),
        (1, 0, stats.norm.cdf(0.5 / 255, 0.1, 0.224)),
    ):
        draws.assert_probability(inside[:, column] == bound, law)


def test_no_probability_erases_nothing():
    image = tf.constant(photos.small())
    for seed in draws.seeds(20):
        np.testing.assert_array_equal(
            augment.erase(image, seed, probability=0.0, mean=(0.5,) * 3, std=(0.2,) * 3), image
        )


# --- all of them --------------------------------------------------------------------------------------------


def test_different_draws_of_one_image_are_unrelated():
    """Every draw has its own constant: one seed says nothing twice."""
    policy = rules.randaugment_policy("rand-m9-mstd0.5-inc1")

    def every(seed):
        window = tf.cast(augment.crop_window(2000, 2000, seed, scale=(0.08, 0.5), ratio=RATIO), tf.float64)
        box = tf.cast(augment.erase_box(224, 224, seed, probability=0.5), tf.float64)
        some = randaugment.draw(seed, policy)
        values = {
            "crop top": window[0] / (2001 - window[2]),
            "crop left": window[1] / (2001 - window[3]),
            "crop area": window[2] * window[3],
            "crop ratio": tf.math.log(window[3] / window[2]),
            "flip": augment.flipped(seed, probability=0.5),
            "erased": box[2] > 0,
            "grey, solarize or blur": augment.three_augment_choice(seed),
            "radius": augment.blur_radius(seed),
            "order": augment.jitter_order(seed)[0],
            **{f"jitter {i}": augment.jitter_factors(seed, strength=0.3)[i] for i in range(3)},
            **{f"{name} {slot}": some[name][slot] for name in some for slot in range(2)},
        }
        return {name: tf.cast(value, tf.float64) for name, value in values.items()}

    found = draws.sample(every)
    draws.assert_unrelated(list(found.values()), list(found))
    box = draws.sample(lambda seed: augment.erase_box(224, 224, seed, probability=1.0)).astype(float)
    box = {
        "erased top": box[:, 0] / (225 - box[:, 2]),
        "erased left": box[:, 1] / (225 - box[:, 3]),
        "erased area": box[:, 2] * box[:, 3],
        "erased aspect": np.log(box[:, 2] / box[:, 3]),
    }
    for name, column in box.items():
        for other, values in found.items():
            draws.assert_unrelated([column, values], [name, other])


STATISTICS = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
EVERY = {
    "resize_crop": lambda image, seed: augment.resize_crop(image, seed, size=32, margin=6),
    "random_resized_crop": lambda image, seed: augment.random_resized_crop(
        tf.io.encode_jpeg(image), seed, size=32, scale=SCALE, ratio=RATIO
    ),
    "simple_crop": lambda image, seed: augment.simple_crop(image, seed, size=32),
    "flip": lambda image, seed: augment.flip(image, seed, probability=0.5),
    "jitter": lambda image, seed: augment.jitter(image, seed, strength=0.3),
    "three_augment": augment.three_augment,
    "erase": lambda image, seed: augment.erase(image, seed, probability=0.5, **STATISTICS),
}


@pytest.mark.parametrize("name", EVERY)
def test_same_seed_same_bytes_in_any_thread(name):
    image = tf.constant(photos.small(48))

    def run(calls):
        dataset = tf.data.Dataset.from_tensor_slices(draws.seeds(64))
        dataset = dataset.map(lambda seed: EVERY[name](image, seed), num_parallel_calls=calls)
        return np.stack(list(dataset.as_numpy_iterator()))

    once = run(1)
    assert once.dtype == np.uint8
    np.testing.assert_array_equal(run(4), once)
    np.testing.assert_array_equal(run(1), once)
    # Of 64 views 3-Augment blurs a third, each by a radius of its own; its other two choices make one picture each.
    assert len({picture.tobytes() for picture in once}) >= {"flip": 2, "three_augment": 10}.get(name, 20)
