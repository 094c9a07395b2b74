"""Show what is in a run's checkpoints, whether they are whole, and where two states differ.

python tools/inspect_checkpoint.py --ckpt=RUN|CHECKPOINT [--against=RUN|CHECKPOINT [--require_equal]] [--json=FILE]

Exit code 0 where everything verifies, 1 where a checkpoint is damaged or can't be read. Two states that differ are a
result, not an error, unless --require_equal is given.
"""

import contextlib
import json
import math
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import safetensors
import tqdm
from absl import flags

from configs import base
from deit import checkpoint, cli, errors
from deit import config as configuration
from deit import workdir as run_directory
from tools import checkpoint_tables

CKPT = flags.DEFINE_string("ckpt", None, "A run directory (all its checkpoints) or one checkpoint.", required=True)
AGAINST = flags.DEFINE_string("against", None, "A run (its newest checkpoint) or a checkpoint to compare with.")
REQUIRE_EQUAL = flags.DEFINE_bool("require_equal", False, "Exit 1 where --ckpt and --against are different states.")
JSON = flags.DEFINE_string("json", None, "Also write the facts to this file.")

GROUPS = ("student", "ema", "optimizer")  # first parts of a tensor's path; what has no path is a counter
_HALF_DONE = {"tmp-removed-": "removal half done", "tmp-": "save half done or under way"}


def main(_) -> int:
    """Print the facts of --ckpt, or its comparison with --against."""
    if JSON.value and (Path(JSON.value).is_dir() or not Path(JSON.value).absolute().parent.is_dir()):
        raise errors.UserError(f"--json ({JSON.value}) must be a file in an existing directory")
    if REQUIRE_EQUAL.value and not AGAINST.value:
        raise errors.UserError("--require_equal needs --against=RUN or CHECKPOINT")
    if AGAINST.value:
        facts = compare(checkpoint.locate(CKPT.value), checkpoint.locate(AGAINST.value))
        text, problem = checkpoint_tables.comparison(facts), ""
        if REQUIRE_EQUAL.value and not facts["equal"]:
            problem = f"--require_equal: {facts['checkpoint']} and {facts['against']} are different states"
    else:
        facts = inspect(run_directory.check_workdir(CKPT.value))
        text, problem = checkpoint_tables.inspection(facts), _problem(facts)
    print(text)
    if JSON.value:
        Path(JSON.value).write_text(json.dumps(facts, indent=2, allow_nan=False) + "\n")
    if problem:
        raise errors.UserError(problem)
    return 0


def inspect(path: Path) -> dict:
    """Return the facts of a run, {run, checkpoints: [row]}, or of one checkpoint, with its tensors and versions."""
    one = path.name.startswith(("step-", "corrupt-", "tmp-")) or (path / checkpoint.MANIFEST).is_file()
    if one and path.is_dir():
        row = _row(path)
        if path.parent.name == "checkpoints":
            row["kept"] = _kept(path.parent).get(path)
        facts = {"checkpoint": str(path), "checkpoints": [row]}
        if row["status"] == "verified":
            manifest = checkpoint.manifest(path)
            facts |= {"metrics": manifest["metrics"], "versions": manifest["versions"], **_contents(path)}
            facts |= {"source": manifest["source"]} if "source" in manifest else {}
        return facts
    directory = path if path.name == "checkpoints" else path / "checkpoints"
    if not directory.is_dir():
        checkpoint.locate(path)  # says what the path is not
        raise errors.UserError(f"{path} has no checkpoint yet")
    listed = sorted(directory.iterdir(), key=lambda entry: entry.name)
    found = sorted(checkpoint.committed(directory), key=checkpoint.step_of)
    found += [entry for entry in listed if entry.name.startswith(("corrupt-", "tmp-"))]
    if not found:
        raise errors.UserError(f"{path} has no checkpoint yet")
    bar = tqdm.tqdm(found, unit="checkpoint", delay=1.0, leave=False, disable=not sys.stderr.isatty())
    rows = {entry: _row(entry) for entry in bar}
    rows = {entry: row for entry, row in rows.items() if entry.exists()}  # a run under way may have removed it
    for entry, why in _kept(directory).items():
        if entry in rows:
            rows[entry]["kept"] = why
    return {"run": str(directory.parent), "checkpoints": list(rows.values())}


def compare(ours: Path, theirs: Path) -> dict:
    """Return where two verified checkpoints differ, in their tensors and in their configurations."""
    manifests = [checkpoint.manifest(path) for path in (ours, theirs)]
    digests = [manifest["state_sha256"] for manifest in manifests]
    facts = {
        "checkpoint": str(ours),
        "against": str(theirs),
        "steps": [manifest["step"] for manifest in manifests],
        "state_sha256": digests,
        "equal": digests[0] == digests[1],
        "config": _config_differences(*(json.loads(checkpoint.read_config(path)) for path in (ours, theirs))),
    }
    with _tensors(ours) as mine, _tensors(theirs) as others:
        names, other_names = set(mine.keys()), set(others.keys())
        both = sorted(names & other_names)
        differ, forms = [], []
        bar = tqdm.tqdm(both, unit="tensor", delay=1.0, leave=False, disable=not sys.stderr.isatty())
        for name in bar if not facts["equal"] else ():
            a, b = mine.get_tensor(name), others.get_tensor(name)
            if (a.dtype, a.shape) != (b.dtype, b.shape):
                forms.append({"tensor": name, "ours": _form(a), "theirs": _form(b)})
            elif a.tobytes() != b.tobytes():
                differ.append({"tensor": name, **_difference(a, b)})
    # What is not finite on one side comes first.
    differ.sort(key=lambda row: -math.inf if row["relative"] is None else -row["relative"])
    return facts | {
        "tensors": len(both),
        "only_ours": sorted(names - other_names),
        "only_theirs": sorted(other_names - names),
        "other_form": forms,
        "differ": differ,
    }


