"""The reliability diagram shows what it is given."""

import numpy as np

from deit import pictures


def bins(**filled) -> np.ndarray:
    """Return a calibration [15, 3] from `bN=(count, accuracy, confidence)`."""
    calibration = np.zeros([15, 3])
    for name, row in filled.items():
        calibration[int(name[1:])] = row
    return calibration


def blue(drawn: np.ndarray) -> np.ndarray:
    """Return where the bars of accuracy are: [H, W]."""
    return (drawn == np.array(pictures.BAR)).all(-1)


def test_a_bar_is_as_high_as_its_accuracy():
    heights = [
        blue(pictures.reliability(bins(b12=(40, accuracy, 0.83)), 0.1)).any(axis=1).sum() for accuracy in (0.25, 0.5)
    ]
    assert heights[1] > 50 and abs(heights[1] - 2 * heights[0]) <= 3


def test_bars_stand_at_their_confidence():
    columns = [
        np.flatnonzero(blue(pictures.reliability(bins(**{f"b{m}": (40, 0.5, m / 15 + 0.03)}), 0.1)).any(axis=0)).mean()
        for m in (4, 9, 14)
    ]
    assert columns[0] < columns[1] < columns[2]
    assert abs((columns[2] - columns[1]) - (columns[1] - columns[0])) <= 2


def test_no_images_and_a_single_bin_are_drawn_too():
    empty, one = pictures.reliability(np.zeros([15, 3]), 0.0), pictures.reliability(bins(b14=(7, 1.0, 0.99)), 0.01)
    assert empty.dtype == one.dtype == np.uint8 and empty.shape == one.shape and empty.shape[2] == 3
    assert not blue(empty).any() and blue(one).any()


def test_curves_without_a_step_in_common_names_with_dollars_and_a_single_point_are_drawn():
    one, other = (np.array([1, 3]), np.array([2.0, 1.0])), (np.array([2]), np.array([1.5]))
    drawn = pictures.curves({"runs/a$x_$": one, "_b": other}, "eval/top1$")
    assert drawn.shape == (600, 800, 3)
    shorter = pictures.curves({"runs/a$x_$": one, "": other}, "eval/top1$")
    assert (drawn[:200, 500:] != shorter[:200, 500:]).any()  # the legend has the name that begins with an underscore


def test_the_distance_of_two_curves_is_taken_at_the_steps_that_both_have(monkeypatch):
    labels = []
    monkeypatch.setattr(pictures, "_drawn", lambda figure: labels.extend(
        text.get_text() for axes in figure.axes for text in axes.get_legend().get_texts()
    ))  # fmt: skip
    one, other = (np.array([1, 2, 3]), np.array([5.0, 1.0, 2.0])), (np.array([2, 3, 4]), np.array([4.0, 6.0, 9.0]))
    pictures.curves({"a": one, "b": other}, "train/loss")
    assert [label.strip() for label in labels] == ["a", "b", "b: 3.54 root mean square"]  # of 3 and 4
