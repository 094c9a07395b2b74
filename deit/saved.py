"""A checkpoint opened as a network: what evaluation, prediction and a teacher of ours start from.

Promises: the configuration beside the tensors decides everything; a tensor missing, left over or of another
shape is refused by name.
"""

import dataclasses
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from configs import base
from deit import checkpoint
from deit import config as configuration
from deit.models import factory, paths


@dataclasses.dataclass(frozen=True)
class Saved:
    """A network with the weights of a checkpoint.

    Attributes:
      config: the run's, `resolved` included.
      network: the student with its raw weights; `tensors` holds the EMA's as `ema/<own path>`.
      step: finished updates.
      run: the run directory around the checkpoint (RUN/checkpoints/step-N).
      metrics: of the evaluation at that update; empty where there was none.
    """

    config: ConfigDict
    network: factory.Network
    tensors: dict[str, np.ndarray]
    step: int
    run: Path
    metrics: dict[str, float]


def open_network(path: str | Path, *, precision: str = "") -> Saved:
    """Open the newest checkpoint of a run directory, or one checkpoint; `precision` replaces the run's own."""
    where = checkpoint.locate(path)
    config = configuration.from_json(checkpoint.read_config(where), base.get_config())
    tensors, manifest = checkpoint.read(where)
    model = ConfigDict(configuration.plain(config.model))
    network = factory.build(
        model,
        num_classes=len(config.resolved.classes),
        image_size=config.data.image_size,
        precision=precision or config.precision,
        load_weights=False,  # a backbone's come from the checkpoint, not from its first weights file
    )
    student = [(f"student/{path}", variable) for path, variable in paths.variables(network.model)]
    paths.assign(student, {name: value for name, value in tensors.items() if name.startswith("student/")})
    return Saved(config, network, tensors, manifest["step"], where.parent.parent, manifest["metrics"])
