"""Pillow's image operations as plain TensorFlow: uint8 [H, W, 3] in, uint8 [H, W, 3] out, nothing drawn.

Promises: each does what the Pillow function in its docstring does, rounding and truncation included, on the same
pixels; parameters may be tensors, so one graph serves every strength. Written for one thread at a time: passes over
the picture that TensorFlow vectorises (arithmetic on whole arrays) instead of those that it does not (select and
broadcasts over the channel), which cost up to ten times as much.

tensorflow_addons.image is not used. Measured on photographs against Pillow: its equalize is as exact but slower than
this one, its sharpness is off by up to 2 of 255 and its blur by up to 39, rotate and translate blend the fill into the
border and fill with black only, and shear samples the nearest pixel and cannot be traced for a drawn strength.
"""

import tensorflow as tf

_LUMA = (19595.0, 38470.0, 7471.0)  # ITU-R 601 in 1/65536, the numbers of Pillow's convert("L")
_SHARPEN_CENTRE, _SHARPEN_SUM = 5.0, 13.0  # ImageFilter.SMOOTH: 5 in the middle of eight ones


# --- Points ---------------------------------------------------------------------------------------------------


def invert(image: tf.Tensor) -> tf.Tensor:
    """ImageOps.invert."""
    return tf.constant(255, tf.uint8) - image


def posterize(image: tf.Tensor, bits: tf.Tensor | int) -> tf.Tensor:
    """ImageOps.posterize: keep the highest `bits` (int, 0 to 8) of each channel; 0 is black."""
    low = tf.bitwise.left_shift(tf.constant(1, tf.int32), 8 - tf.cast(bits, tf.int32)) - 1
    return tf.bitwise.bitwise_and(image, tf.cast(255 - low, tf.uint8))


def solarize(image: tf.Tensor, threshold: tf.Tensor | int) -> tf.Tensor:
    """ImageOps.solarize: invert the values from `threshold` (int, 0 to 256) on."""
    inverted = _ones_where(tf.cast(image, tf.int32) >= tf.cast(threshold, tf.int32))
    return tf.bitwise.bitwise_xor(image, inverted * tf.constant(255, tf.uint8))  # 255 - x is x with every bit changed


def solarize_add(image: tf.Tensor, addition: tf.Tensor | int) -> tf.Tensor:
    """Add `addition` (int, 0 to 128) to the values below 128 (timm's SolarizeAdd); the sum is 255 at most."""
    dark = _ones_where(image < tf.constant(128, tf.uint8))
    return image + dark * tf.cast(addition, tf.uint8)


def autocontrast(image: tf.Tensor) -> tf.Tensor:
    """ImageOps.autocontrast: stretch each channel to 0 .. 255; a channel of one value stays."""
    width = tf.shape(image)[1]
    rows = tf.cast(_rows(image), tf.float32)
    low = tf.reduce_min(tf.reshape(tf.reduce_min(rows, 0), [width, 3]), 0)
    high = tf.reduce_max(tf.reshape(tf.reduce_max(rows, 0), [width, 3]), 0)
    flat = high <= low
    scale = tf.where(flat, 1.0, 255.0 / tf.maximum(high - low, 1.0))
    offset = tf.where(flat, 0.0, -low * scale)
    # Pillow truncates x scale - low scale, computed in float64: a product that is whole there may fall short here.
    stretched = rows * tf.tile(scale, [width]) + tf.tile(offset + 1e-3, [width])
    return tf.reshape(_truncated(stretched), tf.shape(image))


