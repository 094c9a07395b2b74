"""A checkpoint's student as files that others open: a SavedModel, a Keras file, TFLite files.

Promises: every file is read again and compared with the checkpoint's own logits before the directory has its name; a
process with TensorFlow alone opens SavedModel and TFLite without this package. A transformer is written as Keras' own
layers (`models/stock.py`), so that tf_keras alone opens its Keras file; a CNN's needs `import deit.models.cnn` before.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from deit import commit, errors, evaluate, keras, lite, runtime, saved
from deit.data import sources, stream, views
from deit.models import factory, stock

TOLERANCE = 1e-4  # of the largest logit: what a file's logits may differ by from the checkpoint's


@dataclasses.dataclass(frozen=True)
class Written:
    """A file of an export.

    Attributes:
      name: of the file, or directory, in the export.
      bytes: its size.
      difference: largest absolute difference of a logit from the checkpoint's.
      largest: the checkpoint's largest absolute logit.
      top1, milliseconds: of a TFLite file: accuracy on the evaluation split, None where the data is absent; time of one
        picture.
    """

    name: str
    bytes: int
    difference: float
    largest: float
    top1: float | None = None
    milliseconds: float | None = None


def export(
    ckpt: str | Path, out: Path, *, formats: Sequence[str], weights: str = "raw", force: bool = False
) -> list[Written]:
    """Write `formats` of a run's newest checkpoint, or of one checkpoint, to the directory `out`.

    `force`: an `out` that exists is replaced once the new one is whole. Errors: UserError, with nothing changed.
    """
    if not force:
        commit.check_new(out)
    runtime.prepare("float32")
    opened = saved.open_network(ckpt, precision="float32", weights=weights)
    sample = _Sample.of(opened)
    model = portable(opened, weights)
    replaced = None
    try:
        with commit.whole(out) as under_way:
            under_way.mkdir()
            written = [each for name in formats for each in _FORMATS[name](model, opened, under_way, sample)]
            facts = {
                "step": opened.step,
                "state_sha256": opened.state_sha256,
                "weights": weights,
                "classes": list(opened.config.resolved.classes),
                "image_size": opened.network.image_size,
                "files": [dataclasses.asdict(each) for each in written],
            }
            (under_way / "export.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
            if force and os.path.lexists(out):
                replaced = out.with_name(f"tmp-replaced-{out.name}-{secrets.token_hex(4)}")
                os.rename(out, replaced)
    except BaseException as error:
        if replaced and not os.path.lexists(out):
            os.rename(replaced, out)
        if isinstance(error, OSError):
            raise errors.UserError(f"--out ({out}) can't be written: {error.strerror or error}") from error
        raise
    if replaced:
        shutil.rmtree(replaced)
    return written


def portable(opened: saved.Saved, weights: str) -> Any:
    """Return a checkpoint's student as a Keras model: a transformer's layers are all Keras' own."""
    shape, config = factory.shape_of(opened.config.model), opened.config
    if shape is None:
        return opened.network.model
    return stock.build(
        saved.student(opened.tensors, weights, opened.path),
        dataclasses.replace(shape, two_heads="dist" in opened.network.model.output),
        name=re.sub(r"\W", "_", config.model.variant),
        image_size=opened.network.image_size,
        mean=config.model.mean,
        std=config.model.std,
    )


class Served(tf.Module):
    """What a SavedModel answers, with the class names and evaluation's resizing inside.

    Signatures: serving_default takes images uint8 [B, H, W, 3] of any H and W, encoded takes files [B] (JPEG, PNG, BMP,
    GIF). Both give probabilities [B, C] (of the heads' mean), logits_cls, logits_dist where there is that head, and
    class_names [C].
    """

    def __init__(self, model: Any, opened: saved.Saved) -> None:
        super().__init__()
        self.weights = list(model.weights)  # and not the model: its layers would be stored with functions of their own
        self.forward = functools.partial(model, training=False)
        self.config = opened.config
        self.class_names = tf.constant(list(opened.config.resolved.classes))

    @tf.function(autograph=False, input_signature=[tf.TensorSpec([None, None, None, 3], tf.uint8, name="images")])
    def images(self, images):
        """Answer pictures of one size."""
        return self._answer(images, functools.partial(views.prepared, self.config))

    @tf.function(autograph=False, input_signature=[tf.TensorSpec([None], tf.string, name="encoded")])
    def encoded(self, encoded):
        """Answer files."""
        return self._answer(encoded, views.evaluation(self.config))

    def _answer(self, inputs, prepare: Callable) -> dict[str, tf.Tensor]:
        size = self.config.data.image_size
        ready = tf.map_fn(prepare, inputs, fn_output_signature=tf.TensorSpec([size, size, 3], tf.uint8))
        outputs = self.forward(tf.cast(ready, tf.float32))
        logits = {f"logits_{name}": value for name, value in outputs.items()}
        probabilities = tf.nn.softmax(factory.fused(outputs))
        return {"probabilities": probabilities, **logits, "class_names": tf.identity(self.class_names)}


