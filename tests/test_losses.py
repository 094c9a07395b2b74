"""Losses against formulas written in NumPy, and against numbers worked out by hand."""

import math

import numpy as np
import pytest
import tensorflow as tf
from ml_collections import ConfigDict

from deit import losses
from deit.losses import base, hard, soft

LOGITS = np.random.default_rng(0).normal(0, 2, (4, 5)).astype(np.float32)
OTHERS = np.random.default_rng(1).normal(0, 2, (4, 5)).astype(np.float32)
LABELS = np.array([0, 4, 2, 2], np.int32)


def log_softmax(x):
    x = np.asarray(x, np.float64)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def cross_entropy(logits, targets):
    return -(targets * log_softmax(logits)).sum(-1)


def settings(**changes):
    loss = ConfigDict({"kind": "ce", "smoothing": 0.1})
    distill = ConfigDict(
        {
            "kind": "none",
            "alpha": 0.3,
            "tau": 3.0,
            "form": "kl",
            "reduction": "batch",
            "weighting": "convex",
        }
    )
    distill.update(changes)
    return {"loss_config": loss, "distill_config": distill}


def test_cross_entropy_of_equal_logits_is_log_of_the_number_of_classes():
    found = base.classification(tf.zeros([2, 5]), tf.constant([1, 3]), kind="ce", smoothing=0.1)
    np.testing.assert_allclose(found, [math.log(5)] * 2, rtol=1e-6)


def test_smoothing_spreads_its_share_over_all_classes_including_the_true_one():
    targets = np.full((4, 5), 0.1 / 5)
    targets[np.arange(4), LABELS] += 0.9
    found = base.classification(tf.constant(LOGITS), tf.constant(LABELS), kind="ce", smoothing=0.1)
    assert found.dtype == tf.float32 and found.shape == [4]
    np.testing.assert_allclose(found, cross_entropy(LOGITS, targets), rtol=1e-5)


