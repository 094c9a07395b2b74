"""Mixup and cutmix: drawn for a group of positions on the host, applied micro-batch by micro-batch on the device.

Promises: what is drawn is a pure function of (seed, group), so owners of slices agree on it; `images` and `targets`
draw nothing, and only the uint8 batch is resident: a micro-batch reads its rows and their partners and mixes there,
so the size of a micro-batch changes nothing.

Groups are `mix_group` neighbouring positions of the effective batch with one lambda; partners are those at the same
distance from the group's two ends (timm mixes a batch with itself reversed).
"""

import tensorflow as tf

from deit.data import augment

_MIX = 3  # purpose of the draws made from a seed and a group (stream.py has 1 and 2)
# One constant a draw, for `augment.draw_seed`. Never renumber: a continued run would see other mixtures.
_WANTED = 1
_SWITCH = 2
_GAMMA = 3
_POWER = 4
_CENTRE = 5


def partners(positions, group: int):
    """Return with which position each is mixed: its group of `group` positions reversed. A tensor or a NumPy array."""
    return positions // group * group + group - 1 - positions % group


def draw(group: tf.Tensor, *, seed: int, augment_config, size: int) -> tuple[tf.Tensor, tf.Tensor]:
    """Draw how the group of number `group` (int64 scalar) of `size` x `size` px images is mixed.

    Returns lambda, float32: the share of an example's own label; box, int32 [4], top, left, height, width in px:
    where the partner shows. Lambda 1 with a box of zeros: not at all; a box that is the whole image: mixup.

    Law (Zhang et al., arXiv:1710.09412; Yun et al., arXiv:1905.04899; per batch, as in timm): with `mix_prob` the
    group is mixed; where both alphas are positive, by cutmix with `mix_switch`; lambda ~ Beta(alpha, alpha). Of
    cutmix, lambda becomes what the box leaves after it was cut off at the borders.
    """
    c, seeds = augment_config, augment.seed_of(seed, _MIX, group)
    cut = tf.constant(c.cutmix > 0)
    if c.mixup > 0 and c.cutmix > 0:
        cut = _uniform(seeds, _SWITCH) < c.mix_switch
    share = _beta(seeds, tf.where(cut, tf.constant(c.cutmix, tf.float64), c.mixup))
    box = tf.where(cut, _cutmix_box(seeds, share, size), tf.constant([0, 0, size, size]))
    area = tf.cast(box[2] * box[3], tf.float32)
    lambda_ = tf.where(cut, 1.0 - area / float(size * size), tf.cast(share, tf.float32))
    wanted = _uniform(seeds, _WANTED) < c.mix_prob
    return tf.where(wanted, lambda_, 1.0), tf.where(wanted, box, 0)


