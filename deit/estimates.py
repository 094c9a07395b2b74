"""Images per second and memory before a run: of this machine from a calibration, of named GPUs from their data sheets.

Promises: what is calibrated says when and on what; what is only computed is called an estimate. Both come from the
floating-point operations and bytes that `cost` counts in the student's own graph.

An update takes FLOPs / (FLOP/s) + bytes / (bytes/s) an image, three times the forward pass of both. On this machine the
two rates are fitted to measured updates (tools/benchmark.py calibrate). On a GPU they are its data sheet's, of which
an update is taken to reach half. Counted so (the default layers' bytes), a V100 reached .49 in arXiv:2012.12877 when it
trained DeiT-B in half precision, data and all (8 of them, 300 epochs, 53 hours: section 5.6), and .77 to .81 in forward
passes of DeiT-Ti, S, B and B at 384 px (2536, 940, 292 and 86 images/s), which fits float32.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import platform
from pathlib import Path

import tensorflow as tf

from deit import config as configuration
from deit import cost, workdir
from deit.data import stream
from deit.models import factory

REACHED = 0.5
_TOUCHES = 2.0  # an activation is written and read
_CONTEXT_BYTES = 0.7e9  # what CUDA and its libraries hold before the first tensor
VERSION = 2
_KEY = {"precision": "float32", "model.fused_gradients": True, "xla": False}  # and what configs/base.py has


@dataclasses.dataclass(frozen=True)
class Machine:
    """What an update is computed by.

    Attributes:
      flops: FLOP/s of matrix products, in the precision that is asked for.
      bandwidth: bytes/s of what lies between them.
    """

    flops: float
    bandwidth: float

    def images_per_sec(self, spent: cost.Cost, passes: float = 3.0) -> float:
        """Return images/s of updates that take `passes` times a forward pass' cost, in the precision asked for."""
        moved = _TOUCHES * spent.activation_bytes
        return 1.0 / (passes * (spent.flops / self.flops + moved / self.bandwidth))


@dataclasses.dataclass(frozen=True)
class Gpu:
    """A data sheet: dense FLOP/s in float32, TF32 (0 = has none), half precision; bytes/s and bytes of memory.

    `bfloat16`: whether its matrix units take it.
    """

    single: float
    tf32: float
    half: float
    bandwidth: float
    memory: float
    bfloat16: bool = True


# NVIDIA's data sheets: dense, half precision summed in float32 where the sheet tells the two apart.
GPUS = {
    "V100-16GB": Gpu(15.7e12, 0, 125e12, 900e9, 16e9, bfloat16=False),
    "T4-16GB": Gpu(8.1e12, 0, 65e12, 320e9, 16e9, bfloat16=False),
    "A100-40GB": Gpu(19.5e12, 156e12, 312e12, 1555e9, 40e9),
    "L4-24GB": Gpu(30.3e12, 60e12, 121e12, 300e9, 24e9),
    "RTX4090-24GB": Gpu(82.6e12, 82.6e12, 165e12, 1008e9, 24e9),
    "H100-80GB": Gpu(67e12, 494e12, 989e12, 3350e9, 80e9),
}


def passes(config) -> float:
    """Return an update's cost over a forward pass': backward costs twice forward; heads alone need none below them."""
    return 1.0 if config.optim.train_only == "heads" else 3.0


def gpu_flops(gpu: Gpu, precision: str) -> float:
    """Return the data sheet's FLOP/s in a precision; nan for bfloat16 where its units don't take it."""
    if precision == "mixed_bfloat16" and not gpu.bfloat16:
        return math.nan
    single = (gpu.tf32 or gpu.single) if precision == "tf32" else gpu.single
    return gpu.half if precision.startswith("mixed") else single


def gpu_images_per_sec(gpu: Gpu, spent: cost.Cost, precision: str, passes: float = 3.0) -> float:
    """Return what an update reaches on a GPU, images/s: an estimate; nan where it has no units for bfloat16."""
    machine = Machine(REACHED * gpu_flops(gpu, precision), REACHED * gpu.bandwidth)
    return machine.images_per_sec(spent, passes)