def _problem(facts: dict) -> str:
    """Return the line for a run or checkpoint that is not whole, "" where it is; what was set aside is known."""
    rows = facts["checkpoints"]
    if "run" in facts:
        rows = [row for row in rows if row["name"].startswith("step-")]
    bad = [f"checkpoint {row['name']} is damaged: {row['status']}" for row in rows if row["status"] != "verified"]
    return "; ".join(bad) if rows else "no checkpoint is whole"


def _row(path: Path) -> dict:
    """Return the facts of one directory; `kept` None: nothing that a run keeps or removes."""
    row: dict[str, Any] = {"name": path.name, "step": None, "bytes": 0, "created": None, checkpoint.BEST: None}
    row |= {"kept": None, "state_sha256": None}
    if path.name.startswith("tmp-"):
        row["status"] = next(text for start, text in _HALF_DONE.items() if path.name.startswith(start))
    else:
        row["status"] = checkpoint.verify(path) or "verified"
    if path.name.startswith("corrupt-"):
        row["status"] = f"set aside: {row['status']}"
    with contextlib.suppress(OSError):
        row["bytes"] = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    if digits := re.search(r"-(\d{8,})", path.name):
        row["step"] = int(digits[1])
    if row["status"] == "verified":
        with contextlib.suppress(errors.UserError):  # removed since
            manifest = checkpoint.manifest(path)
            row |= {name: manifest[name] for name in ("step", "created", "state_sha256")}
            row[checkpoint.BEST] = manifest["metrics"].get(checkpoint.BEST)
    return row


def _kept(directory: Path) -> dict[Path, list[str]]:
    """Return why each checkpoint of a run is kept, by the newest configuration that can be read."""
    keep, keep_every = 1, 0
    for place in [*checkpoint.committed(directory), directory.parent]:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            fields = json.loads((place / checkpoint.CONFIG).read_text(encoding="utf-8"))["checkpoint"]
            keep, keep_every = int(fields["keep"]), int(fields.get("keep_every", 0))
            break
    return checkpoint.kept_for(directory, keep=keep, keep_every=keep_every)


@contextlib.contextmanager
def _tensors(path: Path) -> Iterator[Any]:
    """Open a verified checkpoint's tensors, to be read one by one."""
    try:
        with safetensors.safe_open(path / checkpoint.TENSORS, framework="np") as file:
            yield file
    except (safetensors.SafetensorError, OSError) as error:
        raise errors.UserError(f"checkpoint {path} can't be read: {error}") from error


def _contents(path: Path) -> dict:
    """Return {groups: {name: numbers}, counters: {name: value}} of a checkpoint's tensors."""
    groups, counters = {}, {}
    with _tensors(path) as file:
        for name in file.keys():  # noqa: SIM118  no mapping
            array = file.get_tensor(name)
            start = name.partition("/")[0]
            group = groups.setdefault(
                start if start in GROUPS and start != name else "counters",
                {"tensors": 0, "elements": 0, "bytes": 0, "min": None, "max": None, "not_finite": 0},
            )
            finite = array[np.isfinite(array)]
            group["tensors"] += 1
            group["elements"] += array.size
            group["bytes"] += array.nbytes
            group["not_finite"] += array.size - finite.size
            if finite.size and array.dtype.kind not in "biu":  # a counter is no weight
                low, high = float(finite.min()), float(finite.max())
                group["min"] = low if group["min"] is None else min(group["min"], low)
                group["max"] = high if group["max"] is None else max(group["max"], high)
            if "/" not in name and array.size == 1:
                counters[name] = array.item() if np.isfinite(array).all() else None
    order = [*GROUPS, "counters"]
    return {"groups": {name: groups[name] for name in order if name in groups}, "counters": counters}


def _difference(a: np.ndarray, b: np.ndarray) -> dict:
    """Return the largest difference, its part of the largest absolute value, and how many elements differ.

    None stands for a difference that is no number: where one side is not finite.
    """
    a, b = a.astype(np.float64), b.astype(np.float64)
    with np.errstate(invalid="ignore"):
        largest = float(np.abs(a - b).max())
        scale = float(max(np.abs(a).max(), np.abs(b).max()))
    elements = int(np.count_nonzero(a != b))
    if not math.isfinite(largest):
        return {"largest": None, "relative": None, "elements": elements}
    return {"largest": largest, "relative": largest / scale if scale else 0.0, "elements": elements}


def _config_differences(ours: dict, theirs: dict) -> list[dict]:
    """Return every field that differs; `result`: whether it changes what is computed, None where nobody can say."""
    a, b = (dict(_leaves(config)) for config in (ours, theirs))
    try:
        parsed = [configuration.from_json(json.dumps(config), base.get_config()) for config in (ours, theirs)]
        changing = {line.partition(": ")[0] for line in configuration.difference(*parsed)}
    except errors.UserError:  # written by another version
        changing = None
    return [
        {
            "field": name,
            "ours": a.get(name, "absent"),
            "theirs": b.get(name, "absent"),
            "result": None if changing is None else name in changing,
        }
        for name in sorted(a.keys() | b.keys())
        if a.get(name, "absent") != b.get(name, "absent")
    ]


def _leaves(config: dict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in config.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _form(array: np.ndarray) -> str:
    return f"{array.dtype.name} {list(array.shape)}"


if __name__ == "__main__":
    cli.run(main)