def fields(positions: tf.Tensor, weights: tf.Tensor, *, seed: int, augment_config, size: int) -> dict[str, tf.Tensor]:
    """Return what a batch needs to be mixed: mix_lambda float32 [B], mix_partner int64 [B], mix_box int32 [B, 4].

    `positions` int64 [B], contiguous, whole groups: mix_group divides B and positions[0]. `mix_partner` is a
    position too, so it does not depend on the slice. An example of weight 0 and its partner stay unmixed.
    """
    count = positions.shape[0]
    grouped = tf.reshape(positions, [-1, augment_config.mix_group])  # [G, mix_group]

    def draw_one(group):
        return draw(group, seed=seed, augment_config=augment_config, size=size)

    specs = (tf.TensorSpec([], tf.float32), tf.TensorSpec([4], tf.int32))
    lambdas, boxes = tf.map_fn(draw_one, grouped[:, 0] // augment_config.mix_group, fn_output_signature=specs)
    readable = tf.reshape(weights, tf.shape(grouped)) > 0
    mixed = readable & tf.reverse(readable, [1])
    return {
        "mix_lambda": tf.reshape(tf.where(mixed, lambdas[:, None], 1.0), [count]),
        "mix_partner": partners(positions, augment_config.mix_group),
        "mix_box": tf.reshape(tf.where(mixed[:, :, None], boxes[:, None], 0), [count, 4]),
    }


def images(batch: dict[str, tf.Tensor], start: tf.Tensor | int, count: int) -> tf.Tensor:
    """Return `count` rows of a resident batch from `start` on as the models see them, float32 [count, S, S, 3].

    Where the batch has `mix_lambda`: lambda of the own image and 1 - lambda of the partner (mixup), or the
    partner's pixels inside the box and the own ones outside, both exactly (cutmix).
    """
    own = tf.cast(_rows(batch["image"], start, count), tf.float32)
    if "mix_lambda" not in batch:
        return own
    partner = tf.cast(_gather(batch["image"], _partner_rows(batch, start, count)), tf.float32)
    # Columns and channels are one axis here: to broadcast over three channels takes twice as long on a CPU.
    size, shape = own.shape[1], own.shape
    own, partner = (tf.reshape(part, [count, size, size * 3]) for part in (own, partner))
    # Boxes are floats, because on a GPU TensorFlow computes with int32 on the host.
    box = tf.cast(_rows(batch["mix_box"], start, count), tf.float32)
    top, left, height, width = tf.unstack(box[:, :, None], axis=1)  # [count, 1] each
    pixels = tf.range(size, dtype=tf.float32)
    whole = (height >= size) & (width >= size)
    foreign = 1.0 - tf.where(whole, _rows(batch["mix_lambda"], start, count)[:, None], 0.0)  # inside the box
    rows = foreign * _within(pixels, top, height)  # [count, S]
    columns = _within(tf.repeat(pixels, 3), left, width)  # [count, S * 3]
    mixed = own + (partner - own) * rows[:, :, None] * columns[:, None, :]  # the mask itself is never made
    return tf.reshape(mixed, shape)


def targets(batch: dict[str, tf.Tensor], start: tf.Tensor | int, count: int, num_classes: int) -> tf.Tensor:
    """Return the labels of `count` rows from `start` on: int32 [count], or where examples are mixed float32 [count, C].

    The latter are lambda of the own class and 1 - lambda of the partner's, not smoothed (losses.base does that).
    """
    own = _rows(batch["label"], start, count)
    if "mix_lambda" not in batch:
        return own
    partner = tf.gather(batch["label"], _partner_rows(batch, start, count))
    share = _rows(batch["mix_lambda"], start, count)[:, None]
    return share * tf.one_hot(own, num_classes) + (1.0 - share) * tf.one_hot(partner, num_classes)


def _uniform(seeds: tf.Tensor, number: int) -> tf.Tensor:
    return tf.random.stateless_uniform([], augment.draw_seed(seeds, number))


def _beta(seeds: tf.Tensor, alpha: tf.Tensor) -> tf.Tensor:
    """Draw from Beta(alpha, alpha), alpha float64: the share of one of two gamma variates in their sum, float64."""
    # As logarithms, because of a small alpha most variates are below every float, and TensorFlow's then equal:
    # Gamma(alpha) is Gamma(alpha + 1) times u^(1 / alpha) (Stuart 1962).
    gamma = tf.random.stateless_gamma([2], augment.draw_seed(seeds, _GAMMA), alpha + 1.0, dtype=tf.float64)
    power = 1.0 - tf.random.stateless_uniform([2], augment.draw_seed(seeds, _POWER), dtype=tf.float64)  # never 0
    logs = tf.math.log(gamma) + tf.math.log(power) / alpha
    return tf.sigmoid(logs[0] - logs[1])


def _cutmix_box(seeds: tf.Tensor, share: tf.Tensor, size: int) -> tf.Tensor:
    """Draw a square of 1 - share of the image around any pixel, int32 [4]; what crosses a border is cut off."""
    side = tf.cast(tf.sqrt(1.0 - share) * size, tf.int32)  # px, cut off; so is its half, as in timm
    centre = tf.random.stateless_uniform([2], augment.draw_seed(seeds, _CENTRE))
    centre = tf.cast(centre * size, tf.int32)  # a draw is at most 1 - 2^-23, so the product stays below size
    low, high = tf.maximum(centre - side // 2, 0), tf.minimum(centre + side // 2, size)
    return tf.concat([low, high - low], 0)


def _rows(tensor: tf.Tensor, start: tf.Tensor | int, count: int) -> tf.Tensor:
    rows = tensor[start : start + count]  # not tf.slice, which no GPU has for uint8
    rows.set_shape([count, *tensor.shape[1:]])
    return rows


def _within(pixels: tf.Tensor, low: tf.Tensor, extent: tf.Tensor) -> tf.Tensor:
    """Return 1.0 where a pixel [N] is in the interval of an example [count, 1], else 0.0: [count, N]."""
    return tf.cast((pixels >= low) & (pixels < low + extent), tf.float32)


def _partner_rows(batch: dict[str, tf.Tensor], start: tf.Tensor | int, count: int) -> tf.Tensor:
    """Return where in the resident batch the partners are, int64 [count]."""
    return _rows(batch["mix_partner"], start, count) - batch["position"][0]


def _gather(pictures: tf.Tensor, rows: tf.Tensor) -> tf.Tensor:
    """Gather rows of uint8 [B, S, S, 3], four bytes as one word where they divide.

    TensorFlow gathers uint8 on the host only: the batch would leave the GPU at every micro-batch.
    """
    count, shape = pictures.shape[0], pictures.shape[1:]
    values = shape.num_elements()
    if values % 4:
        return tf.gather(pictures, rows)
    words = tf.bitcast(tf.reshape(pictures, [count, values // 4, 4]), tf.int32)
    return tf.reshape(tf.bitcast(tf.gather(words, rows), tf.uint8), [rows.shape[0], *shape])
