"""The gate and the teacher's report: accuracy, confusion and calibration against values worked out by hand."""

import types

import numpy as np
import pytest
import tensorflow as tf

from deit import errors
from deit.teachers import report

CLASSES = ("a", "b", "c")


def rebuilt(labels, confidences, truths, weights=None, classes=CLASSES):
    weights = np.ones(len(labels)) if weights is None else weights
    return report.rebuild(
        np.array(labels, np.int32),
        np.array(confidences, np.float32),
        np.array(truths, np.int32),
        np.array(weights, np.float32),
        classes,
    )


def teacher(answer):
    """Return a teacher that gives `answer(images)` as its logits."""
    return types.SimpleNamespace(name="stand-in", logits=answer)


def batches(logits, truths, weights, size=2):
    """Return batches whose images are their own logits: float32 [B, C]."""
    fields = {"image": np.float32(logits), "label": np.int32(truths), "weight": np.float32(weights)}
    return [
        {name: tf.constant(value[i : i + size]) for name, value in fields.items()} for i in range(0, len(logits), size)
    ]


# --- calibration --------------------------------------------------------------------------------------


@pytest.mark.parametrize("softmax", [True, False])
def test_a_teacher_that_gives_probabilities_is_warned_of(softmax, caplog):
    logits = np.log(np.random.default_rng(0).dirichlet(np.ones(3), 4)).astype("f4")
    given = np.exp(logits) if softmax else logits
    teacher = types.SimpleNamespace(name="m", logits=lambda images: tf.constant(given))
    batch = {"image": np.zeros([4, 2, 2, 3], np.uint8), "label": np.zeros(4, "i4"), "weight": np.ones(4, "f4")}
    report.measure(teacher, [batch], ("a", "b", "c"))
    assert ("gives probabilities, not logits" in caplog.text) == softmax


def test_the_line_on_a_teacher_has_the_recalls_and_the_lowest_of_many():
    truths = np.arange(30, dtype="i4")
    labels = np.where(truths < 25, truths, 0).astype("i4")
    found = report.rebuild(labels, np.ones(30, "f4"), truths, np.ones(30, "f4"), [f"c{i}" for i in range(30)])
    line = report.describe(found)
    assert line.startswith("top1 0.8333  ece 0.1667  of 30 images; recall, the lowest 20 of 30: c25 0.000, c26 0.000")
    few = report.rebuild(labels[:2], np.ones(2, "f4"), truths[:2], np.ones(2, "f4"), ["a", "b"])
    assert report.describe(few).endswith("of 2 images; recall: a 1.000, b 1.000")


def test_the_calibration_error_of_a_worked_example():
    # (0.8, 0.8667]: 0.82 and 0.86, one right: |1/2 - 0.84| = 0.34, weight 2/4; (0.6, 0.6667]: 0.62 right: 0.38, 1/4;
    # (0.4667, 0.5333]: 0.5 wrong: 0.5, 1/4. Together 0.17 + 0.095 + 0.125 = 0.39.
    found = rebuilt([0, 1, 2, 0], [0.82, 0.86, 0.62, 0.5], [0, 0, 2, 1])
    assert found.metrics["teacher/ece"] == pytest.approx(0.39, abs=1e-7)
    expected = np.zeros([15, 3])
    expected[7], expected[9], expected[12] = (1, 0, 0.5), (1, 1, 0.62), (2, 0.5, 0.84)
    np.testing.assert_allclose(found.calibration, expected, atol=1e-7)


def by_loop(labels, confidences, truths, weights, bins=15):
    """Equation 3 of Guo et al., one bin after the other, in Python's own numbers."""
    total, error = sum(w > 0 for w in weights), 0.0
    for m in range(bins):
        inside = [
            i for i, c in enumerate(confidences) if weights[i] > 0 and m / bins < min(float(c), 1.0) <= (m + 1) / bins
        ]
        if inside:
            accuracy = sum(labels[i] == truths[i] for i in inside) / len(inside)
            confidence = sum(float(confidences[i]) for i in inside) / len(inside)
            error += len(inside) / total * abs(accuracy - confidence)
    return error


@pytest.mark.parametrize("seed", range(5))
def test_the_calibration_error_is_that_of_a_loop_over_the_bins(seed):
    rng = np.random.default_rng(seed)
    confidences = rng.uniform(1 / 3, 1, 400).astype(np.float32)
    labels, truths, weights = rng.integers(0, 3, 400), rng.integers(0, 3, 400), rng.integers(0, 2, 400)
    found = rebuilt(labels, confidences, truths, weights)
    assert found.metrics["teacher/ece"] == pytest.approx(by_loop(labels, confidences, truths, weights), abs=1e-12)
    assert found.calibration[:, 0].sum() == weights.sum()


def test_a_perfectly_calibrated_teacher_has_no_error():
    # Of four answers with confidence 3/4 three are right, of two with 1/2 one is, and what is sure is right.
    found = rebuilt([0] * 8, [0.75] * 4 + [0.5] * 2 + [1.0] * 2, [0, 0, 0, 1, 0, 1, 0, 0])
    assert found.metrics["teacher/ece"] == 0.0


