"""What is drawn at three positions, as recorded: the one test here that holds values nobody worked out otherwise.

It guards continuity, not correctness. A run that was begun must go on with the draws it was begun with, so whoever
renumbers a constant, draws in another order or cuts splits otherwise is to notice it and raise `stream.VERSION`.
The laws of the draws are held by test_augment_draws.py, test_randaugment.py and test_mixing.py.
"""

import pprint

import numpy as np
import pytest
import tensorflow as tf

from configs import deit_tiny_flowers
from deit import rules
from deit.data import augment, randaugment, sources, splits, stream

N, SIZE = 3303, 224


def training_batch(position: int) -> tuple[dict[str, np.ndarray], int]:
    """Return the update of 16 positions in which `position` lies, and its row.

    The data: 3303 examples labelled by their index; every second pair of neighbours is mixed, by chance.
    """
    config = deit_tiny_flowers.get_config("full")
    config.seed, config.model.seed = 5, 6
    config.global_batch, config.augment.mix_group, config.augment.mix_prob = 16, 2, 0.5
    config.augment.randaugment, config.augment.erasing = "", 0.0  # drawn below, from the same seed
    encoded = tf.io.encode_png(tf.zeros([8, 8, 3], tf.uint8)).numpy()
    source = sources.InMemory([encoded] * N, np.arange(N), classes=["one"])
    batches = stream.training(
        source, config, start_update=position // 16, slice_start=0, slice_size=16, drop_rates=(0.5,) * 12
    )
    return next(batches.as_numpy_iterator()), position % 16


def whole(values, unit: float = 1.0) -> list[int]:
    return [int(value) for value in np.rint(np.ravel(values) / unit)]


def drawn_at(position: int) -> dict[str, list]:
    """Return what is drawn at a position of the run with seed 5 (of the model: 6), in names and whole numbers."""
    config = deit_tiny_flowers.get_config("full")
    config.seed = 5
    seed, c = stream.augmentation_seed(config, position), config.augment
    batch, row = training_batch(position)
    around = [stream.augmentation_seed(config, other) for other in batch["position"]]
    some = randaugment.draw(seed, rules.randaugment_policy(c.randaugment))
    rows, columns = np.indices([40, 40])
    places = tf.constant(np.stack([6 * rows, 6 * columns, 0 * rows], -1), tf.uint8)  # a pixel tells where it was
    noise = augment.erase(tf.zeros([SIZE, SIZE, 3], tf.uint8), seed, probability=1.0, mean=[0.5] * 3, std=[0.1] * 3)
    top, left, *_ = box = augment.erase_box(SIZE, SIZE, seed, probability=1.0).numpy()
    return {
        "index": whole(stream.positions_to_indices(tf.constant([position], tf.int64), n=N, seed=5)),
        "index of three repeats": whole(batch["label"][row]),
        "window in 375 x 500 px": whole(augment.crop_window(375, 500, seed, scale=c.scale, ratio=c.ratio)),
        "place of 20 in 40 px": whole(augment.resize_crop(places, seed, size=20, margin=20)[0, 0, :2], 6),
        "middle of a simple crop": whole(augment.simple_crop(places, seed, size=40)[20, 20, :2], 6),
        "flip, whole update": whole([augment.flipped(each, probability=c.flip) for each in around]),
        "RandAugment": [randaugment.OPS[op] for op in some["op"].numpy()],
        "RandAugment: applied": whole(some["applied"]),
        "RandAugment: level in tenths": whole(some["level"], 0.1),
        "RandAugment: sign": whole(some["sign"]),
        "3-Augment: what": whole(augment.three_augment_choice(seed)),
        "3-Augment: radius in tenths": whole(augment.blur_radius(seed), 0.1),
        "jitter: percent": whole(augment.jitter_factors(seed, strength=0.3), 0.01),
        "jitter: order": whole(augment.jitter_order(seed)),
        "erased, whole update": whole(
            [augment.erase_box(SIZE, SIZE, each, probability=c.erasing)[2] > 0 for each in around]
        ),
        "erased box": whole(box),
        "first noise": whole(noise[top, left]),
        "kept branches": whole(batch["drop"][row]),
        "own label in percent, whole update": whole(batch["mix_lambda"][::2], 0.01),
        "mixed box": whole(batch["mix_box"][row]),
    }


def split_of() -> dict[str, list]:
    """Return the beginnings of drawn splits."""
    config = deit_tiny_flowers.get_config("smoke")
    config.data.split_seed = 5
    return {
        "ninety percent of 3670": splits.rows(3670, (0.0, 90.0), "train", seed=5)[:6].tolist(),
        "the rest": splits.rows(3670, (90.0, 100.0), "train", seed=5)[:6].tolist(),
        **{
            split: [sources.open_source(config.data, split).name(i) for i in range(4)]
            for split in ("train[:90%]", "train[90%:]", "test")
        },
    }


