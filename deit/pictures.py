"""Pictures for TensorBoard, uint8 [H, W, 3]: a batch as the student sees it, a confusion matrix.

Figure objects without pyplot: no global state, no display, no picture left open over a long run.
"""

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.backends import backend_agg
from matplotlib.figure import Figure

MAX_IMAGES = 16
MAX_NUMBERS = 20  # classes up to which a cell shows its count
MAX_NAMES = 60  # classes up to which the axes show their names
DPI = 100


def batch(images: np.ndarray, labels: np.ndarray, classes: Sequence[str]) -> np.ndarray:
    """Draw the first 16 of uint8 images [N, S, S, 3] in a grid, each under the name of its class."""
    count = min(len(images), MAX_IMAGES)
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(2.2 * columns, 2.4 * rows), dpi=DPI, layout="constrained")
    for i in range(count):
        axes = figure.add_subplot(rows, columns, i + 1)
        axes.imshow(images[i], interpolation="nearest")
        axes.set_title(_short(classes[int(labels[i])]), fontsize=9)
        axes.set_axis_off()
    return _drawn(figure)


def confusion_matrix(matrix: np.ndarray, classes: Sequence[str]) -> np.ndarray:
    """Draw counts [C, C] (rows: true class, columns: prediction), coloured by the fraction of their row."""
    count = len(classes)
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    side = min(10.0, 3.0 + 0.45 * count)
    figure = Figure(figsize=(side, side), dpi=DPI, layout="constrained")
    axes = figure.add_subplot()
    axes.imshow(shares, cmap="Blues", vmin=0.0, vmax=1.0)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    total = int(matrix.sum())
    axes.set_title(f"{int(np.trace(matrix))} of {total} right" if total else "no images")
    names = [_short(name) for name in classes] if count <= MAX_NAMES else []
    axes.set_xticks(range(len(names)), names, rotation=90, fontsize=8)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    if count <= MAX_NUMBERS:
        for row, column in np.argwhere(matrix > 0):
            colour = "white" if shares[row, column] > 0.5 else "black"
            text = str(int(matrix[row, column]))
            axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=8)
    return _drawn(figure)


def _short(name: str) -> str:
    # A dollar sign would start a formula, and a broken formula is an exception.
    return (name if len(name) <= 20 else name[:19] + "…").replace("$", r"\$")


def _drawn(figure: Figure) -> np.ndarray:
    canvas = backend_agg.FigureCanvasAgg(figure)
    canvas.draw()
    return np.array(canvas.buffer_rgba())[..., :3]
