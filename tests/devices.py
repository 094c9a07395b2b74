"""The one MirroredStrategy of the test process: two of them share collective keys, and their all-reduces collide."""

import functools
from collections.abc import Mapping

import numpy as np
import tensorflow as tf


@functools.cache
def two_cpus() -> tf.distribute.MirroredStrategy:
    """Return the strategy over the two logical CPUs that conftest.py makes."""
    return tf.distribute.MirroredStrategy(["/cpu:0", "/cpu:1"])


def one_device() -> tf.distribute.OneDeviceStrategy:
    """Return the strategy of a single CPU."""
    return tf.distribute.OneDeviceStrategy("/cpu:0")


def spread(strategy: tf.distribute.Strategy, values: Mapping[str, np.ndarray]) -> dict:
    """Hand each replica its contiguous slice of every array."""
    replicas = strategy.num_replicas_in_sync
    parts = [{name: tf.constant(np.split(v, replicas)[r]) for name, v in values.items()} for r in range(replicas)]
    if replicas == 1:
        return parts[0]
    return {
        name: strategy.experimental_distribute_values_from_function(
            lambda context, name=name: parts[context.replica_id_in_sync_group][name]
        )
        for name in values
    }
