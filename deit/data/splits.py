"""Split names and slices of data that has none of its own: folders and the digits.

Promises: a slice is cut from one permutation of the split, frozen by `seed`, so [:90%] and [90%:] are disjoint,
complete and the same on every machine.
"""

import re
from collections.abc import Sequence

import numpy as np

from deit import errors


def parse(split: str) -> tuple[str, tuple[float, float] | None]:
    """Return the name and the slice, in percent, of `NAME` or `NAME[a%:b%]`. Errors: UserError."""
    match = re.fullmatch(r"([\w.-]+)(?:\[(?:(\d+(?:\.\d+)?)%)?:(?:(\d+(?:\.\d+)?)%)?\])?", split)
    if not match:
        raise errors.UserError(f"split ({split!r}) must be NAME or NAME[a%:b%]")
    name, low, high = match.groups()
    if "[" not in split:
        return name, None
    bounds = float(low or 0), float(high or 100)
    if not 0 <= bounds[0] < bounds[1] <= 100:
        raise errors.UserError(f"split ({split!r}) must have 0 <= a < b <= 100 in NAME[a%:b%]")
    return name, bounds


def names(split: str) -> list[str]:
    """Return the names in a split, TFDS's sums included: `train[:90%]+test` has train and test."""
    return [part.partition("[")[0].strip() for part in split.split("+")]


def rows(count: int, keep: tuple[float, float] | None, split: str, *, seed: int) -> np.ndarray:
    """Return the rows of a slice, after a fixed permutation: a folder's examples are ordered by class."""
    low, high = (round(percent * count / 100) for percent in keep or (0.0, 100.0))  # TFDS's rule, digit for digit
    kept = permutation(count, seed)[low:high]
    if not len(kept):
        raise errors.UserError(f"split {split} is empty: there are {count} examples")
    return kept


def permutation(count: int, seed: int) -> np.ndarray:
    """Return the order of `count` examples behind every slice."""
    return np.random.RandomState(seed).permutation(count)  # frozen by NumPy's policy, which Generator's is not


def unknown(split: str, known: Sequence[str]) -> errors.UserError:
    """Return the error for a split that does not exist."""
    return errors.UserError(
        f"unknown split {split!r}: there are {', '.join(known)}, and slices such as {known[0]}[:90%]"
    )
