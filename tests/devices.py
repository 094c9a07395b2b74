"""The one MirroredStrategy of the test process: two of them share collective keys, and their all-reduces collide."""

import functools

import tensorflow as tf


@functools.cache
def two_cpus() -> tf.distribute.MirroredStrategy:
    """Return the strategy over the two logical CPUs that conftest.py makes."""
    return tf.distribute.MirroredStrategy(["/cpu:0", "/cpu:1"])


def one_device() -> tf.distribute.OneDeviceStrategy:
    """Return the strategy of a single CPU."""
    return tf.distribute.OneDeviceStrategy("/cpu:0")
