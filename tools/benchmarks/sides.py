"""Processes that are measured in turn: ours, and timm's where torch and timm are installed.

Promises: a process does one measurement and ends, so that its peak memory is its own; the sides alternate, so that what
else the machine does meets both; of every ratio the rounds are shown.
"""

import dataclasses
import json
import os
import signal
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


class Failed(errors.UserError):
    """A process that measured nothing: `side` is its name."""

    def __init__(self, side: str, what: str) -> None:
        super().__init__(f"the measurement of {side} {what}")
        self.side = side


@dataclasses.dataclass(frozen=True)
class Side:
    """A process to run: its command, and environment variables of its own."""

    command: tuple[str, ...]
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)


def alternate(sides: Mapping[str, Side], *, rounds: int, said: str) -> dict[str, list[dict[str, Any]]]:
    """Run every side `rounds` times in turn, each round in the other order; return what each printed as JSON last.

    Errors: Failed with the last line of a process that failed, or the signal that ended it.
    """
    found: dict[str, list[dict]] = {name: [] for name in sides}
    with tqdm.tqdm(total=rounds * len(sides), desc=said, unit="process", disable=None) as bar:
        for turn in range(rounds):
            for name in list(sides)[:: -1 if turn % 2 else 1]:
                found[name].append(_run(name, sides[name]))
                bar.update()
    return found


def _run(name: str, side: Side) -> dict[str, Any]:
    done = subprocess.run(
        side.command, capture_output=True, text=True, check=False, env={**os.environ, **side.environment}
    )
    if done.returncode < 0:
        why = "; is there too little memory?" if done.returncode == -signal.SIGKILL else ""
        raise Failed(name, f"was ended by {signal.Signals(-done.returncode).name}{why}")
    if done.returncode or not done.stdout.strip():
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise Failed(name, f"ended with exit code {done.returncode}: {last}")
    try:
        return json.loads(done.stdout.splitlines()[-1])
    except ValueError:
        raise Failed(name, f"ended with a line that is no JSON: {done.stdout.splitlines()[-1]}") from None


def peer(config, what: str, size: int) -> Side | str:
    """Return timm's side of `what`, train or eval, or why it can't be compared: the field, its value, the rule."""
    model = config.model
    missing = peer_packages.missing(("torch", "torchvision", "timm"))
    if missing:
        return f"{', '.join(missing)} not installed (make peers)"
    if config.precision not in _PRECISIONS:
        return f"precision ({config.precision}) must be one of {', '.join(_PRECISIONS)}"
    if not model.variant.startswith("deit_") or "micro" in model.variant:
        return f"model.variant ({model.variant}) must be one of timm's deit_*"
    for name, value in (("patch", 0), ("registers", 0), ("heads", "all")):
        if model[name] != value:
            return f"model.{name} ({model[name]}) must be {value}"
    if what == "train" and "_distilled_" not in model.variant:
        return f"model.variant ({model.variant}) must be a distilled one"
    if what == "train" and config.distill.kind != "hard":
        return f"distill.kind ({config.distill.kind}) must be hard"
    fields = {
        "model": model.variant.partition(".")[0],
        "precision": _PRECISIONS[config.precision],
        "batch": size,
        "size": config.data.image_size,
        "drop_path": model.drop_path,
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


def beside(
    ours: Mapping[str, Side], theirs: Side | str, *, rounds: int, said: str
) -> tuple[dict[str, list[dict[str, Any]]], str]:
    """Return what `alternate` finds of our sides and of timm's, and why timm's is not there, "" where it is."""
    if isinstance(theirs, str):
        return alternate(ours, rounds=rounds, said=said), theirs
    try:
        return alternate({**ours, "timm": theirs}, rounds=rounds, said=said), ""
    except Failed as error:
        if error.side != "timm":
            raise
        return alternate(ours, rounds=rounds, said=said), str(error)


def compare(config, what: str, size: int, *, command: Sequence[str], rounds: int) -> dict[str, Any]:
    """Measure ours, `command WORD SIZE`, in turn with timm's.

    `what`: train or eval. Returns runs (ours), `summary` of each side, and ratio: its median over the rounds, those of
    each round, and of the peaks; or unmatched, why there is no other side.
    """
    ours = {"ours": Side((*command, {"train": "floor", "eval": "evaluate"}[what], str(size)))}
    said = f"{what} {config.model.variant} {config.precision}"
    runs, unmatched = beside(ours, peer(config, what, size), rounds=rounds, said=said)
    found: dict[str, Any] = {"runs": runs["ours"], **{name: summary(each) for name, each in runs.items()}}
    if unmatched:
        return {**found, "unmatched": unmatched}
    ours, other = found["ours"], found["timm"]
    ratios = [a / b for a, b in zip(ours["rounds"], other["rounds"])]
    versions = {name: runs["timm"][0][name] for name in ("torch", "timm")}
    found["ratio"] = {
        "images_per_sec": statistics.median(ratios),
        "rounds": ratios,
        "peak_mb": ours["peak_mb"] / other["peak_mb"],
    }
    return {**found, "versions": versions}


def profiled(*, command: Sequence[str], size: int) -> dict[str, float]:
    """Return the seconds by kind of operation of an update: in a process of its own.

    One kernel runs at a time there, each with all threads: else the kernels' times overlap.
    """
    one = {"profile": Side((*command, "groups", str(size)), {"TF_NUM_INTEROP_THREADS": "1"})}
    (found,) = alternate(one, rounds=1, said="profile")["profile"]
    return found["groups"]