def equalize(image: tf.Tensor) -> tf.Tensor:
    """ImageOps.equalize: each channel's histogram as flat as a table over values can make it."""
    channels = tf.tile(tf.constant([0, 256, 512]), [tf.shape(image)[1]])
    shifted = tf.cast(_rows(image), tf.int32) + channels  # one range of 256 values a channel
    counts = tf.reshape(tf.math.bincount(tf.reshape(shifted, [-1]), minlength=768, maxlength=768), [3, 256])
    last = tf.reduce_max(tf.where(counts > 0, tf.range(256), 0), 1)  # the highest value that occurs
    step = (tf.reduce_sum(counts, 1) - tf.gather(counts, last, axis=1, batch_dims=1)) // 255
    table = (step[:, None] // 2 + tf.cumsum(counts, 1, exclusive=True)) // tf.maximum(step, 1)[:, None]
    table = tf.where(
        (step == 0)[:, None], tf.range(256), tf.minimum(table, 255)
    )  # one value, or too few pixels: as it is
    table = tf.cast(tf.reshape(table, [768]), tf.uint8)
    return tf.reshape(tf.gather_nd(table, shifted[..., None]), tf.shape(image))


def brightness(image: tf.Tensor, factor: tf.Tensor | float) -> tf.Tensor:
    """ImageEnhance.Brightness: 0 is black, 1 the picture."""
    return _truncated(tf.cast(image, tf.float32) * factor)


def color(image: tf.Tensor, factor: tf.Tensor | float) -> tf.Tensor:
    """ImageEnhance.Color: 0 is grey, 1 the picture, above 1 more saturated."""
    pixels = tf.cast(_pixels(image), tf.float32)
    return tf.reshape(_blend(_luma(pixels), pixels, factor), tf.shape(image))


def contrast(image: tf.Tensor, factor: tf.Tensor | float) -> tf.Tensor:
    """ImageEnhance.Contrast: 0 is the mean grey, 1 the picture."""
    pixels = tf.cast(_pixels(image), tf.float32)
    luma = tf.reshape(tf.cast(_luma(pixels), tf.int32), [tf.shape(image)[0], -1])
    total = tf.reduce_sum(tf.cast(tf.reduce_sum(luma, 0), tf.float64))  # may exceed float32's whole numbers
    mean = total / tf.cast(tf.size(luma), tf.float64)
    grey = tf.cast(tf.floor(mean + 0.5), tf.float32)
    return _blend(grey, tf.cast(image, tf.float32), factor)


def grayscale(image: tf.Tensor) -> tf.Tensor:
    """Image.convert("L"), as three equal channels."""
    return tf.reshape(tf.cast(_luma(tf.cast(_pixels(image), tf.float32)), tf.uint8), tf.shape(image))


# --- Neighbourhoods -------------------------------------------------------------------------------------------


def sharpness(image: tf.Tensor, factor: tf.Tensor | float) -> tf.Tensor:
    """ImageEnhance.Sharpness: 0 is ImageFilter.SMOOTH (whose border is the picture's), 1 the picture."""
    whole = tf.cast(image, tf.float32)
    rows = whole[:-2] + whole[1:-1] + whole[2:]
    around = rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:]  # [H - 2, W - 2, 3], the sum of nine
    inner = whole[1:-1, 1:-1]
    smooth = tf.floor((around + (_SHARPEN_CENTRE - 1.0) * inner) / _SHARPEN_SUM + 0.5)
    change = tf.pad(smooth - inner, [[1, 1], [1, 1], [0, 0]])
    return _blend(whole + change, whole, factor)


def gaussian_blur(image: tf.Tensor, radius: tf.Tensor | float) -> tf.Tensor:
    """ImageFilter.GaussianBlur, `radius` = the standard deviation in px, above 0; the border is repeated.

    Like Pillow's it is three extended box blurs (Gwosdek et al., 2011), here as one matrix along each axis.
    """
    height, width = tf.shape(image)[0], tf.shape(image)[1]
    columns = tf.cast(tf.transpose(image, [1, 0, 2]), tf.float32)
    blurred = tf.matmul(_blur_matrix(width, radius), tf.reshape(columns, [width, height * 3]))
    rows = tf.reshape(tf.transpose(tf.reshape(blurred, [width, height, 3]), [1, 0, 2]), [height, width * 3])
    blurred = tf.matmul(_blur_matrix(height, radius), rows)
    return tf.reshape(_truncated(blurred + 0.5), tf.shape(image))


def _blur_matrix(count: tf.Tensor, radius: tf.Tensor | float) -> tf.Tensor:
    """Return the matrix [count, count] of the blur along an axis of so many pixels."""
    variance = tf.square(tf.cast(radius, tf.float32)) / 3.0  # of one of the three boxes
    whole = tf.floor((tf.sqrt(12.0 * variance + 1.0) - 1.0) / 2.0)  # pixels at full weight on either side
    part = (2.0 * whole + 1.0) * (whole * (whole + 1.0) - 3.0 * variance) / (6.0 * (variance - tf.square(whole + 1.0)))
    reach = tf.cast(whole, tf.int32) + 1
    around = tf.range(-reach, count + reach)
    distance = tf.abs(around - tf.range(count)[:, None])  # [count, count + 2 reach]
    weights = tf.where(distance < reach, 1.0, tf.where(distance == reach, part, 0.0)) / (2.0 * (whole + part) + 1.0)
    box = tf.matmul(weights, tf.one_hot(tf.clip_by_value(around, 0, count - 1), count))  # beyond the border: its colour
    return tf.matmul(tf.matmul(box, box), box)


# --- Geometry -------------------------------------------------------------------------------------------------