VERSION = 2  # of the stream, whose draws these are
DRAWN = {
    5: {
        "index": [2273],
        "index of three repeats": [3157],
        "window in 375 x 500 px": [2, 6, 369, 424],
        "place of 20 in 40 px": [17, 19],
        "middle of a simple crop": [23, 24],
        "flip, whole update": [1, 1, 0, 1, 0, 1, 1, 0, 1, 1, 0, 1, 1, 1, 0, 0],
        "RandAugment": ["Equalize", "Rotate"],
        "RandAugment: applied": [1, 1],
        "RandAugment: level in tenths": [95, 85],
        "RandAugment: sign": [1, -1],
        "3-Augment: what": [0],
        "3-Augment: radius in tenths": [18],
        "jitter: percent": [86, 112, 121],
        "jitter: order": [2, 0, 1],
        "erased, whole update": [0, 0, 0, 1, 0, 1, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0],
        "erased box": [11, 55, 124, 76],
        "first noise": [126, 153, 103],
        "kept branches": [0, 0, 0, 1, 1, 1, 1, 0, 0, 1, 1, 0],
        "own label in percent, whole update": [0, 100, 60, 88, 96, 76, 98, 63],
        "mixed box": [31, 73, 142, 142],
    },
    40_004: {
        "index": [2687],
        "index of three repeats": [2332],
        "window in 375 x 500 px": [23, 23, 272, 289],
        "place of 20 in 40 px": [7, 10],
        "middle of a simple crop": [19, 20],
        "flip, whole update": [0, 1, 1, 0, 1, 1, 0, 1, 0, 0, 0, 0, 1, 0, 0, 1],
        "RandAugment": ["AutoContrast", "Solarize"],
        "RandAugment: applied": [1, 0],
        "RandAugment: level in tenths": [96, 96],
        "RandAugment: sign": [-1, 1],
        "3-Augment: what": [1],
        "3-Augment: radius in tenths": [10],
        "jitter: percent": [128, 129, 91],
        "jitter: order": [2, 1, 0],
        "erased, whole update": [0, 0, 1, 1, 0, 0, 0, 1, 0, 0, 1, 1, 0, 1, 0, 1],
        "erased box": [74, 110, 67, 102],
        "first noise": [153, 203, 135],
        "kept branches": [0, 1, 0, 0, 1, 0, 0, 0, 0, 1, 1, 0],
        "own label in percent, whole update": [6, 100, 43, 1, 100, 65, 16, 96],
        "mixed box": [0, 0, 224, 224],
    },
    2**33 + 16: {
        "index": [2065],
        "index of three repeats": [1861],
        "window in 375 x 500 px": [14, 10, 358, 457],
        "place of 20 in 40 px": [18, 20],
        "middle of a simple crop": [23, 24],
        "flip, whole update": [1, 1, 1, 1, 1, 1, 1, 0, 0, 1, 0, 0, 1, 1, 0, 0],
        "RandAugment": ["Posterize", "Color"],
        "RandAugment: applied": [1, 1],
        "RandAugment: level in tenths": [100, 96],
        "RandAugment: sign": [1, -1],
        "3-Augment: what": [2],
        "3-Augment: radius in tenths": [10],
        "jitter: percent": [97, 115, 109],
        "jitter: order": [2, 0, 1],
        "erased, whole update": [0, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0],
        "erased box": [62, 7, 66, 217],
        "first noise": [147, 153, 156],
        "kept branches": [0, 1, 0, 1, 0, 0, 0, 0, 0, 0, 0, 1],
        "own label in percent, whole update": [64, 100, 100, 100, 100, 19, 41, 100],
        "mixed box": [0, 119, 172, 105],
    },
}
SPLITS = {
    "ninety percent of 3670": [603, 3417, 2199, 1704, 3404, 999],
    "the rest": [5, 3476, 2316, 3110, 152, 2127],
    "train[:90%]": ["digit 709", "digit 1334", "digit 983", "digit 126"],
    "train[90%:]": ["digit 1048", "digit 135", "digit 1213", "digit 1652"],
    "test": ["digit 275", "digit 59", "digit 256", "digit 323"],
}


def changed(what: str, now) -> str:
    return (
        f"{what}: not as recorded, so runs begun before would go on with other pictures. If that is meant, raise "
        f"deit.data.stream.VERSION and record the numbers in this file anew:\n{pprint.pformat(now, sort_dicts=False)}"
    )


def test_the_numbers_below_were_recorded_for_this_version_of_the_stream():
    assert stream.VERSION == VERSION, "record the numbers in this file anew, and their VERSION"


@pytest.mark.parametrize("position", DRAWN)
def test_what_is_drawn_at_a_position_is_what_was_recorded(position):
    """Recorded values, unlike everywhere else: they guard that a begun run continues, not that a draw is right."""
    drawn = drawn_at(position)
    assert drawn == DRAWN[position], changed(f"draws at position {position}", drawn)


def test_splits_are_those_that_were_recorded():
    """Recorded values, too: another order of a split is another training set for a run that continues."""
    found = split_of()
    assert found == SPLITS, changed("splits", found)
