"""Moving averages against numbers worked out by hand."""

import numpy as np
import pytest
import tensorflow as tf

from deit import ema


@pytest.mark.parametrize(("update", "expected"), [(0, 0.1), (8, 0.5), (80, 0.9), (8990, 0.999), (10**6, 0.999)])
def test_decay_ramps_up_to_its_maximum(update, expected):
    np.testing.assert_allclose(ema.decay_at(update, 0.999), expected, rtol=1e-6)
    np.testing.assert_allclose(ema.decay_at(tf.Variable(update, dtype=tf.int64), 0.999), expected, rtol=1e-6)


def test_update_moves_the_average_and_not_the_weights():
    weights = [tf.Variable([4.0, 8.0]), tf.Variable([[1.0]])]
    averages = [tf.Variable([0.0, 4.0]), tf.Variable([[2.0]])]
    ema.update(averages, weights, tf.constant(0.75))
    np.testing.assert_allclose(averages[0], [1.0, 5.0])
    np.testing.assert_allclose(averages[1], [[1.75]])
    np.testing.assert_array_equal(weights[0], [4.0, 8.0])


def test_lists_of_different_length_are_refused():
    with pytest.raises(ValueError, match="zip"):
        ema.update([tf.Variable(1.0)], [], tf.constant(0.5))
