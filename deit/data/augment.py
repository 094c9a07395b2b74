"""Augment one image: stateless functions of (image, seed), run inside tf.data graphs.

Promises: pixels are uint8 RGB from end to end; every resize is antialiased (Pillow's behaviour) and rounded;
a draw depends on `seed` and on its own constant below, never on which other draws were made before it. What is
drawn and what is done with it are separate functions, so that a picture can say what was done to it.
"""

import math
from collections.abc import Sequence

import tensorflow as tf

from deit.data import decode, ops

# One constant a draw, for `draw_seed`. Never renumber: a continued run would see other pictures.
CROP = 1
FLIP = 2
RANDAUGMENT = 3
THREE_AUGMENT = 4
JITTER = 5
ERASE = 6
ERASE_BOX = 7
ERASE_NOISE = 8

_TRIES = 10  # windows that random_resized_crop draws before it takes the central one (torchvision's number)
_BORDER = 4  # px of reflection around a simple crop (DeiT-III)
_BLUR_RADIUS = (0.1, 2.0)  # px, three_augment (DeiT-III)
SOLARIZE = 128  # threshold, three_augment
_ERASE_AREA = (0.02, 1 / 3)  # fraction of the picture (timm)
_ERASE_RATIO = (0.3, 1 / 0.3)  # height / width
_ORDERS = ((0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0))


def seed_of(seed: int, purpose: int, position: tf.Tensor) -> tf.Tensor:
    """Return the seed, int64 [2], of everything drawn for one purpose at one position of the stream.

    `seed`: the run's, below 2^31; `purpose`: below 256; `position`: int64. Different arguments, different seeds.
    """
    return tf.stack([tf.constant(seed * 256 + purpose, tf.int64), tf.cast(position, tf.int64)])


def draw_seed(seed: tf.Tensor, draw: int) -> tf.Tensor:
    """Return the seed [2] int64 of one draw: its constant in bits of `seed` [2] that `seed_of` leaves free.

    TensorFlow hashes a seed before it uses it, so neighbouring seeds are as independent as distant ones; to fold
    the constant in by another hash (stateless_fold_in) would cost as much as the draw itself.
    """
    return seed + tf.constant([draw << 40, 0], tf.int64)


def _uniform(seed: tf.Tensor, draw: int, count: int) -> tf.Tensor:
    return tf.random.stateless_uniform([count], draw_seed(seed, draw))  # in [0, 1 - 2^-23]


def resize_crop(image: tf.Tensor, seed: tf.Tensor, *, size: int, margin: int) -> tf.Tensor:
    """Resize uint8 [H, W, 3] to a square of size + margin px (aspect lost), crop size px at a random place.

    The Keras example's augmentation (bilinear). Returns uint8 [size, size, 3].
    """
    image = resize(image, size + margin, size + margin, method="bilinear")
    return _cropped(image, tf.cast(_uniform(seed, CROP, 2) * (margin + 1), tf.int32), size)


def simple_crop(image: tf.Tensor, seed: tf.Tensor, *, size: int) -> tf.Tensor:
    """Resize the short side of uint8 [H, W, 3] to size px (bicubic), reflect 4 px around it, crop size px anywhere.

    DeiT-III's simple random crop (Touvron et al., arXiv:2204.07118, section 3). Returns uint8 [size, size, 3].
    """
    image = tf.pad(_short_side(image, size), [[_BORDER, _BORDER], [_BORDER, _BORDER], [0, 0]], "REFLECT")
    free = tf.shape(image)[:2] - size
    return _cropped(image, tf.cast(_uniform(seed, CROP, 2) * tf.cast(free + 1, tf.float32), tf.int32), size)


def random_resized_crop(
    encoded: tf.Tensor,
    seed: tf.Tensor,
    *,
    size: int,
    scale: Sequence[float],
    ratio: Sequence[float],
    max_pixels: int = 0,
) -> tf.Tensor:
    """Decode a random window of an encoded image and resize it (bicubic) to uint8 [size, size, 3].

    `scale`: the window's share of the area, low and high; `ratio`: its width / height, log-uniform.
    """

    def choose(height, width):
        return crop_window(height, width, seed, scale=scale, ratio=ratio)

    return resize(decode.window(encoded, choose, max_pixels=max_pixels), size, size, method="bicubic")


