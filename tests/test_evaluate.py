"""Counting: padding and bad images, four ways to answer, the confusion's orientation, the swap of the averages."""

import numpy as np
import pytest
import tensorflow as tf

from deit import errors, evaluate
from tests import family

CLASSES = ("cat", "dog", "owl")
LABELS = [[0, 1, 2, 2], [1, 1, 0, 0]]
WEIGHTS = [[1, 1, 0, 1], [1, 1, 0, 0]]  # image 2 is unreadable, the last two rows are padding
COUNTED = [0, 1, 3, 4, 5]


def hand_made_batches():
    """Return batches whose pictures hold nothing but their row number."""
    return [
        {
            "image": tf.constant(np.arange(4 * k, 4 * k + 4), tf.uint8)[:, None, None, None],
            "label": tf.constant(labels, tf.int32),
            "weight": tf.constant(weights, tf.float32),
        }
        for k, (labels, weights) in enumerate(zip(LABELS, WEIGHTS))
    ]


def answering(**answers):
    """Return a `predict` that looks its answers up by row number."""

    def predict(images):
        rows = images[:, 0, 0, 0].numpy()
        return {way: tf.constant(np.array(given)[rows], tf.int32) for way, given in answers.items()}

    return predict


class Heads:
    """A network whose logits are a table, by the row number that a picture holds."""

    def __init__(self, **tables):
        self.tables = {head: tf.constant(table, tf.float32) for head, table in tables.items()}

    def logits(self, images, drop=None):
        rows = tf.cast(images[:, 0, 0, 0], tf.int32)
        return {head: tf.gather(table, rows) for head, table in self.tables.items()}


def test_only_readable_unpadded_images_count_in_every_number():
    #               row:  0  1  2* 3  4  5  6* 7*   (*: weight 0, and all three would be right)
    given = dict(top1=[0, 2, 2, 2, 0, 0, 0, 0], top1_cls=[0, 1, 2, 2, 1, 0, 0, 0], top1_dist=[1, 0, 2, 0, 1, 2, 0, 0])
    metrics = evaluate.measure(answering(**given), hand_made_batches(), CLASSES).metrics
    truth = np.array(LABELS).ravel()[COUNTED]
    assert truth.tolist() == [0, 1, 2, 1, 1]
    for way, answers in given.items():
        assert metrics[f"eval/{way}"] == np.mean(np.array(answers)[COUNTED] == truth), way
    assert (metrics["eval/top1"], metrics["eval/top1_cls"], metrics["eval/top1_dist"]) == (2 / 5, 4 / 5, 1 / 5)
    assert metrics["eval/images"] == 5.0
    assert metrics["eval/images_per_sec"] > 0


def test_the_calibration_error_is_of_the_fused_answer_and_of_what_counts():
    logits = np.zeros([8, 3], np.float32)
    logits[:, 0] = np.log(8.0)  # always the first class, with probability 8 / 10
    report = evaluate.measure(evaluate.predictor(Heads(cls=logits)), hand_made_batches(), CLASSES)
    assert report.metrics["eval/top1"] == 1 / 5  # one cat among five
    assert report.metrics["eval/ece"] == pytest.approx(8 / 10 - 1 / 5, abs=1e-6)


def test_rows_of_the_confusion_are_the_truth_and_recall_is_their_diagonal():
    report = evaluate.measure(answering(top1=[0, 2, 2, 2, 0, 0, 0, 0]), hand_made_batches(), CLASSES)
    # One cat called cat; three dogs called owl, cat, cat; one owl called owl.
    assert report.confusion.tolist() == [[1, 0, 0], [2, 0, 1], [0, 0, 1]]
    recall = {name: value for name, value in report.metrics.items() if "/recall/" in name}
    assert recall == {"eval/recall/cat": 1.0, "eval/recall/dog": 0.0, "eval/recall/owl": 1.0}


def test_a_class_without_a_counted_image_has_no_recall():
    batches = hand_made_batches()
    for batch in batches:
        batch["weight"] *= tf.cast(batch["label"] != 2, tf.float32)
    metrics = evaluate.measure(answering(top1=[0, 1, 2, 2, 1, 0, 0, 0]), batches, CLASSES).metrics
    assert {name for name in metrics if "/recall/" in name} == {"eval/recall/cat", "eval/recall/dog"}
    assert metrics["eval/recall/dog"] == 2 / 3
    assert metrics["eval/images"] == 4.0


def test_agreement_with_the_teacher_counts_the_same_rows_and_ignores_the_truth():
    given = [0, 2, 2, 2, 0, 0, 0, 0]
    teacher = np.array([0, 2, 1, 1, 0, 1, 1, 1], np.int32)  # agrees on rows 0, 1 and 4 of the five that count
    predict = answering(top1=given)
    metrics = evaluate.measure(predict, hand_made_batches(), CLASSES, teacher_labels=teacher).metrics
    assert metrics["eval/teacher_agreement"] == 3 / 5
    without = evaluate.measure(predict, hand_made_batches(), CLASSES).metrics
    assert "eval/teacher_agreement" not in without


