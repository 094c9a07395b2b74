"""Position embeddings for another resolution.

Promises: entries of prefix tokens are kept bit for bit, a grid of the wanted size is returned as it is; another one is
resampled bicubically, antialiased, as timm does (bilinear would lower the norm of the embeddings, arXiv:2012.12877,
section 5.5). facebookresearch/deit and Hugging Face resample with another cubic (a = -0.75, here -0.5).
"""

import math

import numpy as np
import tensorflow as tf

from deit import errors


def resize(positions: np.ndarray, *, slots: int, count: int, name: str = "pos_embed") -> np.ndarray:
    """Return position embeddings [1, slots + count, D] of a square grid, from [1, slots + n, D]. float32.

    Errors: UserError naming `name` where n or `count` is no square number.
    """
    if positions.ndim != 3 or positions.shape[0] != 1 or positions.shape[1] <= slots:
        raise errors.UserError(f"{name} has shape {list(positions.shape)}, not [1, {slots} + patches, channels]")
    here = positions.shape[1] - slots
    if here == count:
        return positions
    old, new = side(here, name), side(count, name)
    prefix, grid = positions[:, :slots], positions[:, slots:]
    grid = grid.reshape([1, old, old, -1])
    resized = tf.image.resize(grid, [new, new], "bicubic", antialias=True).numpy()
    return np.concatenate([prefix, resized.reshape([1, count, -1])], axis=1)


def side(count: int, name: str) -> int:
    """Return the side of a square grid of `count` patches. Errors: UserError naming `name`."""
    root = math.isqrt(count)
    if root * root != count:
        raise errors.UserError(f"{name} has a grid of {count} patches, which is not square: it can't be resized")
    return root
