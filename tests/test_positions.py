"""Resized position embeddings against Pillow's bicubic resampling, and what must not change."""

import numpy as np
import pytest
from PIL import Image

from deit import errors
from deit.models import positions

RANDOM = np.random.default_rng(0)


def embedding(side, *, slots=2, channels=3):
    return RANDOM.normal(0, 0.02, [1, slots + side * side, channels]).astype(np.float32)


def by_pillow(grid, side):
    """Resample float32 [H, W] bicubically; Pillow's kernel has a = -0.5 and antialiases."""
    return np.asarray(Image.fromarray(grid).resize((side, side), Image.BICUBIC))


@pytest.mark.parametrize("old, new", [(14, 24), (24, 14), (14, 12), (4, 7)])
@pytest.mark.parametrize("slots", [0, 1, 2])
def test_the_grid_is_pillows_and_the_prefix_is_kept_bit_for_bit(old, new, slots):
    given = embedding(old, slots=slots)
    got = positions.resize(given, slots=slots, count=new * new)
    np.testing.assert_array_equal(got[:, :slots], given[:, :slots])
    for channel in range(3):
        expected = by_pillow(given[0, slots:, channel].reshape(old, old), new)
        np.testing.assert_allclose(got[0, slots:, channel].reshape(new, new), expected, atol=2e-7)


def test_an_equal_grid_is_returned_as_it_is():
    given = embedding(14)
    assert positions.resize(given, slots=2, count=196) is given


def test_there_and_back_keeps_a_smooth_grid():
    """224 -> 384 -> 224 px: 14 x 14 patches, 24 x 24, 14 x 14; inside the border, where the kernel is whole."""
    y, x = np.mgrid[0:14, 0:14] / 14
    smooth = np.stack([np.sin(2 * x) * np.cos(3 * y), x * y, np.full_like(x, 0.7)], -1).astype(np.float32)
    given = np.concatenate([embedding(0, slots=2), smooth.reshape(1, 196, 3)], 1)
    there = positions.resize(given, slots=2, count=576)
    back = positions.resize(there, slots=2, count=196)
    np.testing.assert_array_equal(back[:, :2], given[:, :2])
    inside = (back - given)[0, 2:].reshape(14, 14, 3)
    assert np.abs(inside[2:-2, 2:-2]).max() < 0.01 and np.abs(inside).max() < 0.05
    np.testing.assert_allclose(back[0, 2:, 2], 0.7, rtol=1e-5)  # a constant stays that everywhere


@pytest.mark.parametrize(
    "given, message",
    [
        (np.zeros([1, 2 + 12, 3], np.float32), r"pos_embed has a grid of 12 patches, which is not square"),
        (np.zeros([1, 2, 3], np.float32), r"pos_embed has shape \[1, 2, 3\], not \[1, 2 \+ patches, channels\]"),
        (np.zeros([14, 14, 3], np.float32), r"pos_embed has shape \[14, 14, 3\]"),
    ],
)
def test_what_is_no_square_grid_is_refused_by_name(given, message):
    with pytest.raises(errors.UserError, match=message):
        positions.resize(given, slots=2, count=9)
