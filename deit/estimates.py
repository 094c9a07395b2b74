"""Images per second and memory before a run: of this machine from a calibration, of named GPUs from their data sheets.

Promises: what is calibrated says when and on what; what is only computed is called an estimate. Both come from the
floating-point operations and bytes that `cost` counts in the student's own graph.

An update takes FLOPs / (FLOP/s) + bytes / (bytes/s) an image, three times the forward pass of both. On this machine the
two rates are fitted to measured updates (tools/benchmark.py calibrate). On a GPU they are its data sheet's, of which
an update is taken to reach half. With 8 V100 in 53 hours for 300 epochs (arXiv:2012.12877, section 5.6), DeiT-B reached
.76 of what the sheet gives plain layers in half precision; smaller networks reach less.
"""

import dataclasses
import json
import os
import platform
from pathlib import Path

import tensorflow as tf

from deit import cost, workdir

REACHED = 0.5
_PASSES = 3.0  # forward, and twice as much backward
_TOUCHES = 2.0  # an activation is written and read
_CONTEXT_BYTES = 0.7e9  # what CUDA and its libraries hold before the first tensor
VERSION = 1


@dataclasses.dataclass(frozen=True)
class Machine:
    """What an update is computed by.

    Attributes:
      flops: FLOP/s of matrix products, in the precision that is asked for.
      bandwidth: bytes/s of what lies between them.
    """

    flops: float
    bandwidth: float

    def images_per_sec(self, spent: cost.Cost) -> float:
        """Return images/s of training updates, of a forward pass' cost in the precision that is asked for."""
        moved = _TOUCHES * spent.activation_bytes
        return 1.0 / (_PASSES * (spent.flops / self.flops + moved / self.bandwidth))


@dataclasses.dataclass(frozen=True)
class Gpu:
    """A data sheet: dense FLOP/s in float32, TF32 (0 = has none), half precision; bytes/s and bytes of memory."""

    single: float
    tf32: float
    half: float
    bandwidth: float
    memory: float


# NVIDIA's data sheets: dense, half precision summed in float32 where the sheet tells the two apart.
GPUS = {
    "V100-16GB": Gpu(15.7e12, 0, 125e12, 900e9, 16e9),
    "T4-16GB": Gpu(8.1e12, 0, 65e12, 320e9, 16e9),
    "A100-40GB": Gpu(19.5e12, 156e12, 312e12, 1555e9, 40e9),
    "L4-24GB": Gpu(30.3e12, 60e12, 121e12, 300e9, 24e9),
    "RTX4090-24GB": Gpu(82.6e12, 82.6e12, 165e12, 1008e9, 24e9),
    "H100-80GB": Gpu(67e12, 494e12, 989e12, 3350e9, 80e9),
}


def gpu_images_per_sec(gpu: Gpu, spent: cost.Cost, precision: str) -> float:
    """Return what an update reaches on a GPU, images/s: an estimate. bfloat16 is half precision's rate."""
    single = (gpu.tf32 or gpu.single) if precision == "tf32" else gpu.single
    flops = gpu.half if precision.startswith("mixed") else single
    return Machine(REACHED * flops, REACHED * gpu.bandwidth).images_per_sec(spent)


def gpu_memory(spent: cost.Cost, *, weights: float, micro_batch: int) -> float:
    """Return bytes on a GPU: `weights` and what has their size, activations of a micro-batch, CUDA's own."""
    return _CONTEXT_BYTES + weights + spent.activation_bytes * micro_batch


@dataclasses.dataclass(frozen=True)
class Calibration:
    """What was measured on this machine, by precision.

    Attributes:
      machine: rates fitted to updates.
      base_bytes: resident memory of a process without a network.
      activation_factor: resident bytes of a micro-batch over the outputs of its forward graph.
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
    return f"{_processor()} x {len(os.sched_getaffinity(0))}, {kind}, TensorFlow {tf.__version__}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def cache_path() -> Path:
    """Return where calibrations of this user's machines are kept."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "deit" / "calibration.json"


def read(precision: str) -> Calibration | None:
    """Return this machine's calibration for a precision; None where there is none, or what is there is damaged."""
    try:
        stored = json.loads(cache_path().read_text(encoding="utf-8"))
        found = stored[fingerprint()][precision]
        if stored["version"] != VERSION:
            return None
        return Calibration(**{**found, "machine": Machine(**found["machine"])})
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write(precision: str, calibration: Calibration) -> Path:
    """Keep a calibration beside those of other machines and precisions; return the file."""
    path = cache_path()
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        stored = stored if stored.get("version") == VERSION else {}
    except (OSError, ValueError, AttributeError):
        stored = {}
    stored["version"] = VERSION
    stored.setdefault(fingerprint(), {})[precision] = dataclasses.asdict(calibration)
    path.parent.mkdir(parents=True, exist_ok=True)
    workdir.write(path, (json.dumps(stored, indent=2) + "\n").encode())
    return path