def crop_window(
    height: tf.Tensor, width: tf.Tensor, seed: tf.Tensor, *, scale: Sequence[float], ratio: Sequence[float]
) -> tf.Tensor:
    """Draw the window of a random-resized crop: int32 [4], top, left, height, width.

    Law (Szegedy et al., arXiv:1409.4842, as in torchvision): the first of 10 draws of area and ratio that
    fits the image; where none fits, the largest central window with the nearest legal ratio.
    """
    rows, columns = tf.cast(height, tf.float32), tf.cast(width, tf.float32)
    drawn = _uniform(seed, CROP, 2 * _TRIES + 2)
    share = scale[0] + drawn[:_TRIES] * (scale[1] - scale[0])
    low, high = math.log(ratio[0]), math.log(ratio[1])
    aspect = tf.exp(low + drawn[_TRIES : 2 * _TRIES] * (high - low))
    area = share * rows * columns
    tall, wide = tf.round(tf.sqrt(area / aspect)), tf.round(tf.sqrt(area * aspect))
    fits = (tall >= 1) & (tall <= rows) & (wide >= 1) & (wide <= columns)
    first = tf.argmax(fits)  # of equal values the first

    # Where no draw fits: as much of the image as a legal ratio allows.
    nearest = tf.clip_by_value(columns / rows, ratio[0], ratio[1])
    whole = tf.stack(
        [
            tf.clip_by_value(tf.round(columns / nearest), 1, rows),
            tf.clip_by_value(tf.round(rows * nearest), 1, columns),
        ]
    )
    found = tf.reduce_any(fits)
    extent = tf.cast(tf.where(found, tf.stack([tall[first], wide[first]]), whole), tf.int32)
    free = tf.stack([height, width]) - extent
    # A float32 draw is at most 1 - 2^-23, so its product with free + 1 stays below free + 1.
    offset = tf.cast(drawn[2 * _TRIES :] * tf.cast(free + 1, tf.float32), tf.int32)
    return tf.concat([tf.where(found, offset, free // 2), extent], 0)


def flipped(seed: tf.Tensor, *, probability: float) -> tf.Tensor:
    """Return whether `flip` mirrors, bool scalar."""
    return _uniform(seed, FLIP, 1)[0] < probability


def flip(image: tf.Tensor, seed: tf.Tensor, *, probability: float) -> tf.Tensor:
    """Mirror [H, W, 3] left to right with `probability`, 0 to 1."""
    return tf.cond(flipped(seed, probability=probability), lambda: tf.reverse(image, [1]), lambda: image)


def three_augment_choice(seed: tf.Tensor) -> tf.Tensor:
    """Return what `three_augment` does, int32: 0 grey, 1 solarize, 2 Gaussian blur."""
    return tf.cast(_uniform(seed, THREE_AUGMENT, 2)[0] * 3.0, tf.int32)


def blur_radius(seed: tf.Tensor) -> tf.Tensor:
    """Return the standard deviation of `three_augment`'s blur in px, uniform."""
    low, high = _BLUR_RADIUS
    return low + _uniform(seed, THREE_AUGMENT, 2)[1] * (high - low)


def three_augment(image: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    """Turn uint8 [H, W, 3] grey, solarize or blur it, one of the three with equal probability (arXiv:2204.07118)."""
    branches = [
        lambda: ops.grayscale(image),
        lambda: ops.solarize(image, SOLARIZE),
        lambda: ops.gaussian_blur(image, blur_radius(seed)),
    ]
    return tf.ensure_shape(tf.switch_case(three_augment_choice(seed), branches), image.shape)


def jitter_factors(seed: tf.Tensor, *, strength: float) -> tf.Tensor:
    """Return the factors of brightness, contrast and saturation, float32 [3], uniform in 1 +- strength."""
    return 1.0 + (2.0 * _uniform(seed, JITTER, 4)[:3] - 1.0) * strength


def jitter_order(seed: tf.Tensor) -> tf.Tensor:
    """Return in which order `jitter` applies them, int32 [3], a permutation; each is as likely."""
    return tf.constant(_ORDERS)[tf.cast(_uniform(seed, JITTER, 4)[3] * len(_ORDERS), tf.int32)]


def jitter(image: tf.Tensor, seed: tf.Tensor, *, strength: float) -> tf.Tensor:
    """Change brightness, contrast and saturation of uint8 [H, W, 3] in a random order (torchvision's ColorJitter)."""
    factors, order = jitter_factors(seed, strength=strength), jitter_order(seed)
    for i in range(3):
        image = _one_of((ops.brightness, ops.contrast, ops.color), order[i], image, factors)
    return image


def _one_of(functions: Sequence, index: tf.Tensor, image: tf.Tensor, factors: tf.Tensor) -> tf.Tensor:
    branches = [lambda k=k, f=f: f(image, factors[k]) for k, f in enumerate(functions)]
    return tf.ensure_shape(tf.switch_case(index, branches), image.shape)


def erase_box(height: int, width: int, seed: tf.Tensor, *, probability: float) -> tf.Tensor:
    """Draw the box of random erasing: int32 [4], top, left, height, width; height 0: nothing is erased.

    Law (Zhong et al., arXiv:1708.04896, as in timm): with `probability` the first of 10 draws of area (0.02 to 1/3 of
    the picture) and ratio (log-uniform, 0.3 to 1/0.3) that is smaller than the picture; none, where none is.
    """
    wanted = _uniform(seed, ERASE, 1)[0] < probability
    return tf.cond(wanted, lambda: _erase_box(height, width, seed), lambda: tf.zeros([4], tf.int32))


def _erase_box(height: int, width: int, seed: tf.Tensor) -> tf.Tensor:
    drawn = _uniform(seed, ERASE_BOX, 2 * _TRIES + 2)
    (least, most), (low, high) = _ERASE_AREA, (math.log(bound) for bound in _ERASE_RATIO)
    area = (least + drawn[:_TRIES] * (most - least)) * float(height * width)
    aspect = tf.exp(low + drawn[_TRIES : 2 * _TRIES] * (high - low))
    tall, wide = tf.round(tf.sqrt(area * aspect)), tf.round(tf.sqrt(area / aspect))
    fits = (tall < height) & (wide < width)
    first = tf.argmax(fits)
    extent = tf.cast(tf.stack([tall[first], wide[first]]), tf.int32)
    free = tf.cast(tf.stack([height, width]) - extent + 1, tf.float32)
    offset = tf.cast(drawn[2 * _TRIES :] * free, tf.int32)
    return tf.where(tf.reduce_any(fits), tf.concat([offset, extent], 0), 0)


def erase(
    image: tf.Tensor, seed: tf.Tensor, *, probability: float, mean: Sequence[float], std: Sequence[float]
) -> tf.Tensor:
    """Fill a box of uint8 [H, W, 3] with noise of its own for every pixel and channel, with `probability`.

    The noise is N(0, 1) in the student's scale, 255 (mean + std N(0, 1)) rounded and clipped here, so that student
    and teacher see the same picture; the reference draws it after normalisation, unclipped.
    """
    height, width, _ = image.shape
    box = erase_box(height, width, seed, probability=probability)

    def filled():
        top, left, tall, wide = tf.unstack(box)
        noise = tf.random.stateless_normal([tall, wide * 3], draw_seed(seed, ERASE_NOISE))
        noise = noise * tf.tile(tf.constant(std) * 255.0, [wide]) + tf.tile(tf.constant(mean) * 255.0, [wide])
        noise = tf.reshape(_rounded(noise), [tall, wide, 3])
        rows = image[top : top + tall]
        middle = tf.concat([rows[:, :left], noise, rows[:, left + wide :]], 1)
        return tf.ensure_shape(tf.concat([image[:top], middle, image[top + tall :]], 0), image.shape)

    return tf.cond(box[2] > 0, filled, lambda: image)


def evaluation(image: tf.Tensor, *, size: int, crop_ratio: float) -> tf.Tensor:
    """Prepare uint8 [H, W, 3] for evaluation: uint8 [size, size, 3], nothing drawn.

    `crop_ratio` 0: the whole image, bilinear, aspect lost (Keras example). Otherwise the short side becomes
    size / crop_ratio px, cut off (bicubic), and the centre is cropped (DeiT: 0.875).
    """
    if crop_ratio == 0:
        return resize(image, size, size, method="bilinear")
    short = int(size / crop_ratio)
    image = _short_side(image, short)
    free = tf.cast(tf.shape(image)[:2] - size, tf.float32)
    return _cropped(image, tf.cast(tf.round(free / 2.0), tf.int32), size)  # half to even, as torchvision rounds


def resize(image: tf.Tensor, height: tf.Tensor | int, width: tf.Tensor | int, *, method: str) -> tf.Tensor:
    """Resize uint8 [H, W, 3] (`bicubic`, `bilinear`), antialiased, rounded: tf.image.resize, several times as fast."""
    pixels = tf.cast(image, tf.float32)  # before anything else: TensorFlow moves single bytes slowly
    if method == "bicubic":
        # Enlarged along both axes there is nothing to antialias, and TensorFlow's plain bicubic kernel is the fastest.
        shape = tf.shape(image)
        resized = tf.cond(
            (shape[0] <= height) & (shape[1] <= width),
            lambda: tf.raw_ops.ResizeBicubic(images=pixels[None], size=[height, width], half_pixel_centers=True)[0],
            lambda: _antialiased(pixels, height, width, method),
        )
    else:
        resized = _antialiased(pixels, height, width, method)
    return _rounded(tf.reshape(resized, [height, width, 3]))  # bicubic overshoots: clipped


def _antialiased(pixels: tf.Tensor, height: tf.Tensor | int, width: tf.Tensor | int, method: str) -> tf.Tensor:
    """Resize float32 [H, W, 3] to [height, width, 3].

    TensorFlow's antialiasing kernel is vectorised over what lies below the axis it resizes, and for the second axis
    that is the three channels. So rows and columns take turns as the first axis, and all the rest is `channels`.
    """
    shape = tf.shape(pixels)
    rows = _resize_rows(tf.reshape(pixels, [shape[0], shape[1] * 3]), height, method)
    columns = tf.reshape(tf.transpose(rows), [shape[1], height * 3])  # [W, 3 height], channel by channel
    columns = tf.reshape(_resize_rows(columns, width, method), [width * 3, height])
    return tf.reshape(tf.transpose(columns), [height, width, 3])


_KERNELS = {"bicubic": "keyscubic", "bilinear": "triangle"}


def _resize_rows(rows: tf.Tensor, count: tf.Tensor | int, method: str) -> tf.Tensor:
    """Resize [N, C] to float32 [count, C]."""
    scale = tf.cast(count, tf.float32) / tf.cast(tf.shape(rows)[0], tf.float32)
    resized = tf.raw_ops.ScaleAndTranslate(
        images=rows[None, :, None, :],
        size=tf.stack([count, 1]),
        scale=tf.stack([scale, 1.0]),
        translation=[0.0, 0.0],
        kernel_type=_KERNELS[method],
        antialias=True,
    )
    return resized[0, :, 0]


def _short_side(image: tf.Tensor, size: int) -> tf.Tensor:
    """Resize (bicubic) so that the short side is `size` px; the long side is cut off, not rounded (torchvision)."""
    shape = tf.shape(image)[:2]
    height, width = tf.unstack(size * shape // tf.reduce_min(shape))
    return resize(image, height, width, method="bicubic")


def _cropped(image: tf.Tensor, offset: tf.Tensor, size: int) -> tf.Tensor:
    return tf.ensure_shape(image[offset[0] : offset[0] + size, offset[1] : offset[1] + size], [size, size, 3])


def _rounded(values: tf.Tensor) -> tf.Tensor:
    """Return float32 values clipped to 0 .. 255 and rounded, halves up (as Pillow's resize): uint8 in one pass."""
    rounded = tf.raw_ops.QuantizeV2(input=values, min_range=0.0, max_range=255.0, T=tf.quint8, mode="MIN_COMBINED")
    return tf.bitcast(rounded.output, tf.uint8)
