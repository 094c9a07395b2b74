"""The measurements `train`, `eval`, `accumulate`, `memory` and `startup` of tools/benchmark.py, and their lines.

Promises: each measurement is made by processes of its own (`sides`); a number that could not be had is left out, never
filled in.
"""

import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np

from deit import errors
from tools.benchmarks import sides

EVAL_BATCH = 64


def train(config, *, rounds: int, command: Sequence[str]) -> dict[str, Any]:
    """Compare updates of one micro-batch with timm's, and with their own matrix products in the same processes."""
    size = config.micro_batch
    found = sides.compare(config, "train", size, command=command, rounds=rounds)
    runs = found.pop("runs")
    missing = [run["floor_missing"] for run in runs if "floor_missing" in run]
    if missing:
        found["floor_missing"] = missing[0]
    else:
        fractions = [run["floor_seconds"] * run["images_per_sec"] / size for run in runs]
        found |= {
            "floor_fraction": statistics.median(fractions),
            "floor_rounds": fractions,
            "floor_seconds": statistics.median(run["floor_seconds"] for run in runs),
            "floor_gflops": runs[0]["floor_gflops"],
        }
    return {**found, "batch": size, "groups": sides.profiled(command=command, size=size)}


def train_lines(result: dict[str, Any]) -> list[str]:
    """Return the text for what `train` found."""
    total = sum(result["groups"].values())
    if "floor_missing" in result:
        floor = [f"floor   not measured: {result['floor_missing']}"]
    else:
        floor = [
            f"floor   {result['batch'] / result['floor_seconds']:7.2f} images/s if there were nothing but its "
            f"{result['floor_gflops']:.0f} GFLOP of matrix products: {result['floor_fraction']:.3f} of that is reached "
            f"(rounds: {_listed(result['floor_rounds'], 3)})"
        ]
    return [
        *_sides_lines(result, f"updates of {result['batch']}"),
        *floor,
        "kernels, one at a time:",
        *(
            f"  {name:<18} {seconds * 1e3:7.1f} ms  {seconds / total:6.1%}"
            for name, seconds in result["groups"].items()
        ),
    ]


def evaluation(config, *, rounds: int, command: Sequence[str]) -> dict[str, Any]:
    """Compare evaluation without gradients with timm's `eval()` under `inference_mode`."""
    found = sides.compare(config, "eval", EVAL_BATCH, command=command, rounds=rounds)
    del found["runs"]
    return {**found, "batch": EVAL_BATCH}


def evaluation_lines(result: dict[str, Any]) -> list[str]:
    """Return the text for what `evaluation` found."""
    return _sides_lines(result, f"passes of {result['batch']}")


def _sides_lines(result: dict[str, Any], what: str) -> list[str]:
    lines = [
        f"{name:<7} {side['images_per_sec']:7.2f} images/s in {what} (rounds: {_listed(side['rounds'])})  "
        f"{side['peak_mb']:6.0f} MB peak"
        for name, side in result.items()
        if name in ("ours", "timm")
    ]
    if "unmatched" in result:
        return [*lines, f"timm    not compared: {result['unmatched']}"]
    ratio = result["ratio"]
    return [
        *lines,
        f"ratio   {ratio['images_per_sec']:7.2f} (rounds: {_listed(ratio['rounds'])}); memory {ratio['peak_mb']:.2f}",
    ]


def _listed(values: Sequence[float], digits: int = 2) -> str:
    return ", ".join(f"{value:.{digits}f}" for value in values)


