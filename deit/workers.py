"""One process among the workers of a run: who is the chief, what all agree on, what an error says of a lost peer.

Promises: in a run of one process nothing here costs anything or waits. Every function but `place`, `local_scope` and
`lost_peer` is a collective: all workers call it, in the same order.
"""

import contextlib
import dataclasses
import functools
import hashlib
import re
from collections.abc import Callable, Iterator

import tensorflow as tf

from deit import errors

_LOST = (
    tf.errors.UnavailableError,
    tf.errors.AbortedError,
    tf.errors.CancelledError,
    tf.errors.DeadlineExceededError,
)


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a process stands among those of the run; the chief, the first, is the one that writes."""

    index: int
    count: int

    @property
    def chief(self) -> bool:
        """Whether this process writes checkpoints and logs."""
        return self.index == 0


def place(strategy: tf.distribute.Strategy) -> Place:
    """Return this process's place."""
    if isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy):
        resolver = strategy.cluster_resolver
        return Place(resolver.task_id, len(resolver.cluster_spec().job_tasks("worker")))
    return Place(0, 1)


def local_scope(strategy: tf.distribute.Strategy) -> contextlib.AbstractContextManager:
    """Return the scope of variables that no other process has, such as a teacher's: making them is no collective."""
    return contextlib.nullcontext() if place(strategy).count > 1 else strategy.scope()


def total(strategy: tf.distribute.Strategy, value: int) -> int:
    """Return the sum of the processes' values; every process must call it. Errors: as a lost peer has them."""
    if place(strategy).count == 1:
        return value

    found = _summing(strategy)(tf.constant(value, tf.int64))
    return int(strategy.experimental_local_results(found)[0].numpy())


@functools.cache
def _summing(strategy: tf.distribute.Strategy) -> Callable:
    def summed(mine):
        here = tf.identity(mine)  # on the replica's device: an argument has none, and the reduction asks where it is
        return tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.SUM, here)

    return tf.function(lambda mine: strategy.run(summed, args=(mine,)), autograph=False)


def from_chief(strategy: tf.distribute.Strategy, value: int) -> int:
    """Return the chief's value; every process must call it."""
    return total(strategy, value if place(strategy).chief else 0)


def barrier(strategy: tf.distribute.Strategy) -> None:
    """Wait until every process is here."""
    total(strategy, 0)


@contextlib.contextmanager
def chief_first(strategy: tf.distribute.Strategy) -> Iterator[None]:
    """Run the block in the chief and then in the others: what it downloads or prepares is there for them."""
    chief = place(strategy).chief
    if not chief:
        barrier(strategy)
    yield
    if chief:
        barrier(strategy)


def agree(strategy: tf.distribute.Strategy, text: str, what: str) -> None:
    """Raise UserError in every process where one has another `text` than the chief: it would compute another thing."""
    own = int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "little")
    if total(strategy, int(own != from_chief(strategy, own))):
        raise errors.UserError(
            f"the workers of this run differ in {what}: start them with the same command on the same data"
        )


def lost_peer(error: BaseException, strategy: tf.distribute.Strategy) -> str:
    """Return what an error says of another process of the run that is gone; "" where it is about something else."""
    if place(strategy).count == 1 or not isinstance(error, tf.errors.OpError):
        return ""
    if re.search(r"Shape mismatch in the collective|Collective instance .* expected", str(error)):
        return ""  # they are all there, and do not compute the same thing: a restart would not help
    told = re.search(r"Collective ops is aborted by: *([^\n]*)", str(error))
    if told is None and not isinstance(error, _LOST):
        return ""
    return told[1] if told else str(error).strip().partition("\n")[0]
