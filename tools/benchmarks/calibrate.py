"""A short calibration of this machine: what `--mode=plan` predicts images/s and memory from (`deit/estimates.py`)."""

import datetime
import tempfile
from collections.abc import Sequence
from typing import Any

import numpy as np

from deit import cost, errors, estimates, runtime
from deit.models import factory, fused_block, paths
from tools.benchmarks import sides, update

# (variant, side in px, micro-batch): from few FLOPs a byte to many, and two sizes of one network for its memory.
CASES = (
    ("deit_tiny_distilled_patch16_224", 112, 16),
    ("deit_tiny_distilled_patch16_224", 224, 4),
    ("deit_tiny_distilled_patch16_224", 224, 16),
    ("deit_small_distilled_patch16_224", 224, 8),
)
_SAME = (1, 2)  # which cases differ in the micro-batch alone


def measure(config, *, command: Sequence[str]) -> dict[str, Any]:
    """Measure updates of `CASES` with the configured precision, blocks and xla; fit the machine's rates, keep them.

    Errors: UserError where they can't be kept.
    """
    _check_cache()
    measured, costs = {}, []
    for variant, size, micro in CASES:
        fields = {"model.variant": variant, "data.image_size": size, "micro_batch": micro, "optim.train_only": ""}
        flags = [f"--config.{name}={value}" for name, value in fields.items()]
        measured[f"{variant} {size} px x {micro}"] = sides.Side((*command, *flags, "update", str(micro)))
    runs = [run for (run,) in sides.alternate(measured, rounds=1, said="calibrate").values()]
    runtime.prepare(config.precision)
    for variant, size, _ in CASES:
        costs.append(_cost(update.copy_of(config, {"model.variant": variant}), size))
    machine, worst = fit([spent for spent, _ in costs], [1 / run["images_per_sec"] for run in runs])
    few, many = _SAME
    spent, parameters = costs[few]
    small, large = (runs[i]["peak_mb"] * 2**20 for i in _SAME)
    slope = (large - small) / (CASES[many][2] - CASES[few][2])
    if slope <= 0:
        raise errors.UserError("a larger micro-batch took no more memory: something else uses this machine; try again")
    weights = estimates.weights_bytes(config, count=parameters, trained=parameters)
    calibration = estimates.Calibration(
        machine=machine,
        base_bytes=small - slope * CASES[few][2] - weights,
        activation_factor=slope / spent.activation_bytes,
        worst=worst,
        measured=datetime.date.today().isoformat(),
    )
    path = estimates.write(config, calibration)
    rates = {name: run["images_per_sec"] for name, run in zip(measured, runs)}
    return {
        "of": estimates.key(config), "machine": estimates.fingerprint(), "images_per_sec": rates,
        "flops_per_sec": machine.flops, "bytes_per_sec": machine.bandwidth, "worst": worst,
        "base_mb": calibration.base_bytes / 2**20, "activation_factor": calibration.activation_factor,
        "file": str(path),
    }  # fmt: skip


def _check_cache() -> None:
    """Raise UserError where a calibration could not be kept, before two minutes go into it."""
    try:
        directory = estimates.cache_path().parent
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except (OSError, RuntimeError) as error:
        raise errors.UserError(f"calibrations can't be kept: {error}; DEIT_CACHE_DIR names a directory") from error


def _cost(config, size: int) -> tuple[cost.Cost, int]:
    network = factory.build(
        config.model,
        num_classes=update.CLASSES,
        image_size=size,
        precision=config.precision,
        load_weights=False,
    )
    count = sum(int(np.prod(variable.shape)) for _, variable in paths.variables(network.model))
    with fused_block.compiling(True):  # as a plan counts
        return cost.of(network.logits, size), count


def fit(costs: Sequence[cost.Cost], seconds: Sequence[float]) -> tuple[estimates.Machine, float]:
    """Return the machine whose seconds an image fit best, by relative squares, and its largest relative distance."""
    unit = estimates.Machine(1.0, np.inf), estimates.Machine(np.inf, 1.0)
    columns = np.array([[1 / machine.images_per_sec(spent) for machine in unit] for spent in costs])
    seconds = np.asarray(seconds)
    scaled = columns / seconds[:, None]
    best, *_ = np.linalg.lstsq(scaled, np.ones(len(seconds)), rcond=None)
    if best.min() <= 0:  # one of the two does not show: the other explains all
        only = int(np.argmax(best))
        best = np.zeros(2)
        best[only] = scaled[:, only].sum() / np.square(scaled[:, only]).sum()
    worst = float(np.abs(scaled @ best - 1).max())
    rates = [1 / value if value > 0 else float(np.finfo(np.float64).max) for value in best]
    return estimates.Machine(*rates), worst


def lines(result: dict[str, Any]) -> list[str]:
    """Return the text for what `measure` found."""
    return [
        f"machine      {result['machine']}; {result['of']}",
        *(f"measured     {name:<48} {rate:8.2f} images/s" for name, rate in result["images_per_sec"].items()),
        f"fitted       {result['flops_per_sec'] / 1e9:.0f} GFLOP/s and {result['bytes_per_sec'] / 1e9:.1f} GB/s, "
        f"at most {result['worst']:.1%} off",
        f"memory       {result['base_mb']:.0f} MB + {result['activation_factor']:.2f} of a micro-batch's activations",
        f"kept in      {result['file']}: --mode=plan reads it",
    ]
