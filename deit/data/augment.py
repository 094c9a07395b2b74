"""Decode and augment one image: stateless functions of (image, seed), run inside tf.data graphs.

Promises: pixels are uint8 RGB from end to end; every resize is antialiased (Pillow's behaviour) and rounded;
a draw depends on `seed` and on its own constant below, never on which other draws were made before it.
"""

from collections.abc import Sequence

import tensorflow as tf

# One constant a draw, for `draw_seed`. Never renumber: a continued run would see other pictures.
_CROP_OFFSET = 1
_CROP_AREA = 2
_CROP_RATIO = 3
_FLIP = 4

_TRIES = 10  # windows that random_resized_crop draws before it takes the central one (torchvision's number)


def draw_seed(seed: tf.Tensor, purpose: int | tf.Tensor) -> tf.Tensor:
    """Return the seed [2] int64 of one draw: `purpose` (a constant or a position) folded into `seed` [2]."""
    # In int32 a fold keeps 32 bits: positions beyond 2^31 would wrap, and 100,000 of them would collide.
    return tf.random.experimental.stateless_fold_in(tf.cast(seed, tf.int64), tf.cast(purpose, tf.int64))


def decode(encoded: tf.Tensor) -> tf.Tensor:
    """Decode JPEG, PNG, BMP or the first frame of a GIF into uint8 [H, W, 3].

    Grey becomes three equal channels, alpha is dropped. Errors: InvalidArgumentError while the graph runs.
    """
    return tf.cond(
        tf.io.is_jpeg(encoded),
        lambda: tf.io.decode_jpeg(encoded, channels=3, dct_method="INTEGER_ACCURATE"),
        lambda: tf.cond(
            tf.strings.substr(encoded, 0, 2) == b"BM",
            lambda: _decode_bmp(encoded),
            lambda: tf.ensure_shape(tf.io.decode_image(encoded, channels=3, expand_animations=False), [None, None, 3]),
        ),
    )


def _decode_bmp(encoded: tf.Tensor) -> tf.Tensor:
    image = tf.io.decode_bmp(encoded, channels=0)  # unlike the other decoders it cannot convert to three channels
    grey = tf.equal(tf.shape(image)[-1], 1)
    return tf.ensure_shape(tf.cond(grey, lambda: tf.repeat(image, 3, axis=-1), lambda: image[..., :3]), [None, None, 3])


def resize_crop(image: tf.Tensor, seed: tf.Tensor, *, size: int, margin: int) -> tf.Tensor:
    """Resize uint8 [H, W, 3] to a square of size + margin px (aspect lost), crop size px at a random place.

    The Keras example's augmentation (bilinear). Returns uint8 [size, size, 3].
    """
    image = _resize(image, size + margin, size + margin, method="bilinear")
    offset = tf.random.stateless_uniform(
        [2], draw_seed(seed, _CROP_OFFSET), minval=0, maxval=margin + 1, dtype=tf.int32
    )
    return tf.ensure_shape(image[offset[0] : offset[0] + size, offset[1] : offset[1] + size], [size, size, 3])


def random_resized_crop(
    encoded: tf.Tensor, seed: tf.Tensor, *, size: int, scale: Sequence[float], ratio: Sequence[float]
) -> tf.Tensor:
    """Decode a random window of an encoded image and resize it (bicubic) to uint8 [size, size, 3].

    `scale`: the window's share of the area, low and high; `ratio`: its width / height, log-uniform.
    A JPEG is decoded only where the window is, so a truncated one fails only where rows are missing.
    """

    def jpeg():
        shape = tf.io.extract_jpeg_shape(encoded)
        window = crop_window(shape[0], shape[1], seed, scale=scale, ratio=ratio)
        return tf.io.decode_and_crop_jpeg(encoded, window, channels=3, dct_method="INTEGER_ACCURATE")

    def other():
        image = decode(encoded)
        shape = tf.shape(image)
        top, left, height, width = tf.unstack(crop_window(shape[0], shape[1], seed, scale=scale, ratio=ratio))
        return image[top : top + height, left : left + width]

    return _resize(tf.cond(tf.io.is_jpeg(encoded), jpeg, other), size, size, method="bicubic")


def crop_window(
    height: tf.Tensor, width: tf.Tensor, seed: tf.Tensor, *, scale: Sequence[float], ratio: Sequence[float]
) -> tf.Tensor:
    """Draw the window of a random-resized crop: int32 [4], top, left, height, width.

    Law (Szegedy et al., arXiv:1409.4842, as in torchvision): the first of 10 draws of area and ratio that
    fits the image; where none fits, the largest central window with the nearest legal ratio.
    """
    rows, columns = tf.cast(height, tf.float32), tf.cast(width, tf.float32)
    share = tf.random.stateless_uniform([_TRIES], draw_seed(seed, _CROP_AREA), minval=scale[0], maxval=scale[1])
    low, high = tf.math.log(float(ratio[0])), tf.math.log(float(ratio[1]))
    aspect = tf.exp(tf.random.stateless_uniform([_TRIES], draw_seed(seed, _CROP_RATIO)) * (high - low) + low)
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
    drawn = tf.random.stateless_uniform([2], draw_seed(seed, _CROP_OFFSET)) * tf.cast(free + 1, tf.float32)
    drawn = tf.cast(tf.floor(drawn), tf.int32)
    return tf.concat([tf.where(found, drawn, free // 2), extent], 0)


def flip(image: tf.Tensor, seed: tf.Tensor, *, probability: float) -> tf.Tensor:
    """Mirror [H, W, 3] left to right with `probability`, 0 to 1."""
    drawn = tf.random.stateless_uniform([], draw_seed(seed, _FLIP))
    return tf.cond(drawn < probability, lambda: tf.reverse(image, [1]), lambda: image)


def evaluation(image: tf.Tensor, *, size: int, crop_ratio: float) -> tf.Tensor:
    """Prepare uint8 [H, W, 3] for evaluation: uint8 [size, size, 3], nothing drawn.

    `crop_ratio` 0: the whole image, bilinear, aspect lost (Keras example). Otherwise the short side becomes
    round(size / crop_ratio) px (bicubic) and the centre is cropped (DeiT: 0.875).
    """
    if crop_ratio == 0:
        return _resize(image, size, size, method="bilinear")
    short = round(size / crop_ratio)
    shape = tf.shape(image)
    least = tf.minimum(shape[0], shape[1])
    height, width = tf.unstack(short * shape[:2] // least)  # the long side is cut off, not rounded (torchvision)
    image = _resize(image, height, width, method="bicubic")
    top, left = (height - size) // 2, (width - size) // 2
    return tf.ensure_shape(image[top : top + size, left : left + size], [size, size, 3])


def _resize(image: tf.Tensor, height, width, *, method: str) -> tf.Tensor:
    resized = tf.image.resize(image, [height, width], method=method, antialias=True)
    return tf.saturate_cast(tf.round(resized), tf.uint8)  # bicubic overshoots: clip