def test_one_that_is_sure_and_wrong_has_an_error_of_one():
    assert rebuilt([0, 1], [1.0, 1.0], [1, 2]).metrics["teacher/ece"] == 1.0


def test_a_bin_holds_its_upper_border_and_not_its_lower_one():
    fifth = np.float32(0.2)  # as a float32 a little above 3/15, so in the fourth bin
    assert float(fifth) > 3 / 15
    half_up = np.nextafter(np.float32(0.6), np.float32(1))  # 0.6 itself is above 9/15 as well
    below = np.nextafter(np.float32(0.2), np.float32(0))
    found = rebuilt([0] * 5, [fifth, below, half_up, 1.0, 1.0 + 1e-6], [0] * 5)  # rounding may exceed 1
    counts = dict(enumerate(found.calibration[:, 0]))
    assert {m: n for m, n in counts.items() if n} == {3: 1, 2: 1, 9: 1, 14: 2}
    # In float64 the borders can be met exactly.
    exact = report.rebuild(np.zeros(15, int), np.arange(1, 16) / 15, np.zeros(15, int), np.ones(15), CLASSES)
    assert exact.calibration[:, 0].tolist() == [1] * 15


# --- accuracy and confusion -----------------------------------------------------------------------------


def test_rows_of_weight_zero_do_not_count_but_keep_their_place():
    found = rebuilt([0, 2, 1, 0], [0.9, 0.8, 0.7, 0.6], [0, 2, 0, 1], weights=[1, 1, 1, 0])
    assert found.metrics == {
        "teacher/top1": pytest.approx(2 / 3),
        "teacher/ece": pytest.approx((0.1 + 0.2 + 0.7) / 3),
        "teacher/recall/a": 0.5,  # rows 0 and 2 are a, row 2 is taken for b
        "teacher/recall/c": 1.0,  # and the only row of b has weight 0
        "teacher/images": 3.0,
    }
    assert found.labels.tolist() == [0, 2, 1, 0] and len(found.confidences) == 4


def test_rows_of_the_confusion_are_true_classes_and_columns_the_teachers():
    found = rebuilt([1, 1, 0, 2, 2, 2], [0.5] * 6, [0, 0, 0, 1, 2, 2], weights=[1, 1, 1, 1, 1, 0])
    assert found.confusion.dtype == np.int64
    assert found.confusion.tolist() == [[1, 2, 0], [0, 0, 1], [0, 0, 1]]


def test_a_weight_is_a_mark_and_not_a_factor():
    one = rebuilt([0, 1], [0.9, 0.4], [0, 0], weights=[1, 1])
    assert rebuilt([0, 1], [0.9, 0.4], [0, 0], weights=[5, 0.1]).metrics == one.metrics


# --- the measurement ------------------------------------------------------------------------------------


def test_what_is_measured_is_what_is_rebuilt_from_its_arrays():
    rng = np.random.default_rng(0)
    logits, truths = rng.normal(0, 2, [11, 3]), rng.integers(0, 3, 11)
    weights = [1] * 9 + [0, 0]
    found = report.measure(teacher(lambda x: x), batches(logits, truths, weights), CLASSES)
    logits = np.float64(np.float32(logits))
    probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    assert found.labels.dtype == np.int32 and found.labels.tolist() == probabilities.argmax(-1).tolist()
    assert found.confidences.dtype == np.float32
    np.testing.assert_allclose(found.confidences, probabilities.max(-1), atol=1e-6)
    assert found.metrics["teacher/images"] == 9
    assert found.metrics["teacher/top1"] == np.mean(found.labels[:9] == truths[:9])

    arrays = found.arrays()
    assert list(arrays) == ["labels", "confidences", "truths", "weights"]
    again = report.rebuild(**arrays, classes=CLASSES)
    assert again.metrics == found.metrics
    for name in ("confusion", "calibration", "labels", "confidences", "truths", "weights"):
        np.testing.assert_array_equal(getattr(again, name), getattr(found, name))


def test_large_logits_are_a_confidence_of_one():
    found = report.measure(teacher(lambda x: 1e30 * x), batches([[0, 1, 0], [2, 0, 0]], [1, 0], [1, 1]), CLASSES)
    assert found.confidences.tolist() == [1, 1] and found.metrics["teacher/ece"] == 0


def test_logits_that_are_not_finite_and_a_split_without_a_readable_image_are_refused():
    given = batches([[0, 1, 0]], [1], [1])
    with pytest.raises(errors.UserError, match=r"stand-in gives logits that are not finite"):
        report.measure(teacher(lambda x: x * float("nan")), given, CLASSES)
    for none in ([], batches([[0, 1, 0]], [1], [0])):
        with pytest.raises(errors.UserError, match=r"data.eval_split must hold a readable image"):
            report.measure(teacher(lambda x: x), none, CLASSES)


def test_the_gate_lets_pass_at_the_bound_and_names_both_numbers_below():
    found = rebuilt([0, 0, 0, 0], [0.9] * 4, [0, 0, 0, 1])
    report.gate(found, 0.75)
    with pytest.raises(errors.UserError, match=r"teacher.min_accuracy \(0.76\).*\(0.7500 of 4 images\)"):
        report.gate(found, 0.76)
