"""A checkpoint opened as a network: what evaluation, prediction and a teacher of ours start from.

Promises: the configuration beside the tensors decides everything; a tensor missing, left over or of another
shape is refused by name.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
from ml_collections import ConfigDict

from configs import base
from deit import checkpoint, errors
from deit import config as configuration
from deit.models import factory, paths


@dataclasses.dataclass(frozen=True)
class Contents:
    """What a checkpoint holds.

    Attributes:
      path: the checkpoint.
      config: the run's, `resolved` included.
      tensors: by path.
      manifest: as `checkpoint` has it.
    """

    path: Path
    config: ConfigDict
    tensors: dict[str, np.ndarray]
    manifest: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Saved:
    """A network with the weights of a checkpoint.

    Attributes:
      config: the run's, `resolved` included.
      network: the student; `tensors` holds the EMA's as `ema/<own path>`.
      step: finished updates.
      state_sha256: of all its tensors, as its manifest has it.
      path: the checkpoint.
      run: the run directory around it (RUN/checkpoints/step-N); the checkpoint itself where it is in none.
      metrics: of the evaluation at that update; empty where there was none.
    """

    config: ConfigDict
    network: factory.Network
    tensors: dict[str, np.ndarray]
    step: int
    state_sha256: str
    path: Path
    run: Path
    metrics: dict[str, float]


def config_of(path: str | Path) -> ConfigDict:
    """Return the configuration beside the newest checkpoint of a run directory, or beside one checkpoint."""
    return config_beside(checkpoint.locate(path))


def config_beside(where: Path) -> ConfigDict:
    """Return the configuration of a checkpoint that `checkpoint.locate` has verified; hashes nothing again."""
    try:
        return configuration.from_json((where / checkpoint.CONFIG).read_text(encoding="utf-8"), base.get_config())
    except (OSError, ValueError) as error:  # it was whole a moment ago
        raise errors.UserError(f"checkpoint {where} can't be read: {error}") from error


def contents(path: str | Path) -> Contents:
    """Return all that the newest checkpoint of a run directory holds, or one checkpoint, whose files are hashed once.

    Errors: UserError.
    """
    where = checkpoint.locate(path)  # verifies
    config = config_beside(where)
    try:
        tensors = safetensors.numpy.load_file(where / checkpoint.TENSORS)
        manifest = json.loads((where / checkpoint.MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError, safetensors.SafetensorError) as error:  # it was whole a moment ago
        raise errors.UserError(f"checkpoint {where} can't be read: {error}") from error
    return Contents(where, config, tensors, manifest)


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
    found = contents(path)
    config = found.config
    if not config.resolved.classes:
        raise errors.UserError(f"{found.path} has no classifier (it was dropped): it is for init_from")
    model = ConfigDict(configuration.plain(config.model))
    network = factory.build(
        model,
        num_classes=len(config.resolved.classes),
        image_size=config.data.image_size,
        precision=precision or config.precision,
        load_weights=False,  # a backbone's come from the checkpoint, not from its first weights file
    )
    paths.assign(paths.variables(network.model), student(found.tensors, weights, found.path))
    return Saved(
        config=config,
        network=network,
        tensors=found.tensors,
        step=found.manifest["step"],
        state_sha256=found.manifest["state_sha256"],
        path=found.path,
        run=found.path.parent.parent if found.path.parent.name == "checkpoints" else found.path,
        metrics=found.manifest["metrics"],
    )
