"""Encoded bytes to pixels: uint8 RGB, as Pillow decodes them; the size is known before anything is decoded.

Promises: JPEG with the accurate inverse transform, so that a pixel is Pillow's; an image of more than `max_pixels` is
refused on its header alone (a file of 100 kB can ask for gigabytes; a GIF's header can lie, so the sources hand on
none, see transcode.py). Errors come as InvalidArgumentError while the graph runs: the stream turns them into a
placeholder.
"""

from collections.abc import Callable

import tensorflow as tf


def decode(encoded: tf.Tensor, *, max_pixels: int = 0, short_side: int = 0) -> tf.Tensor:
    """Decode JPEG, PNG, BMP or the first frame of a GIF into uint8 [H, W, 3]; `max_pixels` 0: whatever its size.

    Grey becomes three equal channels, alpha is dropped. `short_side`: px that the caller gives the short side; the
    limit then holds for that picture too, which of a 1 x 5000 px file is thousands of times as large.
    """
    if max_pixels:
        shape = tf.cast(size(encoded), tf.int64)
        if short_side:
            least = tf.maximum(tf.reduce_min(shape), 1)
            long_side = tf.reduce_max(shape) * short_side // least
            shape = tf.cond(least < short_side, lambda: tf.stack([short_side, long_side]), lambda: shape)
        encoded = _limited(encoded, shape, max_pixels)
    return tf.cond(
        tf.io.is_jpeg(encoded),
        lambda: tf.io.decode_jpeg(encoded, channels=3, dct_method="INTEGER_ACCURATE"),
        lambda: _decode_other(encoded),
    )


def window(encoded: tf.Tensor, choose: Callable, *, max_pixels: int = 0) -> tf.Tensor:
    """Decode the part of an image that `choose(height, width)` names, int32 [4]: top, left, height, width.

    A JPEG is decoded only where the window is, so a truncated one fails only where rows are missing.
    """

    def jpeg():
        shape = tf.io.extract_jpeg_shape(encoded)
        data = _limited(encoded, shape[:2], max_pixels) if max_pixels else encoded
        chosen = choose(shape[0], shape[1])
        return tf.io.decode_and_crop_jpeg(data, chosen, channels=3, dct_method="INTEGER_ACCURATE")

    def other():
        data = _limited(encoded, size(encoded), max_pixels) if max_pixels else encoded
        image = _decode_other(data)
        shape = tf.shape(image)
        top, left, height, width = tf.unstack(choose(shape[0], shape[1]))
        return image[top : top + height, left : left + width]

    return tf.cond(tf.io.is_jpeg(encoded), jpeg, other)


def size(encoded: tf.Tensor) -> tf.Tensor:
    """Return height and width from the header, int32 [2]; -1, -1 for what is no image that can be decoded."""
    png, gif = tf.strings.substr(encoded, 0, 4) == b"\x89PNG", tf.strings.substr(encoded, 0, 4) == b"GIF8"
    bmp = tf.strings.substr(encoded, 0, 2) == b"BM"
    return tf.case(
        [
            (tf.io.is_jpeg(encoded), lambda: tf.io.extract_jpeg_shape(encoded)[:2]),
            (png, lambda: tf.reverse(_numbers(encoded, 16, tf.int32, little=False), [0])),
            (gif, lambda: tf.cast(tf.reverse(_numbers(encoded, 6, tf.uint16, little=True), [0]), tf.int32)),
            (bmp, lambda: tf.abs(tf.reverse(_numbers(encoded, 18, tf.int32, little=True), [0]))),
        ],
        default=lambda: tf.fill([2], tf.constant(-1)),
    )


def _limited(encoded: tf.Tensor, shape: tf.Tensor, max_pixels: int) -> tf.Tensor:
    """Return the bytes, or none where the image is too large: the decoder then refuses them as it refuses others.

    Not by an assertion: that is a stateful op, and tf.data runs functions that have one slower.
    """
    count = tf.reduce_prod(tf.cast(shape, tf.int64))
    return tf.where(count <= max_pixels, encoded, "")


def _numbers(encoded: tf.Tensor, offset: int, dtype: tf.DType, *, little: bool) -> tf.Tensor:
    """Return the two numbers (width, height) that stand at `offset` of a header."""
    taken = tf.strings.substr(encoded, offset, 2 * dtype.size)
    return tf.reshape(tf.io.decode_raw(taken, dtype, little_endian=little), [2])


def _decode_other(encoded: tf.Tensor) -> tf.Tensor:
    return tf.cond(
        tf.strings.substr(encoded, 0, 2) == b"BM",
        lambda: _decode_bmp(encoded),
        lambda: tf.ensure_shape(tf.io.decode_image(encoded, channels=3, expand_animations=False), [None, None, 3]),
    )


def _decode_bmp(encoded: tf.Tensor) -> tf.Tensor:
    image = tf.io.decode_bmp(encoded, channels=0)  # unlike the other decoders it cannot convert to three channels
    grey = tf.equal(tf.shape(image)[-1], 1)
    return tf.ensure_shape(tf.cond(grey, lambda: tf.repeat(image, 3, axis=-1), lambda: image[..., :3]), [None, None, 3])