@dataclasses.dataclass(frozen=True)
class _Sample:
    """Pictures uint8 [4, S, S, 3] and the checkpoint's own logits of them."""

    images: np.ndarray
    logits: dict[str, np.ndarray]

    @classmethod
    def of(cls, opened: saved.Saved) -> _Sample:
        size = opened.network.image_size
        images = np.random.default_rng(0).integers(0, 256, [4, size, size, 3], np.uint8)
        images[1:3] = np.linspace(0, 255, size, dtype=np.uint8)[:, None, None]  # smooth ones beside noise
        images[2] = np.swapaxes(images[2], 0, 1)
        return cls.seen(opened, images, images)

    @classmethod
    def seen(cls, opened: saved.Saved, images: np.ndarray, prepared: np.ndarray) -> _Sample:
        """Return `images` with the logits of what the network is shown instead, `prepared`."""
        found = opened.network.logits(tf.constant(prepared, tf.float32))
        return cls(images, {name: value.numpy() for name, value in found.items()})

    def written(self, path: Path, logits: dict[str, np.ndarray], *, exact: bool = True) -> Written:
        """Return the facts of a file that gave `logits`. Errors: UserError where `exact` ones are others."""
        difference = max(float(np.abs(logits[name] - value).max()) for name, value in self.logits.items())
        largest = max(float(np.abs(value).max()) for value in self.logits.values())
        if exact and not difference <= TOLERANCE * max(1.0, largest):
            raise errors.UserError(f"{path.name} gives other logits than the checkpoint: {difference:.3g} apart")
        files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
        return Written(path.name, sum(file.stat().st_size for file in files), difference, largest)


def _saved_model(model: Any, opened: saved.Saved, out: Path, sample: _Sample) -> list[Written]:
    path, served = out / "saved_model", Served(model, opened)
    signatures = {"serving_default": served.images, "encoded": served.encoded}
    tf.saved_model.save(served, str(path), signatures=signatures)
    # It prepares pictures itself, those of the network's size too: it is compared on what evaluation makes of them.
    seen = np.stack([views.prepared(opened.config, image).numpy() for image in sample.images])
    sample = _Sample.seen(opened, sample.images, seen)
    answer = tf.saved_model.load(str(path)).signatures["serving_default"](images=tf.constant(sample.images))
    return [sample.written(path, {name: answer[f"logits_{name}"].numpy() for name in sample.logits})]


def _keras(model: Any, opened: saved.Saved, out: Path, sample: _Sample) -> list[Written]:
    path = out / "model.keras"
    model.save(path)
    again = keras.models.load_model(path)
    found = again(tf.constant(sample.images, tf.float32), training=False)
    return [sample.written(path, {name: value.numpy() for name, value in found.items()})]


def _tflite(model: Any, opened: saved.Saved, out: Path, sample: _Sample) -> list[Written]:
    found, config = [], opened.config
    batches = None
    if sources.sizes(config.data) is not None:
        _, batches = evaluate.split_of(config)
    for kind in lite.KINDS:
        path = out / f"model-{kind}.tflite"
        try:
            path.write_bytes(lite.convert(model, kind))
            interpreter = lite.Interpreter(path.read_bytes(), threads=stream.cores())
            logits = interpreter.logits(sample.images)
        except RuntimeError as error:
            why = str(error).strip().splitlines()[0]
            raise errors.UserError(f"--formats (tflite): {config.model.variant} does not convert: {why}") from error
        each = sample.written(path, logits, exact=kind == "float32")
        accuracy = None if batches is None else lite.top1(interpreter, batches, said=f"evaluating {path.name}")
        spent = lite.milliseconds(interpreter, sample.images[0])
        found.append(dataclasses.replace(each, top1=accuracy, milliseconds=spent))
    return found


_FORMATS: dict[str, Callable[..., list[Written]]] = {"saved_model": _saved_model, "keras": _keras, "tflite": _tflite}