def test_the_two_averages_of_two_heads_are_told_apart():
    # Picture 0: one head is sure of class 0, the other wavers loudly between 1 and 2: logits add up to (4, 90, 89.9),
    # softmaxes to (0.96, 0.54, 0.49). Picture 1: both heads say 1.
    cls = np.array([[4.0, 0.0, 0.0], [0.0, 3.0, 0.0]])
    dist = np.array([[0.0, 90.0, 89.9], [0.0, 1.0, 0.0]])

    def softmax(z):
        exponentials = np.exp(z - z.max(-1, keepdims=True))
        return exponentials / exponentials.sum(-1, keepdims=True)

    by_logits = (cls + dist).argmax(-1)
    by_softmax = (softmax(cls) + softmax(dist)).argmax(-1)
    assert by_logits.tolist() == [1, 1] and by_softmax.tolist() == [0, 1]

    images = tf.constant([0, 1], tf.uint8)[:, None, None, None]
    found = evaluate.predictor(Heads(cls=cls, dist=dist))(images)
    confidence = found.pop("confidence").numpy()
    np.testing.assert_allclose(confidence, softmax((cls + dist) / 2).max(-1), rtol=1e-6)
    expected = {"top1": by_logits, "top1_softmax": by_softmax, "top1_cls": cls.argmax(-1), "top1_dist": dist.argmax(-1)}
    assert {way: answers.numpy().tolist() for way, answers in found.items()} == {
        way: answers.tolist() for way, answers in expected.items()
    }
    batch = {"image": images, "label": tf.constant(by_softmax, tf.int32), "weight": tf.ones([2])}
    metrics = evaluate.measure(evaluate.predictor(Heads(cls=cls, dist=dist)), [batch], CLASSES).metrics
    assert metrics["eval/top1_softmax"] == 1.0
    assert metrics["eval/top1"] == 0.5


def test_one_head_answers_in_one_way():
    images = tf.constant([0, 1], tf.uint8)[:, None, None, None]
    found = evaluate.predictor(Heads(cls=[[0.0, 3.0, 1.0], [2.0, 0.0, 1.0]]))(images)
    assert list(found) == ["top1", "confidence"] and found["top1"].numpy().tolist() == [1, 0]


AWKWARD = np.array([0.1, -0.0, 1e-42, np.inf, np.nan, -3.4e38], np.float32)  # what arithmetic would not give back


@pytest.mark.parametrize("raises", [False, True])
def test_the_averages_are_in_for_the_block_and_the_weights_are_back_bit_for_bit(raises):
    raw, other = tf.Variable(AWKWARD), tf.Variable([7.0])
    averages = {"a/kernel": np.arange(6, dtype=np.float32), "stranger": np.zeros(1, np.float32)}
    inside = []
    try:
        with evaluate.averaged([("a/kernel", raw), ("a/frozen", other)], averages):
            inside += [raw.numpy().tolist(), other.numpy().tolist()]
            if raises:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        assert raises
    assert inside == [[0.0, 1.0, 2.0, 3.0, 4.0, 5.0], [7.0]]
    assert raw.numpy().tobytes() == AWKWARD.tobytes()


def test_an_average_that_does_not_fit_leaves_no_weight_swapped():
    first, second = tf.Variable([1.0, 2.0]), tf.Variable([3.0])
    averages = {"first": np.zeros(2, np.float32), "second": np.zeros(5, np.float32)}
    with pytest.raises(ValueError), evaluate.averaged([("first", first), ("second", second)], averages):
        pass
    assert first.numpy().tolist() == [1.0, 2.0] and second.numpy().tolist() == [3.0]


def test_a_split_without_a_readable_image_is_an_error_and_no_accuracy_of_zero():
    batches = hand_made_batches()
    for batch in batches:
        batch["weight"] *= 0.0
    with pytest.raises(errors.UserError, match="no image of the evaluation split"):
        evaluate.measure(answering(top1=[0] * 8), batches, CLASSES)


def test_data_of_other_classes_is_refused_with_a_few_names_of_both(tmp_path):
    ckpt = family.checkpoint(tmp_path / "ckpt", classes=tuple(f"class {i}" for i in range(1000)))
    with pytest.raises(errors.UserError) as caught:
        evaluate.checkpointed(ckpt, data_name="digits", split="test")
    assert str(caught.value) == (
        "data.name (digits) must have the classes of the checkpoint: it has 10 (0, 1, 2, 3, 4 and 5 more), the "
        "checkpoint 1000 (class 0, class 1, class 2, class 3, class 4 and 995 more)"
    )


def test_the_weights_that_are_asked_for_are_measured(tmp_path):
    ckpt = family.checkpoint(tmp_path / "ckpt", classes=tuple("01234"), ema=True)
    data = {"data_name": "digits:01234", "split": "test[:20%]"}
    both, raw, ema = (evaluate.checkpointed(ckpt, weights=w, **data)[1].metrics for w in ("both", "raw", "ema"))
    assert (raw["eval/top1"], ema["eval/top1"]) == (both["eval/top1"], both["eval/top1_ema"])
    assert raw["eval/top1"] != ema["eval/top1"] and not {"eval/top1_ema"} & {*raw, *ema}
    with pytest.raises(errors.UserError, match=r"has no averages \(EMA\)"):
        evaluate.checkpointed(family.checkpoint(tmp_path / "plain"), weights="ema", **data)
