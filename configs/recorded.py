"""Repeat a recorded run: `--config=runs/NAME/config.json` is read through this file."""

from pathlib import Path

from ml_collections import ConfigDict

from configs import base
from deit import config as configuration


def get_config(path: str) -> ConfigDict:
    """Return the configuration of a config.json, what was resolved from it left out."""
    recorded = configuration.read(Path(path), base.get_config())
    with recorded.unlocked():
        if "resolved" in recorded:
            del recorded["resolved"]
    return recorded
