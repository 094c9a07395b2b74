"""What knows about processes and devices: strategy, precision, determinism, exit codes.

Promises: `prepare` is called once, before anything touches a device; the same command on the same machine and
layout computes the same bits; `strategy=auto` is one device unless TF_CONFIG names several workers.
"""

import json
import os

import tensorflow as tf

from deit import errors

DONE, ERROR, DIVERGED = 0, 1, 4  # exit codes; docs/reliability.md


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
    """Return the strategy for `strategy` and `devices` of the configuration.

    Errors: UserError where the machine has fewer devices than asked for, or TF_CONFIG is missing.
    """
    if name == "auto":
        name = "multi_worker" if _workers() > 1 else "one_device"
    kind = "GPU" if tf.config.list_logical_devices("GPU") else "CPU"
    found = tf.config.list_logical_devices(kind)
    if name == "one_device":
        return tf.distribute.OneDeviceStrategy(found[0].name)
    if name == "mirrored":
        wanted = devices or len(found)
        if wanted > len(found):
            raise errors.UserError(f"devices ({wanted}) must be at most the {len(found)} {kind} devices found")
        return tf.distribute.MirroredStrategy([device.name for device in found[:wanted]])
    if _workers() < 1:
        raise errors.UserError("strategy ('multi_worker') needs the environment variable TF_CONFIG")
    return tf.distribute.MultiWorkerMirroredStrategy()


def is_chief() -> bool:
    """Return whether this process writes the run's files: worker 0, or the only process."""
    return _tf_config().get("task", {}).get("index", 0) == 0


def worker() -> tuple[int, int]:
    """Return (index of this process, number of processes)."""
    return _tf_config().get("task", {}).get("index", 0), max(1, _workers())


def _workers() -> int:
    return len(_tf_config().get("cluster", {}).get("worker", []))


def _tf_config() -> dict:
    text = os.environ.get("TF_CONFIG", "")
    try:
        return json.loads(text) if text else {}
    except ValueError:
        raise errors.UserError(f"TF_CONFIG must be JSON, it is {text[:80]!r}") from None
