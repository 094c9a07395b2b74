"""What a strategy's replicas are fed: the stream, cut so that each gets its contiguous slice of every global batch.

Promises: values of a batch on the host, side by side in the order of the replicas, are the batch of one device; a
process reads and decodes only its own share.
"""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import tensorflow as tf

from deit import workers
from deit.data import sources, stream


def share(config, strategy: tf.distribute.Strategy) -> tuple[int, int]:
    """Return (first, count): which examples of every global batch this process reads."""
    place = workers.place(strategy)
    count = config.global_batch // place.count
    return place.index * count, count


def batches(
    config,
    strategy: tf.distribute.Strategy,
    source: sources.Source,
    *,
    start_update: int,
    drop_rates: Sequence[float] = (),
) -> Iterable[dict]:
    """Return the distributed stream of a resolved configuration from `start_update` on (`stream.training`)."""
    first, count = share(config, strategy)
    replicas = _replicas_here(strategy)

    def dataset(_):
        """Return this process' share of the stream, an element a replica."""
        own = stream.training(
            source,
            config,
            start_update=start_update,
            slice_start=first,
            slice_size=count,
            drop_rates=drop_rates,
        )
        if replicas > 1:
            # A process hands its elements to its replicas in turn: cut each batch into one element a replica.
            own = own.flat_map(
                lambda batch: tf.data.Dataset.from_tensor_slices(
                    {
                        name: tf.reshape(value, [replicas, count // replicas, *value.shape[1:]])
                        for name, value in batch.items()
                    }
                )
            )
        # It has no end. Where TensorFlow can't see that, several workers ask each other before every batch.
        return own.apply(tf.data.experimental.assert_cardinality(tf.data.INFINITE_CARDINALITY))

    return strategy.distribute_datasets_from_function(dataset)


def _replicas_here(strategy: tf.distribute.Strategy) -> int:
    return strategy.num_replicas_in_sync // workers.place(strategy).count


def local(strategy: tf.distribute.Strategy, value) -> np.ndarray:
    """Return what this process's replicas hold of a field [N, ...] of a batch, in their order."""
    return np.concatenate([part.numpy() for part in strategy.experimental_local_results(value)])


def spread(strategy: tf.distribute.Strategy, values: Mapping[str, np.ndarray]) -> dict:
    """Return arrays [N, ...] of this process's share as its replicas' slices, the way `batches` hands out a batch."""
    replicas = _replicas_here(strategy)
    if replicas == 1:
        return {name: tf.constant(value) for name, value in values.items()}
    parts = {name: np.split(value, replicas) for name, value in values.items()}
    return {
        name: strategy.experimental_distribute_values_from_function(
            lambda context, name=name: tf.constant(parts[name][context.replica_id_in_sync_group])
        )
        for name in values
    }
