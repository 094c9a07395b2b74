"""RandAugment (Cubuk et al., arXiv:1909.13719) as DeiT uses it: timm's "increasing" operations and magnitudes.

Promises: an operation that is not applied is not computed (a function that is not called); what is drawn
is a function of the seed alone, so `describe` says what `apply` did. Geometric operations are bilinear (timm under
DeiT: bicubic, which TensorFlow has no fast form of) and fill with the student's mean colour.
"""

from collections.abc import Callable, Sequence

import numpy as np
import tensorflow as tf

from deit import rules
from deit.data import augment, ops

PROBABILITY = 0.5  # of each drawn operation being applied

_ROTATE = 30.0  # degrees at level 10, and so on
_SHEAR = 0.3
_TRANSLATE = 0.45  # of the side
_ENHANCE = 0.9
_LEAST_FACTOR = 0.1
_SOLARIZE_ADD, _MOST_ADDED = 110.0, 128.0


def draw(seed: tf.Tensor, policy: rules.Policy) -> dict[str, tf.Tensor]:
    """Draw with replacement: op int32, applied bool, level float32 (0 to 10), sign +-1, [num_ops] each."""
    count = policy.num_ops
    drawn = tf.random.stateless_uniform([4, count], augment.draw_seed(seed, augment.RANDAUGMENT))
    # The normal variate by its inverse distribution function, which saves a second draw; -inf is level 0.
    levels = (
        policy.magnitude + policy.std * tf.math.ndtri(drawn[3]) if policy.std else tf.fill([count], policy.magnitude)
    )
    return {
        "op": tf.cast(drawn[0] * len(OPS), tf.int32),
        "applied": drawn[1] < PROBABILITY,
        "sign": tf.where(drawn[2] < 0.5, -1.0, 1.0),
        "level": tf.clip_by_value(levels, 0.0, rules.MAX_LEVEL),
    }


def apply(image: tf.Tensor, drawn: dict[str, tf.Tensor], fill: Sequence[int]) -> tf.Tensor:
    """Apply what `draw` drew to uint8 [H, W, 3], in order; `fill`: [3], what geometric operations show outside."""
    image = tf.convert_to_tensor(image)
    branches = _branches(image.shape, fill)
    for i in range(drawn["op"].shape[0]):
        # Not tf.switch_case: that is lowered to a graph of all branches, through which the fourteen that do not run are
        # passed on node by node. This op calls a function.
        (image,) = tf.raw_ops.StatelessCase(
            branch_index=tf.where(drawn["applied"][i], tf.cast(drawn["op"][i], tf.int32) + 1, 0),
            input=[
                image,
                tf.cast(drawn["level"][i], tf.float32) / rules.MAX_LEVEL,
                tf.cast(drawn["sign"][i], tf.float32),
            ],
            Tout=[image.dtype],
            branches=branches,
            output_shapes=[image.shape],
        )
    return image


def _branches(shape: tf.TensorShape, fill: Sequence[int]) -> list:
    """Return functions (image, level / 10, sign) -> image: nothing at all, then the operations in order."""
    specs = (tf.TensorSpec(shape, tf.uint8), tf.TensorSpec([], tf.float32), tf.TensorSpec([], tf.float32))

    def of(operation):
        def branch(image, share, sign):
            value = operation.argument(share, sign) if operation.argument else None
            return tf.ensure_shape(operation.function(image, value, tf.constant(fill, tf.uint8)), shape)

        return tf.function(branch, autograph=False).get_concrete_function(*specs)

    nothing = tf.function(lambda image, share, sign: tf.identity(image), autograph=False)
    return [nothing.get_concrete_function(*specs), *map(of, _OPERATIONS.values())]


def describe(drawn: dict[str, np.ndarray]) -> list[str]:
    """Return what was applied as words, such as `Rotate -27`. Errors: none; `drawn` as NumPy arrays."""
    words = []
    for op, applied, level, sign in zip(*(np.asarray(drawn[name]) for name in ("op", "applied", "level", "sign"))):
        if applied:
            value = argument(OPS[op], float(level), float(sign))
            words.append(OPS[op] if value is None else f"{OPS[op]} {float(value):.3g}")
    return words


def argument(name: str, level: tf.Tensor | float, sign: tf.Tensor | float) -> tf.Tensor | None:
    """Return an operation's parameter at `level` (0 to 10): degrees, bits, a factor, a share of a side; or None."""
    made = _OPERATIONS[name].argument
    return made(level / rules.MAX_LEVEL, sign) if made else None


def _whole(value: tf.Tensor | float) -> tf.Tensor:
    return tf.cast(value, tf.int32)  # towards zero, as Python's int()


class _Operation:
    """`argument(level / 10, sign)` and `function(image, argument, fill)`."""

    def __init__(self, function: Callable, argument: Callable | None = None):
        self.function, self.argument = function, argument


def _plain(function: Callable) -> Callable:
    return lambda image, value, fill: function(image) if value is None else function(image, value)


def _factor(share, sign):
    return tf.maximum(_LEAST_FACTOR, 1.0 + sign * share * _ENHANCE)


def _along(function: Callable, axis: int) -> Callable:
    return lambda image, value, fill: function(image, value * tf.cast(tf.shape(image)[axis], tf.float32), fill)


_OPERATIONS = {
    "AutoContrast": _Operation(_plain(ops.autocontrast)),
    "Equalize": _Operation(_plain(ops.equalize)),
    "Invert": _Operation(_plain(ops.invert)),
    "Rotate": _Operation(ops.rotate, lambda share, sign: sign * share * _ROTATE),
    "Posterize": _Operation(_plain(ops.posterize), lambda share, sign: 4 - _whole(share * 4.0)),
    "Solarize": _Operation(_plain(ops.solarize), lambda share, sign: 256 - tf.minimum(256, _whole(share * 256.0))),
    "SolarizeAdd": _Operation(
        _plain(ops.solarize_add), lambda share, sign: _whole(tf.minimum(_MOST_ADDED, share * _SOLARIZE_ADD))
    ),
    "Color": _Operation(_plain(ops.color), _factor),
    "Contrast": _Operation(_plain(ops.contrast), _factor),
    "Brightness": _Operation(_plain(ops.brightness), _factor),
    "Sharpness": _Operation(_plain(ops.sharpness), _factor),
    "ShearX": _Operation(ops.shear_x, lambda share, sign: sign * share * _SHEAR),
    "ShearY": _Operation(ops.shear_y, lambda share, sign: sign * share * _SHEAR),
    "TranslateX": _Operation(_along(ops.translate_x, 1), lambda share, sign: sign * share * _TRANSLATE),
    "TranslateY": _Operation(_along(ops.translate_y, 0), lambda share, sign: sign * share * _TRANSLATE),
}
OPS = tuple(_OPERATIONS)  # timm's order
