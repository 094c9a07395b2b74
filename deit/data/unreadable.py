"""Which images could not be read: named once each in the log, listed when there are too many.

Promises: a name is logged when its image is first met, and never again in this process; the count that decides is
the run's (train_step keeps it in its state), so a continued run stops where an undisturbed one does.
"""

from collections.abc import Iterable

import numpy as np
import tensorflow as tf
from absl import logging

from deit import errors
from deit.data import sources, stream, views

_LISTED = 50  # names in the error; the log has them all


class Unreadable:
    """The unreadable images of a training split that this process has met."""

    def __init__(self, source: sources.Source, config):
        self._source, self._config = source, config
        self.names: dict[str, None] = {}  # a set that keeps its order

    def note(self, positions: Iterable[np.ndarray], weights: Iterable[np.ndarray]) -> None:
        """Log the images of weight 0 that are new; arrays [B], one a replica."""
        lost = np.concatenate([p[w == 0] for p, w in zip(positions, weights)])
        indices = stream.indices_at(self._source, self._config, lost) if len(lost) else ()
        for index, position in zip(indices, lost):
            name = self._source.name(int(index))
            if name not in self.names:
                self.names[name] = None
                logging.warning("image %s gets weight 0: %s", name, self._reason(int(index), int(position)))

    def _reason(self, index: int, position: int) -> str:
        # The stream leaves out what fails, whatever the error: an error that is not the image's must not hide there.
        (encoded,), _ = self._source.read(np.array([index]))
        try:
            views.crop(tf.constant(encoded), stream.augmentation_seed(self._config, position), self._config)
        except tf.errors.InvalidArgumentError:
            return "it can't be read, or is larger than data.max_pixels"
        return "the stream could not make it, though it can be read now: a file that comes and goes?"

    def check(self, count: float, step: int) -> None:
        """Raise UserError where `count` of the images up to update `step` are too many for data.max_bad_fraction."""
        config = self._config
        read = max(step * config.global_batch, config.resolved.train_size)  # of an epoch, where none is over yet
        allowed = config.data.max_bad_fraction * read
        if count > allowed:
            raise errors.UserError(
                f"data.max_bad_fraction ({config.data.max_bad_fraction}) allows {allowed:.0f} unreadable images by "
                f"update {step}, there were {count:.0f} (a file counts each time it is met). Met since this start of "
                f"the run: {listed(list(self.names)) or 'none; the log of an earlier start names them'}"
            )


def listed(names: list[str]) -> str:
    """Return names in one line, the first 50 of them."""
    more = f" and {len(names) - _LISTED} more, all in the log" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more