def test_soft_targets_are_smoothed_like_labels():
    mixed = np.array([[0.3, 0.7, 0, 0, 0]] * 4)
    found = base.classification(tf.constant(LOGITS), tf.constant(mixed, tf.float32), kind="ce", smoothing=0.2)
    np.testing.assert_allclose(found, cross_entropy(LOGITS, mixed * 0.8 + 0.04), rtol=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_bce_counts_every_class_of_a_mixture_fully_and_no_other_whatever_the_smoothing(smoothing):
    mixed = np.array([[0.01, 0.99, 0, 0, 0], [0, 0, 1, 0, 0], [0.5, 0, 0, 0, 0.5], [0, 0, 0, 1, 0]])
    probability = 1 / (1 + np.exp(-LOGITS.astype(np.float64)))
    expected = -np.where(mixed > 0, np.log(probability), np.log(1 - probability)).mean(-1)
    found = base.classification(tf.constant(LOGITS), tf.constant(mixed, tf.float32), kind="bce", smoothing=smoothing)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_bce_of_zero_logits_is_log_two_because_it_is_a_mean_over_classes():
    found = base.classification(tf.zeros([1, 1000]), tf.constant([7]), kind="bce", smoothing=0.0)
    np.testing.assert_allclose(found, [math.log(2)], rtol=1e-5)


def test_low_precision_logits_give_a_float32_loss():
    found = base.classification(tf.cast(LOGITS, tf.bfloat16), tf.constant(LABELS), kind="ce", smoothing=0.0)
    rounded = tf.cast(tf.cast(LOGITS, tf.bfloat16), tf.float64).numpy()
    np.testing.assert_allclose(found, cross_entropy(rounded, np.eye(5)[LABELS]), rtol=1e-5)


def test_hard_distillation_is_cross_entropy_with_the_teachers_class_unsmoothed():
    found = hard.distillation(tf.constant(LOGITS), tf.constant(LABELS))
    np.testing.assert_allclose(found, cross_entropy(LOGITS, np.eye(5)[LABELS]), rtol=1e-5)


def kl(tau):
    teacher, student = log_softmax(OTHERS / tau), log_softmax(LOGITS / tau)
    return tau**2 * (np.exp(teacher) * (teacher - student)).sum(-1)


def soft_loss(**changes):
    arguments = {"tau": 3.0, "form": "kl", "reduction": "batch", **changes}
    return soft.distillation(tf.constant(LOGITS), tf.constant(OTHERS), **arguments)


@pytest.mark.parametrize("tau", [1.0, 3.0])
def test_soft_distillation_is_tau_squared_times_kl(tau):
    np.testing.assert_allclose(soft_loss(tau=tau), kl(tau), rtol=1e-4)


def test_soft_distillation_from_itself_is_zero():
    same = tf.constant(LOGITS)
    found = soft.distillation(same, same, tau=3.0, form="kl", reduction="batch")
    np.testing.assert_allclose(found, np.zeros(4), atol=1e-6)


def test_batch_classes_divides_by_the_number_of_classes():
    np.testing.assert_allclose(soft_loss(reduction="batch_classes"), kl(3.0) / 5, rtol=1e-4)


def test_ce_form_softens_the_teacher_only_and_has_no_tau_squared():
    expected = cross_entropy(LOGITS, np.exp(log_softmax(OTHERS / 3)))
    np.testing.assert_allclose(soft_loss(form="ce"), expected, rtol=1e-5)


def test_no_gradient_reaches_the_teacher():
    student, teacher = tf.constant(LOGITS), tf.constant(OTHERS)
    with tf.GradientTape() as tape:
        tape.watch([student, teacher])
        loss = soft.distillation(student, teacher, tau=2.0, form="kl", reduction="batch")
    to_student, to_teacher = tape.gradient(loss, [student, teacher])
    expected = 2 * (np.exp(log_softmax(LOGITS / 2)) - np.exp(log_softmax(OTHERS / 2)))
    np.testing.assert_allclose(to_student, expected, atol=1e-5)
    assert to_teacher is None


TWO_HEADS = {"cls": tf.constant(LOGITS), "dist": tf.constant(OTHERS)}
ONE_HEAD = {"cls": tf.constant(LOGITS)}
SMOOTHED = np.eye(5)[LABELS] * 0.9 + 0.02


def test_hard_objective_is_equation_3_with_each_term_on_its_own_head():
    teacher = np.array([1, 1, 0, 3], np.int32)
    total, cls, distill = losses.objective(
        TWO_HEADS, tf.constant(LABELS), tf.constant(teacher), **settings(kind="hard", alpha=0.5)
    )
    expected_cls = cross_entropy(LOGITS, SMOOTHED)
    expected_distill = cross_entropy(OTHERS, np.eye(5)[teacher])
    np.testing.assert_allclose(cls, expected_cls, rtol=1e-5)
    np.testing.assert_allclose(distill, expected_distill, rtol=1e-5)
    np.testing.assert_allclose(total, (expected_cls + expected_distill) / 2, rtol=1e-5)


def test_soft_objective_with_one_head_is_equation_2_on_that_head():
    total, _, _ = losses.objective(
        ONE_HEAD, tf.constant(LABELS), tf.constant(OTHERS), **settings(kind="soft", alpha=0.1)
    )
    expected = 0.9 * cross_entropy(LOGITS, SMOOTHED) + 0.1 * kl(3.0)
    np.testing.assert_allclose(total, expected, rtol=1e-4)


def test_sum_weighting_keeps_the_whole_classification_term():
    total, _, _ = losses.objective(
        TWO_HEADS,
        tf.constant(LABELS),
        tf.constant(LABELS),
        **settings(kind="hard", weighting="sum", alpha=0.3),
    )
    expected = cross_entropy(LOGITS, SMOOTHED) + 0.3 * cross_entropy(OTHERS, np.eye(5)[LABELS])
    np.testing.assert_allclose(total, expected, rtol=1e-5)


def test_without_a_teacher_two_heads_are_trained_through_their_average():
    total, cls, distill = losses.objective(TWO_HEADS, tf.constant(LABELS), None, **settings())
    np.testing.assert_allclose(total, cross_entropy((LOGITS + OTHERS) / 2, SMOOTHED), rtol=1e-5)
    np.testing.assert_array_equal(total, cls)
    np.testing.assert_array_equal(distill, np.zeros(4))


def test_without_a_teacher_alpha_does_not_weaken_the_only_term():
    total, _, _ = losses.objective(ONE_HEAD, tf.constant(LABELS), None, **settings(alpha=0.9))
    np.testing.assert_allclose(total, cross_entropy(LOGITS, SMOOTHED), rtol=1e-5)