def weights_bytes(config, *, count: int, trained: int) -> float:
    """Return the bytes of an update that no image adds to: weights, moments, averages, gradients and their sum.

    `count`, `trained`: parameters. Fused blocks hold qkv's and fc1's kernels a second time, 7 of 12 parts of a block.
    """
    copies = 4 + bool(config.optim.ema_decay) + config.optim.amsgrad
    folded = 0.6 * count if fused(config) and config.optim.train_only != "heads" else 0.0
    return 4.0 * (count + trained * copies + folded)


def fused(config) -> bool:
    """Return whether a configuration's student has the blocks of `models/fused_block.py`."""
    return config.model.fused_gradients and factory.shape_of(config.model) is not None


def kept_bytes(config, spent: cost.Cost, calibrated: Calibration | None = None) -> float:
    """Return the bytes that an update holds for an image: a part of what its forward pass makes, as on DeiT-Ti.

    Where heads alone are trained, a tensor is let go when the next ones are made: about one block's are there at once.
    """
    share = calibrated.activation_factor if calibrated else 0.4 if fused(config) else 0.5
    return spent.activation_bytes * share * (0.05 if config.optim.train_only == "heads" else 1.0)


def gpu_memory(*, weights: float, kept: float, micro_batch: int) -> float:
    """Return bytes on a GPU: `weights` and what has their size, what is kept of each image, CUDA's own."""
    return _CONTEXT_BYTES + weights + kept * micro_batch


@dataclasses.dataclass(frozen=True)
class Calibration:
    """What was measured on this machine, by precision.

    Attributes:
      machine: rates fitted to updates.
      base_bytes: resident memory of a process without a network.
      activation_factor: resident bytes of an image over those that its forward pass makes (`cost`).
      worst: largest relative distance of a measured update from the fit.
      measured: date, ISO.
    """

    machine: Machine
    base_bytes: float
    activation_factor: float
    worst: float
    measured: str


def fingerprint() -> str:
    """Return what a calibration is true for: processor, its cores, TensorFlow, the kind of device."""
    kind = "GPU" if tf.config.list_physical_devices("GPU") else "CPU"
    return f"{_processor()} x {stream.cores()}, {kind}, TensorFlow {tf.__version__}"


def key(config) -> str:
    """Return what a calibration is of: what in a configuration changes rates most, the network's size apart."""
    values = dict(configuration.flatten(config))
    return ", ".join(f"{name} {values[name]}" for name in _KEY)


def flags(config) -> list[str]:
    """Return what tools/benchmark.py calibrate needs on its command line to measure for a configuration."""
    values = dict(configuration.flatten(config))
    return [f"--config.{name}={values[name]}" for name, usual in _KEY.items() if values[name] != usual]


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def cache_path() -> Path:
    """Return where calibrations of this user's machines are kept; DEIT_CACHE_DIR names another directory.

    Errors: RuntimeError where the user has no home.
    """
    own = os.environ.get("DEIT_CACHE_DIR")
    root = Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "deit"
    return root / "calibration.json"


def read(config) -> Calibration | None:
    """Return this machine's calibration for a configuration of a DeiT; None where there is none that can be read."""
    if factory.shape_of(config.model) is None:
        return None
    try:
        stored = json.loads(cache_path().read_text(encoding="utf-8"))
        if stored["version"] != VERSION:
            return None
        found = stored[fingerprint()][key(config)]
        return Calibration(**{**found, "machine": Machine(**found["machine"])})
    except (OSError, RuntimeError, ValueError, KeyError, TypeError):
        return None


def write(config, calibration: Calibration) -> Path:
    """Keep a calibration beside those of other machines and settings; return the file. Errors: OSError."""
    path = cache_path()
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        stored = stored if stored.get("version") == VERSION else {}
    except (OSError, ValueError, AttributeError):
        stored = {}
    stored["version"] = VERSION
    stored.setdefault(fingerprint(), {})[key(config)] = dataclasses.asdict(calibration)
    path.parent.mkdir(parents=True, exist_ok=True)
    workdir.write(path, (json.dumps(stored, indent=2) + "\n").encode())
    return path
