"""Classes and probabilities of pictures, or the logits of an array, by a checkpoint.

Promises: a picture is read, decoded, resized and cropped as evaluation does; one that can't be read is named and never
answered. `raw` logits are those of the network behind its own normalisation, which is left out, not undone.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tensorflow as tf
import tqdm
from absl import logging

from deit import errors, keras, runtime, saved
from deit import pictures as drawings
from deit.data import folder_source, stream, survey
from deit.models import factory


@dataclasses.dataclass(frozen=True)
class Prediction:
    """The answer to one picture.

    Attributes:
      file: its path, as given.
      classes: (name, probability), most probable first; empty where the picture can't be read.
      problem: why it can't; "" where it can.
    """

    file: str
    classes: tuple[tuple[str, float], ...]
    problem: str = ""


def find(paths: Sequence[str]) -> list[str]:
    """Return the files that are meant: each file, and the pictures below each directory, sorted.

    Files of other kinds in a directory are left out, which is logged. Errors: UserError.
    """
    found: list[str] = []
    for path in paths:
        if os.path.isdir(path):
            inside = folder_source.images(Path(path), "")
            if not inside:
                kinds = ", ".join(folder_source.EXTENSIONS)
                raise errors.UserError(f"{path} holds no pictures ({kinds})")
            others = sum(len(files) for _, _, files in os.walk(path)) - len(inside)
            if others:
                logging.info("%s: files of other kinds are left out (%d)", path, others)
            found += [os.path.normpath(os.path.join(path, name)) for name in inside]
        elif os.path.exists(path):
            found.append(path)
        else:
            raise errors.UserError(f"{path} is no file or directory")
    return found


def open_network(ckpt: str, *, weights: str = "raw") -> saved.Saved:
    """Open a checkpoint's raw or averaged weights in float32, whatever it was trained in. Errors: UserError."""
    runtime.prepare("float32")
    return saved.open_network(ckpt, precision="float32", weights=weights)


def pictures(opened: saved.Saved, files: Sequence[str], *, top: int) -> list[Prediction]:
    """Return the `top` classes of each file, by the network's fused logits.

    Pictures are read as they are stored: a warning says how many ask to be turned (EXIF).
    """
    names = opened.config.resolved.classes

    @tf.function(autograph=False)
    def probabilities(images):
        return tf.nn.softmax(factory.fused(opened.network.logits(tf.cast(images, tf.float32))))

    shares, readable = [], []
    for part in tqdm.tqdm(
        _batches(opened, files), desc="predicting", unit="batch", delay=2.0, leave=False, disable=None
    ):
        shares.append(probabilities(part["image"]).numpy())
        readable.append(part["weight"].numpy() > 0)
    share, known = np.concatenate(shares)[: len(files)], np.concatenate(readable)[: len(files)]
    order = np.argsort(-share, axis=-1, kind="stable")[:, :top]
    turned = sum(survey.is_turned(file) for file, read in zip(files, known) if read)
    if turned:
        logging.warning("EXIF orientation in %d of %d pictures: they are answered as stored", turned, len(files))
    return [
        Prediction(file, tuple((names[c], float(share[i, c])) for c in order[i]))
        if known[i]
        else Prediction(file, (), _problem(file, opened.config.data.max_pixels))
        for i, file in enumerate(files)
    ]


def _problem(file: str, max_pixels: int) -> str:
    """Return why a picture can't be read."""
    try:
        data = Path(file).read_bytes()
    except OSError as error:
        return error.strerror or str(error)
    return survey.examine(data, max_pixels=max_pixels).problem or "can't be read"


def sheet(opened: saved.Saved, answers: Sequence[Prediction], *, columns: int = 4, most: int = 24) -> np.ndarray:
    """Draw the first `most` pictures as the network saw them, each with its classes: uint8 [H, W, 3]."""
    shown = list(answers[:most])
    seen = np.concatenate([part["image"].numpy() for part in _batches(opened, [answer.file for answer in shown])])
    cells = []
    for image, answer in zip(seen, shown):
        words = [f"{share:.1%} {name}" for name, share in answer.classes] or [f"can't be read: {answer.problem}"]
        cells.append((image, [os.path.basename(answer.file), *words]))
    return drawings.sheet([cells[i : i + columns] for i in range(0, len(cells), columns)], first=1.0)


def _batches(opened: saved.Saved, files: Sequence[str]) -> tf.data.Dataset:
    config = opened.config
    labels = np.zeros(len(files), np.int32)
    source = folder_source.Files(files, labels, classes=config.resolved.classes, max_pixels=config.data.max_pixels)
    return stream.evaluation(source, config, batch=min(config.eval.batch, len(files)))


def logits(opened: saved.Saved, images: np.ndarray, *, raw: bool) -> dict[str, np.ndarray]:
    """Return logits_cls, logits_dist where there is that head, and logits (fused), float32 [N, C] each.

    `images` [N, S, S, 3]: pixels in [0, 255], or with `raw` what the network's normalisation would have made of them.
    Errors: UserError for another shape or values that are not finite.
    """
    size = opened.network.image_size
    if images.ndim != 4 or images.shape[1:] != (size, size, 3) or not len(images):
        raise errors.UserError(f"--array has shape {list(images.shape)}, not [N, {size}, {size}, 3]")
    if images.dtype != np.float32 and (raw or images.dtype != np.uint8):
        raise errors.UserError(f"--array is {images.dtype}, not float32{'' if raw else ' or uint8'}")
    if not np.isfinite(images).all():
        raise errors.UserError("--array holds values that are not finite")
    model = behind_normalisation(opened.network) if raw else opened.network.model
    forward = tf.function(lambda batch: model(batch, training=False), autograph=False)
    step = min(opened.config.eval.batch, len(images))
    parts = []
    for start in tqdm.trange(
        0, len(images), step, desc="predicting", unit="batch", delay=2.0, leave=False, disable=None
    ):
        outputs = forward(tf.constant(images[start : start + step], tf.float32))
        parts.append({name: value.numpy() for name, value in {**outputs, "": factory.fused(outputs)}.items()})
    return {f"logits_{name}" if name else "logits": np.concatenate([part[name] for part in parts]) for name in parts[0]}


def behind_normalisation(network: factory.Network) -> tf.Module:
    """Return the same network as a model of images that are normalised already. Errors: UserError where it has none."""
    layers = {layer.name: layer for layer in network.model.layers}
    if "normalize" not in layers:
        raise errors.UserError(f"--raw: {network.model.name} has no normalisation to leave out")
    return keras.Model(layers["normalize"].output, network.model.output, name=f"{network.model.name}_raw")
