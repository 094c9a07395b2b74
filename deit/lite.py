"""TFLite files of a student, in float32, float16 and int8, and what each is worth: bytes, milliseconds, accuracy.

int8 is dynamic-range quantisation: kernels are stored in eight bits, activations are quantised as they come. All take
pictures float32 [B, S, S, 3] in [0, 255] that are resized already (an antialiased resize does not convert), and give
the heads' logits by name.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable
from typing import Any

import numpy as np
import tensorflow as tf
import tqdm

from deit import errors

KINDS = ("float32", "float16", "int8")
_TIMED = 10  # runs of one picture that the time is the median of


def convert(model: Any, kind: str) -> bytes:
    """Return a Keras model of images [B, S, S, 3] as a TFLite file."""
    size = model.input_shape[1]
    signature = [tf.TensorSpec([None, size, size, 3], tf.float32, name="image")]
    forward = tf.function(lambda image: model(image, training=False), autograph=False, input_signature=signature)
    converter = tf.lite.TFLiteConverter.from_concrete_functions([forward.get_concrete_function()], model)
    if kind != "float32":
        converter.optimizations = [tf.lite.Optimize.DEFAULT]
    if kind == "float16":
        converter.target_spec.supported_types = [tf.float16]
    return converter.convert()


class Interpreter:
    """A TFLite file that answers."""

    def __init__(self, content: bytes, *, threads: int) -> None:
        self._interpreter = tf.lite.Interpreter(model_content=content, num_threads=threads)
        self._answer = self._interpreter.get_signature_runner()

    def logits(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """Return float32 logits [B, C] of each head for images [B, S, S, 3] in [0, 255]."""
        return self._answer(image=images.astype(np.float32))


def milliseconds(interpreter: Interpreter, image: np.ndarray) -> float:
    """Return the median time of one picture [S, S, 3]."""
    spent = []
    for _ in range(_TIMED + 2):
        started = time.perf_counter()
        interpreter.logits(image[None])
        spent.append(time.perf_counter() - started)
    return 1e3 * statistics.median(spent[2:])


def top1(interpreter: Interpreter, batches: Iterable, *, said: str) -> float:
    """Return the fraction of readable pictures of evaluation batches that the heads' mean gets right."""
    right = count = 0
    for batch in tqdm.tqdm(batches, desc=said, unit="batch", leave=False, disable=None):
        answer = np.mean(list(interpreter.logits(batch["image"].numpy()).values()), 0).argmax(-1)
        kept = batch["weight"].numpy() > 0
        right += int((answer == batch["label"].numpy())[kept].sum())
        count += int(kept.sum())
    if not count:
        raise errors.UserError("no image of the evaluation split could be read: there is nothing to measure")
    return right / count
