"""A checkpoint opened as a network: what evaluation, prediction and a teacher of ours start from.

Promises: the configuration beside the tensors decides everything; a tensor missing, left over or of another
shape is refused by name.
"""

import dataclasses
from pathlib import Path
from typing import Any

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
      network: the student with its raw weights; `tensors` holds the EMA's as `ema/<own path>`.
      step: finished updates.
      metrics: of the evaluation at that update; empty where there was none.
    """

    config: ConfigDict
    network: factory.Network
    tensors: dict[str, np.ndarray]
    step: int
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
    assign(paths.variables(network.model), tensors, "student")
    return Saved(config, network, tensors, manifest["step"], manifest["metrics"])


def assign(variables: list[tuple[str, Any]], tensors: dict[str, np.ndarray], kind: str) -> None:
    """Assign the tensors `<kind>/<own path>` to (own path, variable). Errors: UserError listing what does not fit."""
    wanted = {f"{kind}/{path}": variable for path, variable in variables}
    given = {name for name in tensors if name.startswith(f"{kind}/")}
    problems = [f"missing {name}" for name in sorted(wanted.keys() - given)]
    problems += [f"left over {name}" for name in sorted(given - wanted.keys())]
    for name in sorted(wanted.keys() & given):
        have, want = tuple(tensors[name].shape), tuple(wanted[name].shape)
        if have != want:
            problems.append(f"{name} is {have}, not {want}")
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise errors.UserError("the checkpoint does not fit this model: " + "; ".join(problems[:5]) + more)
    for name, variable in wanted.items():
        variable.assign(tensors[name])
