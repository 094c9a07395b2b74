"""What decides a teacher's answers: the fields that a cache is keyed by.

Promises: two configurations with one fingerprint give their teacher the same picture at every position of the stream,
and ask the same of it. What only changes the student (its size, learning rate, loss, model.seed) is not in it; what may
change the last bits of an answer (batch, precision, device) is in `conditions`. Fields are the configuration's, so that
a refusal can name them; the data set is its content's digest, wherever and in whatever form it lies.
"""

from typing import Any

import numpy as np
import PIL
import tensorflow as tf

import deit
from deit import config as configuration
from deit import keras
from deit.data import stream
from deit.teachers import labels


def of(config, *, data_digest: str, identity: str, preprocessing: dict[str, Any]) -> dict[str, Any]:
    """Return the fields that decide the answers at all positions of a resolved configuration.

    `data_digest`: of the training split; `identity`, `preprocessing`: what the teacher is and makes of a picture.
    """
    form = labels.layout(config)
    fields = {
        "stream": stream.VERSION,
        "seed": config.seed,
        "data": data_digest,
        "data.classes": list(config.resolved.classes),
        "data.image_size": config.data.image_size,
        "data.max_pixels": config.data.max_pixels,
        **{f"augment.{name}": value for name, value in configuration.flatten(config.augment)},
        "distill.kind": config.distill.kind,
        "teacher": identity,
        **preprocessing,
    }
    if config.augment.randaugment or config.augment.erasing:  # the student's mean colour fills what is empty
        fields |= {"model.mean": config.model.mean, "model.std": config.model.std}
    if form.kind == "soft":
        fields |= {"teacher.top_k": form.kept, "teacher.logits_dtype": form.dtype}
    return fields


def conditions(config, *, device: str) -> dict[str, Any]:
    """Return how answers are computed here; where it is equal they are equal bit by bit. `device`: its model."""
    return {
        "global_batch": config.global_batch,
        "replicas": config.resolved.replicas,
        "teacher.batch": labels.rows_a_pass(config),
        "teacher.precision": _precision(config),
        "device": device,
        "software": _software(),
    }


def _precision(config) -> str:
    own = config.teacher.precision or config.precision
    if config.teacher.kind == "saved_model":
        own = "as saved" if config.teacher.precision in ("", "float32") else config.teacher.precision
    # TF32 is the process's, whatever the teacher's precision is.
    return f"{own}, tf32" if config.precision == "tf32" != own else own


def _software() -> str:
    """Return the versions of what makes pictures and answers."""
    parts = {"deit": deit, "tensorflow": tf, "keras": keras, "numpy": np, "pillow": PIL}
    return ", ".join(f"{name} {module.__version__}" for name, module in parts.items())


def of_evaluation(config, *, data_digest: str, identity: str, preprocessing: dict[str, Any]) -> dict[str, Any]:
    """Return the fields that decide the teacher's answers on the evaluation split."""
    return {
        "data": data_digest,
        "data.classes": list(config.resolved.classes),
        "data.image_size": config.data.image_size,
        "data.max_pixels": config.data.max_pixels,
        "eval.crop_ratio": config.eval.crop_ratio,
        "eval.batch": config.eval.batch,
        "teacher": identity,
        **preprocessing,
    }
