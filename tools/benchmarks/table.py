"""The set: what speed and memory are judged by, in one table with the ratios to timm of the same run.

Promises: a row that could not be measured says why; nothing is taken from an earlier run.
"""

import datetime
import functools
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from deit import errors, estimates, summaries
from tools.benchmarks import sides, speed, update

_PRECISIONS = ("float32", "mixed_bfloat16")
_VARIANTS = ("deit_tiny_distilled_patch16_224", "deit_small_distilled_patch16_224")


def measure(config, *, rounds: int, command: Sequence[str], out: Path | None = None) -> dict[str, Any]:
    """Measure all rows; write the Markdown table to `out`, where it is named, after each of them."""
    cases = [(v, p, [f"--config.model.variant={v}", f"--config.precision={p}"]) for v in _VARIANTS for p in _PRECISIONS]
    parts: dict[str, Callable[[], Any]] = {}
    for variant, precision, flags in cases:
        own = update.copy_of(config, {"model.variant": variant, "precision": precision})
        wanted = {"rounds": rounds, "command": [*command, *flags]}
        parts[f"train {variant} {precision}"] = functools.partial(speed.train, own, **wanted)
        parts[f"eval {variant} {precision}"] = functools.partial(speed.evaluation, own, **wanted)
    parts["accumulate"] = functools.partial(speed.accumulate, config, rounds=rounds, command=command)
    parts["startup"] = functools.partial(speed.startup, config, rounds=rounds, command=command)
    parts["optimizer"] = functools.partial(optimizer, config, command)
    parts["checkpoint"] = functools.partial(checkpoint, config, command)
    result: dict[str, Any] = {"machine": estimates.fingerprint(), "date": datetime.date.today().isoformat()}
    result["rounds"] = rounds
    for name, part in parts.items():
        try:
            result[name] = part()
        except errors.UserError as error:
            result[name] = {"missing": str(error)}
        if out:
            out.write_text("\n".join(markdown(result)) + "\n", encoding="utf-8")
    return result


def optimizer(config, command: Sequence[str]) -> dict[str, float]:
    """Return seconds of optimizer, averages, clipping and guard in an update, and of a log step's line."""
    groups = sides.profiled(command=[*command, "--config.optim.clip_norm=1.0"], size=config.micro_batch)
    return {"seconds": groups.get("optimizer", 0.0), "log_seconds": log_seconds()}


def log_seconds(lines: int = 50) -> float:
    """Return how long a log step's line takes: to metrics.jsonl and to TensorBoard's file, the mean of `lines`."""
    with tempfile.TemporaryDirectory(prefix="deit-benchmark-") as directory:
        writer = summaries.Summaries(directory, start_step=0)
        started = time.perf_counter()
        for step in range(1, lines + 1):
            writer.scalars(step, {f"train/metric{i}": float(i) for i in range(8)})
        spent = (time.perf_counter() - started) / lines
        writer.close()
    return spent


def checkpoint(config, command: Sequence[str]) -> dict[str, float]:
    """Return for how many seconds a checkpoint stops the loop, and how many updates lie between two.

    Errors: UserError where the configured data is not there.
    """
    one = {"checkpoint": sides.Side((*command, "--json", "checkpoint"))}
    (found,) = sides.alternate(one, rounds=1, said="checkpoint")["checkpoint"]
    return {"seconds": found["stop_seconds"], "every_updates": config.checkpoint.every_updates}


def markdown(result: dict[str, Any]) -> list[str]:
    """Return the table, and the lines below it."""
    rows = [
        "| what | ours, images/s | timm | ratio (rounds) | memory, MB | timm | ratio | of its floor |",
        "|---" * 8 + "|",
        *(_row(name, found) for name, found in result.items() if name.startswith(("train ", "eval "))),
    ]
    versions = next((found["versions"] for name, found in result.items() if " " in name and "versions" in found), {})
    said = ", ".join([result["machine"], *(f"{name} {version}" for name, version in versions.items())])
    return [f"{said}; {result['date']}, {result['rounds']} rounds.", "", *rows, "", *(f"- {x}" for x in below(result))]


def _row(name: str, found: dict[str, Any]) -> str:
    if "missing" in found:
        return f"| {name} | not measured: {found['missing'].replace('|', '/')} |{' |' * 6}"
    ours, theirs, ratio = found["ours"], found.get("timm"), found.get("ratio")
    cells = [
        f"{name}, {found['batch']}",
        f"{ours['images_per_sec']:.2f}",
        f"{theirs['images_per_sec']:.2f}" if theirs else found["unmatched"],
        f"**{ratio['images_per_sec']:.2f}** ({min(ratio['rounds']):.2f} to {max(ratio['rounds']):.2f})"
        if ratio
        else "",
        f"{ours['peak_mb']:.0f}",
        f"{theirs['peak_mb']:.0f}" if theirs else "",
        f"{ratio['peak_mb']:.2f}" if ratio else "",
        f"{found['floor_fraction']:.3f}" if "floor_fraction" in found else "",
    ]
    return f"| {' | '.join(cells)} |"


def below(result: dict[str, Any]) -> list[str]:
    """Return a line for each measurement that is no row of the table, as far as it is done."""
    lines, whole = [], result.get("accumulate", {})
    for name in ("accumulate", "startup", "optimizer", "checkpoint"):
        found = result.get(name)
        if found is not None:
            lines.append(
                f"{name} not measured: {found['missing']}" if "missing" in found else _LINES[name](found, whole)
            )
    return lines


def _accumulate_line(found: dict[str, Any], whole: dict[str, Any]) -> str:
    least, most = min(found["ratio_rounds"]), max(found["ratio_rounds"])
    return (
        f"{found['global_batch']} as micro-batches of {found['micro_batch']}: {found['speed_ratio']:.3f} of the single "
        f"update's rate ({least:.2f} to {most:.2f}), {found['memory_ratio']:.2f} times its memory"
    )


def _startup_line(found: dict[str, Any], whole: dict[str, Any]) -> str:
    parts = ", ".join(f"{part} {seconds:.2f}" for part, seconds in found["seconds"].items())
    return f"first update of {found['batch']} done after {found['total']:.2f} s: {parts}"


def _optimizer_line(found: dict[str, Any], whole: dict[str, Any]) -> str:
    return (
        f"optimizer, EMA, clipping, guard: {found['seconds'] * 1e3:.1f} ms of kernels{_of(found['seconds'], whole)}; "
        f"a log line: {found['log_seconds'] * 1e3:.2f} ms{_of(found['log_seconds'], whole)}"
    )


def _checkpoint_line(found: dict[str, Any], whole: dict[str, Any]) -> str:
    stops = f"a checkpoint stops the loop for {found['seconds'] * 1e3:.0f} ms"
    every = found["every_updates"]
    return (
        f"{stops}{_of(found['seconds'] / every, whole)} every {every} updates"
        if every
        else f"{stops}, at the end alone"
    )


def _of(seconds: float, whole: dict[str, Any]) -> str:
    """Return which part of a whole update `seconds` are, where that was measured."""
    if "images_per_sec" not in whole:
        return ""
    return (
        f", {seconds * whole['images_per_sec'][1] / whole['global_batch']:.3%} of an update of {whole['global_batch']}"
    )


_LINES = {
    "accumulate": _accumulate_line,
    "startup": _startup_line,
    "optimizer": _optimizer_line,
    "checkpoint": _checkpoint_line,
}
