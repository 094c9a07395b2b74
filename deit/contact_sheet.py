"""A picture of what the student will see: originals, then views of them at their real positions in the stream.

Promises: a view is the one that training makes at that position, mixing included, from the same draws; the words
beside it say what was drawn (operations in order, the shares of the labels).
"""

from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from deit import config as configuration
from deit import pictures
from deit.data import decode, mixing, sources, stream, views

EXAMPLES = 6  # rows
VIEWS = 4  # columns beside the original


def draw(source: sources.Source, config, *, examples: int = EXAMPLES, count: int = VIEWS) -> np.ndarray:
    """Return the sheet, uint8 [H, W, 3]: a row an example from the stream's beginning, `count` views of each."""
    # Neighbours are views of one example, and a mixing group has one lambda: take rows from different ones.
    step = config.augment.mix_group if configuration.mixes(config.augment) else config.augment.repeats
    first = stream.indices_at(source, config, range(0, min(examples, len(source)) * step, step))
    wanted = list(dict.fromkeys(int(index) for index in first))
    found = positions_of(source, config, wanted, count)
    places = np.array([position for index in wanted for position in found[index]])
    shown = as_trained(source, config, places)
    names = [source.name(index) for index in wanted]
    encoded, labels = source.read(np.array(wanted))
    rows = []
    for i, (name, data, label) in enumerate(zip(names, encoded, labels)):
        original = (_whole(data, config.data.max_pixels), [_class(source, label), name])
        rows.append([original, *shown[i * count : (i + 1) * count]])
    return pictures.sheet(rows)


def positions_of(source: sources.Source, config, indices: Sequence[int], count: int) -> dict[int, list[int]]:
    """Return the first `count` positions of the stream at which each of some examples stands."""
    n, epoch = len(source), 0
    found: dict[int, list[int]] = {index: [] for index in indices}
    while any(len(positions) < count for positions in found.values()):
        positions = np.arange(epoch * n, (epoch + 1) * n)
        shown = stream.indices_at(source, config, positions)
        here = np.isin(shown, indices)
        for index, position in zip(shown[here].tolist(), positions[here].tolist()):
            found[index].append(position)
        epoch += 1
    return {index: positions[:count] for index, positions in found.items()}


def as_trained(source: sources.Source, config, places: np.ndarray) -> list[tuple[np.ndarray, list[str]]]:
    """Return the pictures at positions `places` as the student sees them, each with its words."""
    count, size = len(places), config.data.image_size
    mixed = configuration.mixes(config.augment)
    group = config.augment.mix_group
    partners = mixing.partners(places, group)
    made = stream.at(source, config, np.concatenate([places, partners]) if mixed else places)
    batch = {name: tf.constant(value) for name, value in made.items()}
    batch["position"] = tf.range(len(made["position"]), dtype=tf.int64)  # rows, as mixing looks partners up by row
    if mixed:
        draws = [mixing.draw(tf.constant(g), seed=config.seed, augment_config=config.augment, size=size)
                 for g in places // group]  # fmt: skip
        readable = (made["weight"][:count] > 0) & (made["weight"][count:] > 0)
        batch["mix_lambda"] = tf.where(readable, tf.stack([share for share, _ in draws]), 1.0)
        batch["mix_box"] = tf.where(readable[:, None], tf.stack([box for _, box in draws]), 0)
        batch["mix_partner"] = tf.range(count, 2 * count, dtype=tf.int64)
    images = tf.saturate_cast(tf.round(mixing.images(batch, 0, count)), tf.uint8).numpy()
    shown = []
    for i, position in enumerate(places):
        own, words = (
            _class(source, made["label"][i]),
            views.describe(config, stream.augmentation_seed(config, position)),
        )
        if not made["weight"][i]:
            own, words = f"{own}: unreadable", []
        elif mixed and (share := float(batch["mix_lambda"][i])) < 1:
            own = f"{share:.2f} {own} + {1 - share:.2f} {_class(source, made['label'][count + i])}"
            whole = int(tf.reduce_min(batch["mix_box"][i, 2:])) == size
            words = [*words, "mixup" if whole else "cutmix"]
        shown.append((images[i], [own, ", ".join(words) or "crop only"]))
    return shown


def _class(source: sources.Source, label: int) -> str:
    return source.classes[int(label)]


def _whole(encoded: bytes, max_pixels: int) -> np.ndarray:
    try:
        return decode.decode(encoded, max_pixels=max_pixels).numpy()
    except tf.errors.InvalidArgumentError:  # the views beside it say so
        return np.zeros([8, 8, 3], np.uint8)
