"""Small checkpoints for the tests of conversion, prediction and fine-tuning."""

from pathlib import Path

import numpy as np

from configs import base
from deit import commit
from deit import config as configuration
from deit.models import factory, paths


def checkpoint(
    where: Path, variant: str = "deit_micro_distilled_patch8_32", *, size: int = 32, classes=("a", "b", "c"),
    ema: bool = False, seed: int = 1, crop_ratio: float = 1.0, change=lambda config: None, **fields,
) -> Path:  # fmt: skip
    """Write a checkpoint whose every tensor has values of its own, and return its directory.

    `fields`: of `config.model`; `change` may alter the whole configuration.
    """
    c = base.get_config()
    c.model.variant, c.data.image_size, c.eval.crop_ratio = variant, size, crop_ratio
    for name, value in fields.items():
        c.model[name] = value
    change(c)
    network = factory.build(c.model, num_classes=len(classes), image_size=size, precision="float32", load_weights=False)
    random = np.random.default_rng(seed)
    tensors = {}
    for path, variable in paths.variables(network.model):
        value = random.normal(0, 0.1, variable.shape) + path.endswith("gamma")
        tensors[f"student/{path}"] = value.astype(np.float32)
        if ema:
            tensors[f"ema/{path}"] = (value * 0.5).astype(np.float32)
    resolved = configuration.resolve(c, train_size=256, eval_size=10, classes=classes, replicas=1)
    commit.commit(
        where,
        tensors,
        step=7,
        config_json=configuration.to_json(resolved),
        metrics={},
        versions={"deit": "0"},
    )
    return where
