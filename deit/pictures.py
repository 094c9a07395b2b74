"""Pictures for TensorBoard and files, uint8 [H, W, 3]: training views, a confusion matrix, a reliability diagram.

Figure objects without pyplot: no global state, no display, no picture left open over a long run.
"""

import textwrap
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.backends import backend_agg
from matplotlib.figure import Figure

WRAP = 34  # characters of a line above a picture
MAX_LINES = 3
MAX_NUMBERS = 20  # classes up to which a cell shows its count
MAX_NAMES = 60  # classes up to which the axes show their names
DPI = 100
BAR, GAP = (
    (76, 120, 168),
    (228, 87, 86),
)  # RGB of the reliability diagram's bars and of their distance from the confidence


def sheet(rows: Sequence[Sequence[tuple[np.ndarray, Sequence[str]]]], *, first: float = 1.15) -> np.ndarray:
    """Draw pictures uint8 [H, W, 3] in rows, each with its lines of words above it.

    `first`: width of the first column over that of the others, where it stands apart.
    """
    columns = max(len(row) for row in rows)
    figure = Figure(figsize=(2.3 * columns, 2.95 * len(rows)), dpi=DPI, layout="constrained")
    grid = figure.subplots(
        len(rows), columns, squeeze=False, gridspec_kw={"width_ratios": [first] + [1] * (columns - 1)}
    )
    for axes in grid.flat:
        axes.set_axis_off()
    for row, places in zip(rows, grid):
        for (image, (title, *words)), axes in zip(row, places):
            axes.imshow(image, interpolation="nearest")
            lines = [line for text in words for line in textwrap.wrap(text, WRAP)[:MAX_LINES]]
            axes.set_title(_literal("\n".join([*textwrap.wrap(title, WRAP), *lines])), fontsize=7.5)
    return _drawn(figure)


def curves(lines: Mapping[str, tuple[np.ndarray, np.ndarray]], name: str, *, over: int = 10) -> np.ndarray:
    """Draw a metric of several runs, (steps [N], values [N]) each, and its distance from the first run's below.

    Faint: as logged; strong: the mean of `over` neighbours. The distance is at the steps that both runs have.
    """
    figure = Figure(figsize=(8, 6), dpi=DPI, layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    (first_steps, first), *_ = lines.values()
    for i, (run, (steps, values)) in enumerate(lines.items()):
        colour = f"C{i}"
        above.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
        run = f" {_literal(run)}"  # what begins with an underscore would be left out of the legend
        above.plot(*_smooth(steps, values, over), color=colour, label=run)
        both, ours, theirs = np.intersect1d(steps, first_steps, return_indices=True)
        if i and len(both):
            distance = values[ours] - first[theirs]
            spread = np.sqrt(np.mean(distance**2))
            below.plot(*_smooth(both, distance, over), color=colour, label=f"{run}: {spread:.3g} root mean square")
    above.set_ylabel(_literal(name))
    above.legend(fontsize=8)
    below.axhline(0, color="C0", linewidth=0.8)
    below.set(xlabel="finished updates", ylabel=f"less {_literal(next(iter(lines)))}")
    if below.get_legend_handles_labels()[0]:
        below.legend(fontsize=8)
    return _drawn(figure)


def _smooth(steps: np.ndarray, values: np.ndarray, over: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the means of `over` neighbours at the middle of their steps."""
    over = max(1, min(over, len(values)))
    window = np.full(over, 1 / over)
    return np.convolve(steps, window, "valid"), np.convolve(values, window, "valid")


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


def reliability(calibration: np.ndarray, ece: float) -> np.ndarray:
    """Draw accuracy against confidence by bin, and how many images each has; `ece`: a fraction, for the title.

    `calibration` [bins, 3]: count, accuracy, mean confidence of bins of equal width over 0 to 1. The distance from the
    top of a bar to the mean confidence of its bin, a line that ends on the diagonal, is what the error averages.
    """
    count, accuracy, confidence = calibration[calibration[:, 0] > 0].T
    width = 1 / len(calibration)
    left = np.flatnonzero(calibration[:, 0]) * width
    bar, gap = (tuple(value / 255 for value in colour) for colour in (BAR, GAP))
    figure = Figure(figsize=(5.2, 6.2), dpi=DPI, layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, gridspec_kw={"height_ratios": [4, 1]})
    above.bar(left, accuracy, width, align="edge", color=bar, edgecolor="white", label="accuracy")
    above.plot([0, 1], [0, 1], "--", color="0.35", linewidth=1, label="perfect calibration")
    above.vlines(confidence, accuracy, confidence, color=gap, linewidth=2.5)
    above.plot(confidence, confidence, "o", color=gap, markersize=5, label="mean confidence", clip_on=False)
    above.set(xlim=(0, 1), ylim=(0, 1), ylabel="accuracy")
    figure.legend(loc="outside lower center", ncols=3, fontsize=8, frameon=False)  # inside it would hide bars
    total = int(count.sum())
    figure.suptitle(f"expected calibration error {ece:.4f}, {total:,} images" if total else "no images", fontsize=11)
    below.bar(left, count, width, align="edge", color="0.75", edgecolor="white")
    below.set(xlabel="confidence", ylabel="images")
    below.yaxis.set_major_formatter("{x:,.0f}")
    below.locator_params(axis="y", integer=True, nbins=3)
    return _drawn(figure)


def _short(name: str) -> str:
    return _literal(name if len(name) <= 20 else name[:19] + "…")


def _literal(text: str) -> str:
    return text.replace("$", r"\$")  # a dollar sign would start a formula, and a broken formula is an exception


def _drawn(figure: Figure) -> np.ndarray:
    canvas = backend_agg.FigureCanvasAgg(figure)
    canvas.draw()
    return np.array(canvas.buffer_rgba())[..., :3]
