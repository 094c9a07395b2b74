"""What the student is told: classes, logits, or the largest logits with the rest spread evenly."""

import types

import numpy as np
import pytest
import tensorflow as tf

from configs import base
from deit import config as configuration
from deit.teachers import labels

LOGITS = np.random.default_rng(3).normal(0, 3, [4, 7]).astype(np.float32)


def resolved(classes=7, **changes):
    c = base.get_config()
    c.data.image_size, c.global_batch, c.micro_batch, c.teacher.kind = 8, 10, 5, "run"
    c.update_from_flattened_dict(changes)
    names = [str(i) for i in range(classes)]
    return configuration.resolve(c, train_size=20, eval_size=2, classes=names, replicas=1)


def layout(classes=7, **changes):
    return labels.layout(resolved(classes, **changes))


def softmax(z):
    e = np.exp(z.astype("f8") - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def test_a_hard_answer_is_the_class_of_the_largest_logit_and_the_lower_one_of_equals():
    form = layout(**{"distill.kind": "hard"})
    logits = LOGITS.copy()
    logits[0, [2, 5]] = 9.0
    np.testing.assert_array_equal(form.targets(form.encode(tf.constant(logits))), [2, *LOGITS[1:].argmax(-1)])


def test_all_logits_are_told_as_they_are_in_float32_and_rounded_in_float16():
    for dtype in ("float32", "float16"):
        form = layout(**{"distill.kind": "soft", "teacher.logits_dtype": dtype})
        told = form.targets(form.encode(tf.constant(LOGITS))).numpy()
        assert told.dtype == np.float32
        np.testing.assert_array_equal(told, LOGITS.astype(dtype).astype("f4"))


@pytest.mark.parametrize("top_k", [7, 8, 0])
def test_as_many_logits_as_classes_are_all_logits(top_k):
    assert layout(**{"distill.kind": "soft", "teacher.top_k": top_k}).kept == 7


# A logarithm l has a relative error of at most 2^-11 in float16: its probability one of 2^-11 |l|.
@pytest.mark.parametrize("dtype, error", [("float32", 1e-6), ("float16", 2**-11)])
def test_of_the_largest_logits_the_probabilities_are_kept_and_the_rest_is_spread_evenly(dtype, error):
    form = layout(**{"distill.kind": "soft", "teacher.top_k": 3, "teacher.logits_dtype": dtype})
    told = softmax(form.targets(form.encode(tf.constant(LOGITS))).numpy())
    expected = softmax(LOGITS)
    for row in expected:
        small = np.sort(row)[:-3].sum() / 4
        row[np.argsort(row)[:-3]] = small
    np.testing.assert_allclose(told, expected, rtol=error * (1 - np.log(expected).min()), atol=0)


def test_a_sure_teacher_s_remaining_probability_is_neither_lost_nor_negative():
    form = layout(**{"distill.kind": "soft", "teacher.top_k": 2, "teacher.logits_dtype": "float16"})
    logits = np.array([[40.0, 1.0, 0.5, 0.0, 0.0, 0.0, 0.0]], np.float32)  # the last five: e^-38 in all
    told = form.targets(form.encode(tf.constant(logits))).numpy()[0].astype("f8")
    expected = np.log(np.exp([0.5, 0, 0, 0, 0]).sum() / 5) - 40
    np.testing.assert_allclose(told[2:] - told[0], expected, rtol=2e-3)


def test_logits_that_are_not_finite_are_no_class_and_no_finite_logits():
    logits = LOGITS.copy()
    logits[1, 3], logits[2, 0] = np.nan, np.inf
    hard = layout(**{"distill.kind": "hard"})
    np.testing.assert_array_equal(hard.encode(tf.constant(logits))["class"].numpy() < 0, [False, True, True, False])
    for top_k in (0, 2):
        soft = layout(**{"distill.kind": "soft", "teacher.top_k": top_k})
        finite = np.isfinite(soft.targets(soft.encode(tf.constant(logits))).numpy()).all(-1)
        np.testing.assert_array_equal(finite, [True, False, False, True])


@pytest.mark.parametrize(
    "classes, changes, size",
    [
        (5, {"distill.kind": "hard"}, 1),
        (256, {"distill.kind": "hard"}, 1),
        (1000, {"distill.kind": "hard"}, 2),
        (21841, {"distill.kind": "hard"}, 2),
        (70000, {"distill.kind": "hard"}, 4),
        (5, {"distill.kind": "soft"}, 4 * 5),
        (5, {"distill.kind": "soft", "teacher.logits_dtype": "float16"}, 2 * 5),
        (1000, {"distill.kind": "soft", "teacher.top_k": 10, "teacher.logits_dtype": "float16"}, 10 * (2 + 2) + 2),
        (1000, {"distill.kind": "soft", "teacher.top_k": 10}, 10 * (2 + 4) + 4),
    ],
)
def test_an_answer_takes_the_bytes_of_its_classes_and_logits(classes, changes, size):
    assert layout(classes, **changes).bytes_per_position() == size


def test_the_specs_are_those_of_the_answers():
    for changes in ({"distill.kind": "hard"}, {"distill.kind": "soft"}, {"distill.kind": "soft", "teacher.top_k": 2}):
        form = layout(**changes)
        told = form.encode(tf.constant(LOGITS))
        assert {name: (value.shape, value.dtype) for name, value in told.items()} == {
            name: (spec.shape, spec.dtype) for name, spec in form.specs(4).items()
        }


class Rows:
    """A teacher whose logits name the picture, and that records how many pictures it is shown at once."""

    num_classes = 7

    def __init__(self):
        self.shown = []

    def logits(self, images):
        self.shown.append(int(images.shape[0]))
        return tf.one_hot(tf.cast(images[:, 0, 0, 0], tf.int32) % 7, 7)


@pytest.mark.parametrize("batch, shown", [(64, [10]), (10, [10]), (5, [5]), (4, [4, 2])])
def test_the_teacher_s_batch_is_its_own_and_the_order_stays(batch, shown):
    config, teacher = resolved(**{"distill.kind": "hard", "teacher.batch": batch}), Rows()
    images = np.zeros([10, 8, 8, 3], np.uint8)
    images[:, 0, 0, 0] = np.arange(10)
    answers = tf.function(labels.function(config, teacher))({"image": tf.constant(images)})
    np.testing.assert_array_equal(answers["class"], np.arange(10) % 7)
    assert teacher.shown == shown
    assert labels.rows_a_pass(config) == min(batch, 10)


def test_rows_a_pass_are_at_most_a_replica_s_share():
    c = types.SimpleNamespace(
        teacher=types.SimpleNamespace(batch=64), global_batch=64, resolved=types.SimpleNamespace(replicas=4)
    )
    assert labels.rows_a_pass(c) == 16
