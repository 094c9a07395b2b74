"""A teacher's answers computed ahead of training: which updates lack them, in which order, by whom.

Promises: what is there, whole, is not computed again; no two shards write to one file.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence

import tensorflow as tf

from deit import feed
from deit.data import sources
from deit.teachers import chunks, labeller

GAP = 8  # updates


def shard(updates: Sequence[int], index: int, count: int) -> list[int]:
    """Return those of `updates`, rising, that shard `index` of `count` computes: a run of whole files."""
    files = sorted({update // chunks.CHUNKS for update in updates})
    low, high = (len(files) * each // count for each in (index, index + 1))
    own = set(files[low:high])
    return [update for update in updates if update // chunks.CHUNKS in own]


def missing(config, teacher: labeller.Labeller, updates: Iterable[int]) -> list[int]:
    """Return those of `updates` that the cache has no whole answers to."""
    return [update for update in updates if not _held(config, teacher, update)]


def fill(
    config,
    strategy: tf.distribute.Strategy,
    source: sources.Source,
    teacher: labeller.Labeller,
    updates: Sequence[int],
    *,
    advance: Callable[[], object],
) -> list[int]:
    """Compute and keep the answers to `updates`, rising; `advance()` after each.

    Returns the updates that are not kept, because the teacher had no finite answer. Errors: UserError for a full disk.
    """
    lost = []
    for part in contiguous(updates):
        batches, wanted = iter(feed.batches(config, strategy, source, start_update=part[0])), set(part)
        for update in range(part[0], part[-1] + 1):
            batch = next(batches)
            if update in wanted:
                teacher(batch, update)
                lost += [] if _held(config, teacher, update) else [update]
                advance()
    return lost


def contiguous(updates: Sequence[int]) -> Iterator[list[int]]:
    """Yield rising numbers in parts without a large gap: to open the stream costs as much as some batches of it."""
    part: list[int] = []
    for update in updates:
        if part and update - part[-1] > GAP:
            yield part
            part = []
        part.append(update)
    if part:
        yield part


def _held(config, teacher: labeller.Labeller, update: int) -> bool:
    return teacher.cache.holds(update * config.global_batch)
