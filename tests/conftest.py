"""What every test shares: the environment, two logical CPU devices, the real flowers."""

import os
import pathlib
import shutil

import pytest

os.environ["TF_USE_LEGACY_KERAS"] = "1"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ["DEIT_CACHE_DIR"] = os.devnull  # no test reads what was calibrated on this machine

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


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> pathlib.Path:
    """Return the directory of a SavedModel whose answers are known."""
    from tests import stand_ins  # after the devices are set

    return stand_ins.save(tmp_path_factory.mktemp("saved") / "stand_in")


@pytest.fixture(scope="module")
def zipped(saved, tmp_path_factory) -> pathlib.Path:
    """Return a zip of it."""
    archive = shutil.make_archive(str(tmp_path_factory.mktemp("zip") / "t"), "zip", saved.parent, "stand_in")
    return pathlib.Path(archive)


@pytest.fixture
def archive(zipped, tmp_path) -> pathlib.Path:
    """Return a copy of the zip in a directory of its own."""
    return pathlib.Path(shutil.copy(zipped, tmp_path / "teacher.zip"))
