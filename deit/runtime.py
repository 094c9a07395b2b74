"""What knows about processes and devices: strategy, precision, determinism, exit codes.

Promises: `prepare` is called once, before anything touches a device; the same command on the same machine and
layout computes the same bits; `strategy=auto` is one device, the first GPU or else the CPU, even where there are more.
"""

import os
import platform
from pathlib import Path

import tensorflow as tf

from deit import errors

DONE, DIVERGED = 0, 4  # exit codes; `cli` has 1 for errors and 130 for Ctrl-C

_ONEDNN = ("TF_ENABLE_ONEDNN_OPTS", "ONEDNN_MAX_CPU_ISA", "ONEDNN_DEFAULT_FPMATH_MODE")


def prepare(precision: str, *, logical_cpus: int = 1) -> None:
    """Set what TensorFlow reads only before its devices start: TF32, memory growth, determinism, logical CPUs."""
    tf.config.experimental.enable_tensor_float_32_execution(precision == "tf32")
    tf.config.experimental.enable_op_determinism()
    for gpu in tf.config.list_physical_devices("GPU"):
        tf.config.experimental.set_memory_growth(gpu, True)
    if logical_cpus > 1 and not tf.config.list_physical_devices("GPU"):
        cpu = tf.config.list_physical_devices("CPU")[0]
        tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * logical_cpus)


def make_strategy(name: str, devices: int = 0) -> tf.distribute.Strategy:
    """Return the strategy for `strategy` and `devices` of the configuration; `auto` is one device.

    Errors: UserError where the machine has fewer devices than asked for.
    """
    kind = "GPU" if tf.config.list_logical_devices("GPU") else "CPU"
    found = tf.config.list_logical_devices(kind)
    if name != "mirrored":
        return tf.distribute.OneDeviceStrategy(found[0].name)
    wanted = devices or len(found)
    if wanted > len(found):
        raise errors.UserError(f"devices ({wanted}) must be at most the {len(found)} {kind} devices found")
    return tf.distribute.MirroredStrategy([device.name for device in found[:wanted]])


def device_kind(strategy: tf.distribute.Strategy) -> str:
    """Return the models of the devices that a run computes on: equal ones give equal bits.

    A GPU comes with the CPU beside it, which decodes and augments. Of a CPU the number of cores belongs to it, which
    decides how sums are cut where oneDNN is off, and so do the variables that switch oneDNN.
    """
    kind = tf.DeviceSpec.from_string(strategy.extended.worker_devices[0]).device_type
    if kind != "GPU":
        switches = [f"{name}={os.environ[name]}" for name in _ONEDNN if name in os.environ]
        return ", ".join([_cpu(), f"{len(os.sched_getaffinity(0))} cores", *switches])
    gpu = tf.config.list_physical_devices("GPU")[0]
    return f"{tf.config.experimental.get_device_details(gpu).get('device_name', 'GPU')}, {_cpu()}"


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # not Linux
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"CPU {models[0] if models else platform.processor() or platform.machine()}"
