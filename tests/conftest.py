"""What every test shares: the environment, two logical CPU devices, the real flowers."""

import os
import pathlib

import pytest

os.environ["TF_USE_LEGACY_KERAS"] = "1"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import tensorflow as tf

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent

# Here, once, since no device can be split after its first use: MirroredStrategy on two CPUs runs in-process.
tf.config.set_logical_device_configuration(
    tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 2
)


@pytest.fixture(scope="session")
def flowers_dir() -> pathlib.Path:
    """Return the TFDS directory that holds the real tf_flowers, or skip the test."""
    sibling = REPOSITORY.parent / "shared" / "data" / "tfds"
    path = pathlib.Path(os.environ.get("DEIT_TEST_DATA") or sibling)
    if not (path / "tf_flowers").is_dir():
        pytest.skip(f"no tf_flowers in {path}; DEIT_TEST_DATA=DIR names a TFDS directory that has it")
    return path