def rotate(image: tf.Tensor, degrees: tf.Tensor | float, fill: tf.Tensor) -> tf.Tensor:
    """Image.rotate(degrees, BILINEAR, fillcolor=fill): counter-clockwise about the centre, same size."""
    height, width = _extent(image)
    angle = tf.cast(degrees, tf.float32) * (3.141592653589793 / 180.0)
    cos, sin = tf.cos(angle), tf.sin(angle)
    x, y = _centres(width) - width / 2.0, (_centres(height) - height / 2.0)[:, None]
    return _sampled(image, cos * x - sin * y + width / 2.0, sin * x + cos * y + height / 2.0, fill)


def shear_x(image: tf.Tensor, factor: tf.Tensor | float, fill: tf.Tensor) -> tf.Tensor:
    """Image.transform(size, AFFINE, (1, factor, 0, 0, 1, 0), BILINEAR, fillcolor=fill)."""
    height, width = _extent(image)
    y = _centres(height)[:, None]
    x = _centres(width) + tf.cast(factor, tf.float32) * y
    return _sampled_along(image, x, tf.range(tf.shape(image)[0])[:, None], fill, axis=1)


def shear_y(image: tf.Tensor, factor: tf.Tensor | float, fill: tf.Tensor) -> tf.Tensor:
    """Image.transform(size, AFFINE, (1, 0, 0, factor, 1, 0), BILINEAR, fillcolor=fill)."""
    height, width = _extent(image)
    y = _centres(height)[:, None] + tf.cast(factor, tf.float32) * _centres(width)
    return _sampled_along(image, y, tf.range(tf.shape(image)[1]), fill, axis=0)


def translate_x(image: tf.Tensor, pixels: tf.Tensor | float, fill: tf.Tensor) -> tf.Tensor:
    """Image.transform(size, AFFINE, (1, 0, pixels, 0, 1, 0), BILINEAR, fillcolor=fill): to the left where positive."""
    return _translated(image, pixels, fill, axis=1)


def translate_y(image: tf.Tensor, pixels: tf.Tensor | float, fill: tf.Tensor) -> tf.Tensor:
    """Image.transform(size, AFFINE, (1, 0, 0, 0, 1, pixels), BILINEAR, fillcolor=fill): upwards where positive."""
    return _translated(image, pixels, fill, axis=0)


