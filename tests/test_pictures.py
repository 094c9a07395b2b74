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
