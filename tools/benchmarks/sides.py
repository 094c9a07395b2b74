"""Processes that are measured in turn: ours, and timm's where torch and timm are installed.

Promises: a process does one measurement and ends, so that its peak memory is its own; the sides alternate, so that what
else the machine does meets both; of every ratio the rounds are shown.
"""

import dataclasses
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tqdm

from deit import errors
from tools import peer_packages

PEER = Path(__file__).with_name("timm_update.py")
_PRECISIONS = {"float32": "fp32", "mixed_bfloat16": "bf16"}


@dataclasses.dataclass(frozen=True)
class Side:
    """A process to run: its command, and environment variables of its own."""

    command: tuple[str, ...]
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)


def alternate(sides: Mapping[str, Side], *, rounds: int, said: str) -> dict[str, list[dict[str, Any]]]:
    """Run every side `rounds` times in turn; return what each printed as JSON in its last line.

    Errors: UserError with the last line of a process that failed.
    """
    found: dict[str, list[dict]] = {name: [] for name in sides}
    with tqdm.tqdm(total=rounds * len(sides), desc=said, unit="process", disable=None) as bar:
        for _ in range(rounds):
            for name, side in sides.items():
                found[name].append(_run(name, side))
                bar.update()
    return found


def _run(name: str, side: Side) -> dict[str, Any]:
    done = subprocess.run(
        side.command, capture_output=True, text=True, check=False, env={**os.environ, **side.environment}
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise errors.UserError(f"the measurement of {name} ended with exit code {done.returncode}: {last}")
    return json.loads(done.stdout.splitlines()[-1])


def peer(config, what: str, size: int) -> Side | None:
    """Return timm's side of `what`, train or eval, None where it is not installed or has no such network."""
    if peer_packages.missing(("torch", "torchvision", "timm")) or config.precision not in _PRECISIONS:
        return None
    if not config.model.variant.startswith("deit_") or "micro" in config.model.variant:
        return None
    fields = {
        "model": config.model.variant.partition(".")[0],
        "precision": _PRECISIONS[config.precision],
        "batch": size,
        "size": config.data.image_size,
    }
    flags = [f"--{name}={value}" for name, value in fields.items()]
    return Side((sys.executable, str(PEER), what, *flags))


def summary(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the median images/s and peak MB of a side's rounds, and the images/s of each."""
    rates = [run["images_per_sec"] for run in runs]
    return {
        "images_per_sec": statistics.median(rates),
        "rounds": rates,
        "peak_mb": statistics.median(run["peak_mb"] for run in runs),
    }


def compare(config, what: str, size: int, *, command: Sequence[str], rounds: int, said: str) -> dict[str, Any]:
    """Measure ours, `command WORD SIZE`, in turn with timm's; return `summary` of each side, and their ratios.

    `what`: train or eval. Ratios are of the medians; `rounds` are those of each round, side by side.
    """
    word = {"train": "update", "eval": "evaluate"}[what]
    sides = {"ours": Side((*command, word, str(size)))}
    theirs = peer(config, what, size)
    if theirs is not None:
        sides["timm"] = theirs
    runs = alternate(sides, rounds=rounds, said=said)
    found: dict[str, Any] = {name: summary(each) for name, each in runs.items()}
    found["startup"] = {
        part: statistics.median(run["startup"][part] for run in runs["ours"])
        for part in runs["ours"][0].get("startup", ())
    }
    if theirs is not None:
        ours, other = found["ours"], found["timm"]
        found["ratio"] = {
            "images_per_sec": ours["images_per_sec"] / other["images_per_sec"],
            "rounds": [a / b for a, b in zip(ours["rounds"], other["rounds"])],
            "peak_mb": ours["peak_mb"] / other["peak_mb"],
        }
    return found


def examined(*, command: Sequence[str], size: int) -> dict[str, Any]:
    """Return floor_seconds and groups of an update, its images/s beside them: in a process of its own.

    One kernel runs at a time there, each with all threads: else the kernels' times overlap.
    """
    (found,) = alternate(
        {"profile": Side((*command, "examine", str(size)), {"TF_NUM_INTEROP_THREADS": "1"})}, rounds=1, said="profile"
    )["profile"]
    return found
