"""Ten thousand draws at once, and how a test decides whether they obey a law."""

from collections.abc import Callable, Sequence

import numpy as np
import tensorflow as tf
from scipy import stats

COUNT = 10_000
# With fixed seeds a test is passed for ever or never; a right law fails with this probability when a seed changes.
LEAST_P = 1e-4


def seeds(count: int = COUNT) -> tf.Tensor:
    """Return seeds [count, 2] int64."""
    return tf.stack([tf.fill([count], tf.constant(7, tf.int64)), tf.range(count, dtype=tf.int64)], 1)


def sample(draw: Callable, count: int = COUNT):
    """Return `draw(seed)`, a tensor or a structure of them, for `count` seeds in one graph: NumPy, [count, ...]."""
    wanted = seeds(count)
    specs = tf.nest.map_structure(lambda t: tf.TensorSpec(t.shape, t.dtype), draw(wanted[0]))
    run = tf.function(lambda many: tf.map_fn(draw, many, fn_output_signature=specs, parallel_iterations=64))
    return tf.nest.map_structure(lambda t: t.numpy(), run(wanted))


def assert_uniform_choice(drawn: np.ndarray, choices: int) -> None:
    """Chi-square: integers 0..choices-1, equally often."""
    drawn = np.asarray(drawn).ravel()
    assert drawn.min() >= 0 and drawn.max() < choices
    p = stats.chisquare(np.bincount(drawn, minlength=choices)).pvalue
    assert p > LEAST_P, (p, np.bincount(drawn, minlength=choices))


def assert_probability(happened: np.ndarray, probability: float) -> None:
    """Binomial: a thing happens with `probability`."""
    happened = np.asarray(happened).ravel()
    p = stats.binomtest(int(happened.sum()), happened.size, probability).pvalue
    assert p > LEAST_P, (p, happened.mean(), probability)


def assert_law(drawn: np.ndarray, distribution) -> None:
    """Kolmogorov-Smirnov: values of a continuous law (a frozen scipy.stats distribution)."""
    result = stats.kstest(np.asarray(drawn, np.float64).ravel(), distribution.cdf)
    assert result.pvalue > LEAST_P, result


def assert_same_law(drawn: np.ndarray, twin: np.ndarray) -> None:
    """Two-sample Kolmogorov-Smirnov."""
    result = stats.ks_2samp(np.asarray(drawn, np.float64).ravel(), np.asarray(twin, np.float64).ravel())
    assert result.pvalue > LEAST_P, result


def assert_same_share(happened: np.ndarray, twin: np.ndarray) -> None:
    """Chi-square of two samples of yes and no."""
    table = [[np.sum(a), np.size(a) - np.sum(a)] for a in (happened, twin)]
    if np.sum(table, 0).min() == 0:
        return  # never, or always, in both
    p = stats.chi2_contingency(table).pvalue
    assert p > LEAST_P, (p, table)


def assert_unrelated(columns: Sequence[np.ndarray], names: Sequence[str]) -> None:
    """No two columns [n] are correlated: all |r| below 5 standard errors."""
    count = len(columns[0])
    found = np.corrcoef(np.stack([np.asarray(column, np.float64) for column in columns]))
    np.fill_diagonal(found, 0)
    a, b = np.unravel_index(np.argmax(np.abs(found)), found.shape)
    assert np.abs(found).max() < 5 / count**0.5, (names[a], names[b], found[a, b])
