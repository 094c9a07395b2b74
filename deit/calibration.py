"""How far a network may be taken at its word: accuracy against confidence (Guo et al., arXiv:1706.04599)."""

import numpy as np

BINS = 15  # of the confidence, as in Guo et al.


def bins(right: np.ndarray, confidences: np.ndarray) -> np.ndarray:
    """Return count, accuracy and mean confidence of each bin of the confidence, float64 [BINS, 3].

    Shapes: right bool [N]; confidences [N], the largest softmax probability. A bin is (m / BINS, (m + 1) / BINS]; an
    empty one has three zeros.
    """
    confidences = confidences.astype(np.float64)
    # The inner borders: what equals one falls below it, and what rounding puts above 1 into the last bin.
    places = np.searchsorted(np.arange(1, BINS) / BINS, confidences, side="left")
    sums = [np.bincount(places, values, BINS) for values in (np.ones(len(places)), right, confidences)]
    count = np.maximum(sums[0], 1)
    return np.stack([sums[0], sums[1] / count, sums[2] / count], axis=-1)


def error(bins: np.ndarray) -> float:
    """Return the expected calibration error (equation 3) of `bins`: |accuracy - confidence|, weighted by count."""
    count, accuracy, confidence = bins.T
    return float((count * np.abs(accuracy - confidence)).sum() / count.sum())