def _extent(image: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    shape = tf.cast(tf.shape(image), tf.float32)
    return shape[0], shape[1]


def _centres(count: tf.Tensor) -> tf.Tensor:
    return tf.range(count) + 0.5  # Pillow's coordinates: a pixel's centre lies at a half


def _sampled(image: tf.Tensor, x: tf.Tensor, y: tf.Tensor, fill: tf.Tensor) -> tf.Tensor:
    """Return the bilinear samples at x, y [H, W] (Pillow's coordinates), `fill` where they lie outside."""
    height, width = tf.shape(image)[0], tf.shape(image)[1]
    inside = (x >= 0) & (x < tf.cast(width, tf.float32)) & (y >= 0) & (y < tf.cast(height, tf.float32))
    left, upper = tf.floor(x - 0.5), tf.floor(y - 0.5)
    columns = [tf.clip_by_value(tf.cast(left, tf.int32) + i, 0, width - 1) for i in (0, 1)]
    lines = [tf.clip_by_value(tf.cast(upper, tf.int32) + i, 0, height - 1) * width for i in (0, 1)]
    table = _with_fill(image, fill)
    taps = [_taken(table, tf.where(inside, line + column, width * height)) for line in lines for column in columns]
    a, b, c, d = taps
    across, down = (_three(tf.reshape(part, [-1, 1])) for part in (x - 0.5 - left, y - 0.5 - upper))
    one, other = a + (b - a) * across, c + (d - c) * across
    return tf.reshape(tf.cast(one + (other - one) * down, tf.uint8), tf.shape(image))


def _sampled_along(image: tf.Tensor, place: tf.Tensor, other: tf.Tensor, fill: tf.Tensor, *, axis: int) -> tf.Tensor:
    """Return the linear samples at `place` [H, W] along `axis`; `other` is the whole index along the other axis."""
    height, width = tf.shape(image)[0], tf.shape(image)[1]
    count = (height, width)[axis]
    inside = (place >= 0) & (place < tf.cast(count, tf.float32))
    before = tf.floor(place - 0.5)
    table, taps = _with_fill(image, fill), []
    for i in (0, 1):
        along = tf.clip_by_value(tf.cast(before, tf.int32) + i, 0, count - 1)
        index = other * width + along if axis == 1 else along * width + other
        taps.append(_taken(table, tf.where(inside, index, width * height)))
    share = _three(tf.reshape(place - 0.5 - before, [-1, 1]))
    return tf.reshape(tf.cast(taps[0] + (taps[1] - taps[0]) * share, tf.uint8), tf.shape(image))


def _translated(image: tf.Tensor, pixels: tf.Tensor | float, fill: tf.Tensor, *, axis: int) -> tf.Tensor:
    """Return the picture moved by -pixels along `axis`: slices and one blend, no gather."""
    count = tf.shape(image)[axis]
    pixels = tf.cast(pixels, tf.float32)
    whole = tf.floor(pixels)
    share, whole = pixels - whole, tf.cast(whole, tf.int32)
    # Output i has its sample at i + 0.5 + pixels, which must lie in [0, count).
    first = tf.cast(tf.math.ceil(-0.5 - pixels), tf.int32)
    last = tf.cast(tf.math.ceil(tf.cast(count, tf.float32) - 0.5 - pixels), tf.int32)
    first, last = tf.clip_by_value(first, 0, count), tf.clip_by_value(last, 0, count)
    last = tf.maximum(first, last)
    # The border's own colour half a pixel around, as Pillow has it.
    padded = tf.concat([_slice(image, 0, 1, axis), image, _slice(image, count - 1, 1, axis)], axis)
    start = tf.clip_by_value(first + whole + 1, 0, count + 1)
    taken = _slice(padded, start, last - first + 1, axis)
    one, other = _slice(taken, 0, last - first, axis), _slice(taken, 1, last - first, axis)
    one, other = tf.cast(one, tf.float32), tf.cast(other, tf.float32)
    blended = tf.cast(one + (other - one) * share, tf.uint8)
    return tf.ensure_shape(
        tf.concat([_plain(image, first, fill, axis), blended, _plain(image, count - last, fill, axis)], axis),
        image.shape,
    )


def _slice(image: tf.Tensor, start: tf.Tensor | int, count: tf.Tensor | int, axis: int) -> tf.Tensor:
    start = tf.convert_to_tensor(start)
    return tf.slice(
        image, [start if i == axis else 0 for i in range(3)], [count if i == axis else -1 for i in range(3)]
    )


def _plain(image: tf.Tensor, count: tf.Tensor, fill: tf.Tensor, axis: int) -> tf.Tensor:
    """Return `count` columns (axis 1) or rows (axis 0) of the colour `fill`."""
    rows, columns = (count, tf.shape(image)[1]) if axis == 0 else (tf.shape(image)[0], count)
    row = tf.tile(tf.cast(fill, tf.uint8), [columns])  # a row first, then its copies: tiles of three bytes are slow
    return tf.reshape(tf.tile(row[None], [rows, 1]), [rows, columns, 3])


# --- Passes ---------------------------------------------------------------------------------------------------


def _pixels(image: tf.Tensor) -> tf.Tensor:
    return tf.reshape(image, [-1, 3])  # [H * W, 3]


def _rows(image: tf.Tensor) -> tf.Tensor:
    return tf.reshape(image, [tf.shape(image)[0], tf.shape(image)[1] * 3])


def _with_fill(image: tf.Tensor, fill: tf.Tensor) -> tf.Tensor:
    """Return the pixels [H * W + 1, 3], the last one `fill`."""
    return tf.concat([_pixels(image), tf.reshape(tf.cast(fill, tf.uint8), [1, 3])], 0)


def _taken(table: tf.Tensor, index: tf.Tensor) -> tf.Tensor:
    """Return the rows of `table` that `index` [H, W] names, float32 [N, 3]; tf.gather takes twice as long for them."""
    return tf.cast(_pixels(tf.gather_nd(table, index[..., None])), tf.float32)


def _ones_where(condition: tf.Tensor) -> tf.Tensor:
    return tf.cast(condition, tf.uint8)


def _luma(pixels: tf.Tensor) -> tf.Tensor:
    """Return the grey value of float32 pixels, three times, [N, 3]: whole, exact, as every sum stays below 2^24."""
    weights = tf.tile(tf.constant(_LUMA, shape=[3, 1]), [1, 3])  # three columns are faster than one and a broadcast
    return tf.floor((tf.matmul(pixels, weights) + 32768.0) / 65536.0)


def _three(column: tf.Tensor) -> tf.Tensor:
    return tf.matmul(column, tf.ones([1, 3]))  # [N, 1] -> [N, 3]; a broadcast over the channel is slower


def _blend(degenerate: tf.Tensor, image: tf.Tensor, factor: tf.Tensor | float) -> tf.Tensor:
    """Image.blend of float32 pictures: `degenerate` at 0, `image` at 1, uint8 out."""
    return _truncated(degenerate + (image - degenerate) * factor)


def _truncated(values: tf.Tensor) -> tf.Tensor:
    return tf.cast(tf.clip_by_value(values, 0.0, 255.0), tf.uint8)
