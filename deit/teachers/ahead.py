"""A teacher's answers computed ahead of training: which updates lack them, in which order, by whom.

Promises: what is there, whole, is not computed again; no two shards write to one file.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence

import tensorflow as tf

from deit import feed
from deit.data import sources
from deit.teachers import chunks, labeller


def shard(updates: Iterable[int], index: int, count: int) -> list[int]:
    """Return those of `updates` that shard `index` of `count` computes: whole files."""
    return [update for update in updates if update // chunks.CHUNKS % count == index]


def missing(config, teacher: labeller.Labeller, updates: Iterable[int]) -> list[int]:
    """Return those of `updates` that the cache has no whole answers to."""
    return [update for update in updates if not teacher.cache.holds(update * config.global_batch)]


def fill(
    config,
    strategy: tf.distribute.Strategy,
    source: sources.Source,
    teacher: labeller.Labeller,
    updates: Sequence[int],
    *,
    advance: Callable[[], object],
) -> None:
    """Compute and keep the answers to `updates`, rising; `advance()` after each. Errors: UserError for a full disk."""
    for first, last in contiguous(updates):
        batches = iter(feed.batches(config, strategy, source, start_update=first))
        for update in range(first, last):
            teacher(next(batches), update)
            advance()


def contiguous(updates: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yield [first, last) of what is without a gap in rising numbers: the stream is opened once for each."""
    for _, group in itertools.groupby(enumerate(updates), lambda pair: pair[1] - pair[0]):
        numbers = [update for _, update in group]
        yield numbers[0], numbers[-1] + 1