def accumulate(config, *, rounds: int, command: Sequence[str]) -> dict[str, Any]:
    """Alternate updates of one micro-batch and of a whole global batch; return medians and ratios of both."""
    one, whole = config.micro_batch, config.global_batch
    if one == whole:
        raise errors.UserError(f"global_batch ({whole}) must be larger than micro_batch to compare them")
    both = {str(size): sides.Side((*command, "update", str(size))) for size in (one, whole)}
    runs = sides.alternate(both, rounds=rounds, said="accumulate")
    first, second = (sides.summary(each) for each in runs.values())
    return {
        "micro_batch": one, "global_batch": whole,
        "images_per_sec": [first["images_per_sec"], second["images_per_sec"]],
        "rounds": [first["rounds"], second["rounds"]],
        "peak_mb": [first["peak_mb"], second["peak_mb"]],
        "speed_ratio": second["images_per_sec"] / first["images_per_sec"],
        "ratio_rounds": [b / a for a, b in zip(first["rounds"], second["rounds"])],
        "memory_ratio": second["peak_mb"] / first["peak_mb"],
    }  # fmt: skip


def accumulate_lines(result: dict[str, Any]) -> list[str]:
    """Return the text for what `accumulate` found."""
    lines = [
        f"one update of {size:>4}: {rate:6.2f} images/s (rounds: {_listed(rounds)})  {peak:6.0f} MB peak"
        for size, rate, rounds, peak in zip(
            (result["micro_batch"], result["global_batch"]),
            result["images_per_sec"],
            result["rounds"],
            result["peak_mb"],
        )
    ]
    ratios = f"(rounds: {_listed(result['ratio_rounds'])})"
    return [*lines, f"ratio             : {result['speed_ratio']:6.3f} {ratios}; memory {result['memory_ratio']:.3f}"]


def memory(config, *, rounds: int, command: Sequence[str]) -> dict[str, Any]:
    """Measure the peak of updates of several micro-batches, and the line through them; timm's beside the configured."""
    sizes = sorted({max(1, config.micro_batch // 4), max(1, config.micro_batch // 2), config.micro_batch})
    wanted = {str(size): sides.Side((*command, f"--config.micro_batch={size}", "update", str(size))) for size in sizes}
    theirs = sides.peer(config, "train", config.micro_batch)
    runs, _ = sides.beside(wanted, theirs, rounds=rounds, said="memory")
    peaks = {name: sides.summary(each)["peak_mb"] for name, each in runs.items()}
    other = peaks.pop("timm", None)
    found: dict[str, Any] = {"micro_batch": sizes, "peak_mb": list(peaks.values())}
    if len(sizes) > 1:
        slope, base = np.polyfit(sizes, found["peak_mb"], 1)
        found |= {"mb_per_image": float(slope), "mb_without_images": float(base)}
    if other is not None:
        found |= {"timm_peak_mb": other, "ratio": found["peak_mb"][-1] / other}
    return found


def memory_lines(result: dict[str, Any]) -> list[str]:
    """Return the text for what `memory` found."""
    lines = [f"micro_batch {size:>4}: {mb:6.0f} MB peak" for size, mb in zip(result["micro_batch"], result["peak_mb"])]
    if "mb_per_image" in result:
        lines.append(f"fitted: {result['mb_without_images']:.0f} MB + {result['mb_per_image']:.1f} MB an image")
    if "timm_peak_mb" in result:
        lines.append(
            f"timm at {result['micro_batch'][-1]}: {result['timm_peak_mb']:.0f} MB; ratio {result['ratio']:.2f}"
        )
    return lines


def startup(config, *, rounds: int, command: Sequence[str]) -> dict[str, Any]:
    """Measure seconds from the start of a process until its first update of one micro-batch is done, by part."""
    side = sides.Side((*command, "update", str(config.micro_batch)))
    runs = sides.alternate({"startup": side}, rounds=rounds, said="startup")["startup"]
    parts = {part: statistics.median(run["startup"][part] for run in runs) for part in runs[0]["startup"]}
    return {"seconds": parts, "total": sum(parts.values()), "batch": config.micro_batch}


def startup_lines(result: dict[str, Any]) -> list[str]:
    """Return the text for what `startup` found."""
    parts = [f"{part:<9} {seconds:6.2f} s" for part, seconds in result["seconds"].items()]
    return [*parts, f"until the first update of {result['batch']} is done: {result['total']:.2f} s"]
