"""The cost of an update against accumulation steps and image size: measured, fitted, drawn.

Laws: t(a) = t0 + t1 a seconds for a micro-batches in an update; t(T) = c0 + c1 T + c2 T^2 seconds an image of T tokens
(dense layers grow with T, attention with its square, and c0 is what does not: optimizer, kernels that a scale is
multiplied into, starting operations). `worst` is the largest relative distance of a measurement from its law.
"""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from deit import errors
from deit.models import factory
from tools.benchmarks import sides

ACCUM_STEPS = (1, 2, 4, 8, 16, 32, 64)
IMAGE_SIZES = (112, 160, 192, 224, 288, 384)


def measure(config, *, rounds: int, command: Sequence[str]) -> dict[str, Any]:
    """Measure both sweeps, in `rounds` rounds."""
    micro, shape = config.micro_batch, factory.shape_of(config.model)
    if shape is None:
        raise errors.UserError(f"model.variant ({config.model.variant}) must be a transformer: its cost goes by tokens")
    if shape.patch > min(IMAGE_SIZES):
        raise errors.UserError(f"model.patch ({shape.patch}) must be at most {min(IMAGE_SIZES)} px, the smallest image")
    by_steps = {
        str(steps): sides.Side((*command, f"--config.global_batch={micro * steps}", "update", str(micro * steps)))
        for steps in ACCUM_STEPS
    }
    by_size = {
        str(size): sides.Side((*command, f"--config.data.image_size={size}", "update", str(micro)))
        for size in IMAGE_SIZES
    }
    steps = _medians(sides.alternate(by_steps, rounds=rounds, said="accum_steps"))
    sizes = _medians(sides.alternate(by_size, rounds=rounds, said="image_size"))
    tokens = [(size // shape.patch) ** 2 + shape.prefix for size in IMAGE_SIZES]
    result = {
        "micro_batch": micro,
        "model": config.model.variant,
        "precision": config.precision,
        "accum_steps": list(ACCUM_STEPS),
        "update_seconds": [micro * n / run["images_per_sec"] for n, run in zip(ACCUM_STEPS, steps)],
        "accum_peak_mb": [run["peak_mb"] for run in steps],
        "image_size": list(IMAGE_SIZES),
        "tokens": tokens,
        "image_seconds": [1 / run["images_per_sec"] for run in sizes],
        "size_peak_mb": [run["peak_mb"] for run in sizes],
    }
    result["accum_law"] = fit(result["accum_steps"], result["update_seconds"], powers=(0, 1))
    result["token_law"] = fit(tokens, result["image_seconds"], powers=(0, 1, 2))
    return result


def _medians(runs: dict[str, list[dict]]) -> list[dict[str, float]]:
    return [
        {key: statistics.median(run[key] for run in each) for key in ("images_per_sec", "peak_mb")}
        for each in runs.values()
    ]


def fit(x: Sequence[float], y: Sequence[float], *, powers: tuple[int, ...]) -> dict[str, Any]:
    """Fit y = c0 x^p0 + c1 x^p1 + ... by least relative squares; return coefficients, powers, worst distance."""
    x, y = np.asarray(x, float), np.asarray(y, float)
    columns = np.stack([x**p for p in powers], 1)
    coefficients, *_ = np.linalg.lstsq(columns / y[:, None], np.ones_like(y), rcond=None)
    worst = np.abs(columns @ coefficients / y - 1).max()
    return {"coefficients": coefficients.tolist(), "powers": list(powers), "worst": float(worst)}


def law(fitted: dict[str, Any], x: np.ndarray) -> np.ndarray:
    """Return the fitted law at x."""
    return sum(c * np.asarray(x, float) ** p for c, p in zip(fitted["coefficients"], fitted["powers"]))


def draw(result: dict[str, Any], path: Path) -> None:
    """Draw both sweeps with their laws, and peak memory beside them, to a PNG file."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    rows = (
        ("accum_steps", "update_seconds", "accum_law", "accum_peak_mb", "micro-batches in an update", "s an update"),
        ("tokens", "image_seconds", "token_law", "size_peak_mb", "image size, px", "s an image"),
    )
    for axes, (x, y, fitted, peak, said, unit) in zip(figure.subplots(1, 2), rows):
        at = np.linspace(min(result[x]), max(result[x]), 200)
        axes.plot(at, law(result[fitted], at), color="tab:blue", label="fitted law")
        axes.plot(result[x], result[y], "o", color="tab:blue", label="measured")
        if x == "tokens":
            axes.set_xticks(result["tokens"], result["image_size"], rotation=45)
        axes.set(xlabel=said, ylabel=unit, ylim=(0, None))
        beside = axes.twinx()
        beside.plot(result[x], np.asarray(result[peak]) / 1e3, "s--", color="tab:orange", label="peak memory")
        beside.set(ylabel="GB resident at most", ylim=(0, None))
        handles = [*axes.get_legend_handles_labels()[0], *beside.get_legend_handles_labels()[0]]
        axes.legend(handles, [handle.get_label() for handle in handles], loc="lower right", fontsize="small")
        axes.spines["top"].set_visible(False)
        beside.spines["top"].set_visible(False)
    figure.suptitle(f"{result['model']}, {result['precision']}, micro-batches of {result['micro_batch']}")
    figure.savefig(path, dpi=110)


def lines(result: dict[str, Any]) -> list[str]:
    """Return the text for what `measure` found."""
    t0, t1 = result["accum_law"]["coefficients"]
    c0, c1, c2 = result["token_law"]["coefficients"]
    return [
        *(
            f"accum_steps {n:>3}: {seconds:8.3f} s an update, {result['micro_batch'] * n / seconds:6.2f} images/s, "
            f"{mb:6.0f} MB peak"
            for n, seconds, mb in zip(result["accum_steps"], result["update_seconds"], result["accum_peak_mb"])
        ),
        f"law: {t0:.3f} + {t1:.4f} accum_steps seconds, at most {result['accum_law']['worst']:.1%} off",
        *(
            f"{px:>4} px, {tokens:>4} tokens: {1 / seconds:7.2f} images/s, {mb:6.0f} MB peak"
            for px, tokens, seconds, mb in zip(
                result["image_size"], result["tokens"], result["image_seconds"], result["size_peak_mb"]
            )
        ),
        f"law: {c0 * 1e3:.2f} + {c1 * 1e3:.4f} T + {c2 * 1e6:.3f} T^2 / 1000 milliseconds an image of T tokens, at "
        f"most {result['token_law']['worst']:.1%} off",
    ]
