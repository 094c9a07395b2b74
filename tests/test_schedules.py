"""Schedules at updates whose rates are worked out by hand."""

import math

import numpy as np
import pytest
import tensorflow as tf
from ml_collections import ConfigDict

from deit import schedules

COSINE = {"peak": 1.0, "total": 110, "warmup": 10, "start": 0.2, "final": 0.1}


@pytest.mark.parametrize(
    ("update", "expected"),
    [
        (0, 0.2),  # warm-up starts at `start`
        (5, 0.6),  # half way up
        (10, 1.0),  # the peak, at update == warmup
        (60, 0.55),  # half way down: the middle of peak and final
        (35, 0.1 + 0.9 * (1 + math.sqrt(0.5)) / 2),  # a quarter of the cosine
        (110, 0.1),  # final, at update == total
        (500, 0.1),  # and it stays there
    ],
)
def test_warmup_cosine_has_the_rates_worked_out_by_hand(update, expected):
    np.testing.assert_allclose(schedules.warmup_cosine(update, **COSINE), expected, rtol=1e-5)


def test_without_warmup_the_first_update_has_the_peak_rate():
    found = schedules.warmup_cosine(0, peak=0.5, total=3, warmup=0, start=0.0, final=0.0)
    assert float(found) == 0.5
    assert float(schedules.constant(0, peak=0.5, warmup=0, start=0.0)) == 0.5


def test_constant_rises_to_the_peak_and_stays():
    rates = [float(schedules.constant(u, peak=0.8, warmup=4, start=0.4)) for u in (0, 1, 2, 4, 5, 1000)]
    np.testing.assert_allclose(rates, [0.4, 0.5, 0.6, 0.8, 0.8, 0.8], rtol=1e-6)


def test_a_schedule_accepts_the_step_variable_in_a_graph_and_equals_the_eager_rate():
    step = tf.Variable(37, dtype=tf.int64)
    graph = tf.function(lambda: schedules.warmup_cosine(step, **COSINE))
    np.testing.assert_allclose(graph(), schedules.warmup_cosine(37, **COSINE), rtol=1e-6)


def resolved(schedule):
    return ConfigDict(
        {
            "optim": {"schedule": schedule, "warmup_lr": 0.0, "final_lr": 0.01, "peak_lr": 99.0},
            "resolved": {"total_updates": 20, "warmup_updates": 4, "peak_lr": 2.0},
        }
    )


def test_build_takes_the_resolved_peak_and_durations_not_the_raw_ones():
    cosine = schedules.build(resolved("cosine"))
    constant = schedules.build(resolved("constant"))
    np.testing.assert_allclose([float(cosine(u)) for u in (1, 4, 12, 20)], [0.5, 2.0, 1.005, 0.01], rtol=1e-5)
    np.testing.assert_allclose([float(constant(u)) for u in (1, 4, 20)], [0.5, 2.0, 2.0], rtol=1e-6)
