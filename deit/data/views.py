"""One training view of one image: the configured crop, flip, colour operations and erasing, in the recipe's order.

Promises: `describe` names what `training` does to the same image under the same seed, because both read the same
draws. Order as in the reference: crop, flip, RandAugment or 3-Augment, jitter, erasing; mixing comes after (mixing.py).
"""

from collections.abc import Callable

import numpy as np
import tensorflow as tf

from deit import rules
from deit.data import augment, decode, randaugment

_THREE = ("grey", f"solarize {augment.SOLARIZE}", "blur")
_JITTER = ("brightness", "contrast", "saturation")


def training(config) -> Callable[[tf.Tensor, tf.Tensor], tf.Tensor]:
    """Return f(encoded, seed [2]) -> uint8 [S, S, 3] for a checked configuration."""
    c = config.augment
    policy = rules.randaugment_policy(c.randaugment) if c.randaugment else None
    fill = fill_colour(config)

    def view(encoded, seed):
        image = crop(encoded, seed, config)
        if c.flip:
            image = augment.flip(image, seed, probability=c.flip)
        if policy:
            image = randaugment.apply(image, randaugment.draw(seed, policy), fill)
        if c.three_augment:
            image = augment.three_augment(image, seed)
        if c.jitter:
            image = augment.jitter(image, seed, strength=c.jitter)
        if c.erasing:
            model = config.model
            image = augment.erase(image, seed, probability=c.erasing, mean=model.mean, std=model.std)
        return image

    return view


def crop(encoded: tf.Tensor, seed: tf.Tensor, config) -> tf.Tensor:
    """Decode and crop as `training` does, uint8 [S, S, 3]: all that a damaged file can make fail."""
    return _CROPS[config.augment.crop](encoded, seed, config)


def describe(config, seed: tf.Tensor) -> list[str]:
    """Return what `training` draws for an image under `seed`, in words and in order; the crop is left out."""
    c, size, words = config.augment, config.data.image_size, []
    if c.flip and augment.flipped(seed, probability=c.flip):
        words.append("flip")
    if c.randaugment:
        drawn = randaugment.draw(seed, rules.randaugment_policy(c.randaugment))
        words += randaugment.describe({name: value.numpy() for name, value in drawn.items()})
    if c.three_augment:
        choice = int(augment.three_augment_choice(seed))
        words.append(_THREE[choice] + (f" {float(augment.blur_radius(seed)):.1f} px" if choice == 2 else ""))
    if c.jitter:
        factors = augment.jitter_factors(seed, strength=c.jitter).numpy()
        words += [f"{_JITTER[i]} {factors[i]:.2f}" for i in augment.jitter_order(seed).numpy()]
    if c.erasing:
        _, _, height, width = augment.erase_box(size, size, seed, probability=c.erasing).numpy()
        words += [f"erase {width}x{height}"] if height else []
    return words


def evaluation(config) -> Callable[[tf.Tensor], tf.Tensor]:
    """Return f(encoded) -> uint8 [S, S, 3], nothing drawn."""
    size, limit, ratio = config.data.image_size, config.data.max_pixels, config.eval.crop_ratio

    def view(encoded):
        image = decode.decode(encoded, max_pixels=limit, short_side=int(size / ratio) if ratio else 0)
        return prepared(config, image)

    return view


def prepared(config, image: tf.Tensor) -> tf.Tensor:
    """Return what evaluation makes of a decoded picture uint8 [H, W, 3]: uint8 [S, S, 3]."""
    return augment.evaluation(image, size=config.data.image_size, crop_ratio=config.eval.crop_ratio)


def fill_colour(config) -> tuple[int, ...]:
    """Return the student's mean colour, 0 to 255: what geometric operations show outside the picture (timm)."""
    return tuple(int(np.clip(round(255 * channel), 0, 255)) for channel in config.model.mean)


def _resize_crop(encoded, seed, config):
    image = decode.decode(encoded, max_pixels=config.data.max_pixels)
    return augment.resize_crop(image, seed, size=config.data.image_size, margin=config.augment.resize_margin)


def _random_resized(encoded, seed, config):
    c = config.augment
    return augment.random_resized_crop(
        encoded, seed, size=config.data.image_size, scale=c.scale, ratio=c.ratio, max_pixels=config.data.max_pixels
    )


def _simple(encoded, seed, config):
    size = config.data.image_size
    image = decode.decode(encoded, max_pixels=config.data.max_pixels, short_side=size)
    return augment.simple_crop(image, seed, size=size)


_CROPS = {"resize_crop": _resize_crop, "random_resized": _random_resized, "simple": _simple}
