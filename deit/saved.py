"""A checkpoint opened as a network: what evaluation, prediction and a teacher of ours start from.

Promises: the configuration beside the tensors decides everything; a tensor missing, left over or of another
shape is refused by name.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from configs import base
from deit import checkpoint, errors
from deit import config as configuration
from deit.models import factory, paths


@dataclasses.dataclass(frozen=True)
class Saved:
    """A network with the weights of a checkpoint.

    Attributes:
      config: the run's, `resolved` included.
      network: the student; `tensors` holds the EMA's as `ema/<own path>`.
      step: finished updates.
      state_sha256: of all its tensors, as its manifest has it.
      run: the run directory around the checkpoint (RUN/checkpoints/step-N).
      metrics: of the evaluation at that update; empty where there was none.
    """

    config: ConfigDict
    network: factory.Network
    tensors: dict[str, np.ndarray]
    step: int
    state_sha256: str
    run: Path
    metrics: dict[str, float]


def config_of(path: str | Path) -> ConfigDict:
    """Return the configuration beside the newest checkpoint of a run directory, or beside one checkpoint."""
    return configuration.from_json(checkpoint.read_config(checkpoint.locate(path)), base.get_config())


def student(tensors: Mapping[str, np.ndarray], which: str, path: Path) -> dict[str, np.ndarray]:
    """Return the student's tensors of a checkpoint by own path: `raw`, or with the averages in their place, `ema`.

    Errors: UserError naming `path` where it has no averages.
    """
    own = {name.removeprefix("student/"): value for name, value in tensors.items() if name.startswith("student/")}
    averages = {name.removeprefix("ema/"): value for name, value in tensors.items() if name.startswith("ema/")}
    if which == "ema" and not averages:
        raise errors.UserError(f"{path} has no averages (EMA): only its raw weights can be taken")
    return {**own, **averages} if which == "ema" else own


def open_network(path: str | Path, *, precision: str = "", weights: str = "raw") -> Saved:
    """Open the newest checkpoint of a run directory, or one checkpoint; `precision` replaces the run's own.

    `weights`: raw or ema. Errors: UserError.
    """
    where = checkpoint.locate(path)
    config = config_of(where)
    if not config.resolved.classes:
        raise errors.UserError(f"{where} has no classifier (it was dropped): it is for init_from")
    tensors, manifest = checkpoint.read(where)
    model = ConfigDict(configuration.plain(config.model))
    network = factory.build(
        model,
        num_classes=len(config.resolved.classes),
        image_size=config.data.image_size,
        precision=precision or config.precision,
        load_weights=False,  # a backbone's come from the checkpoint, not from its first weights file
    )
    paths.assign(paths.variables(network.model), student(tensors, weights, where))
    return Saved(
        config=config,
        network=network,
        tensors=tensors,
        step=manifest["step"],
        state_sha256=manifest["state_sha256"],
        run=where.parent.parent,
        metrics=manifest["metrics"],
    )
