"""The set: what speed and memory are judged by, in one table with the ratios to timm of the same run.

Promises: a row that could not be measured says why; nothing is taken from an earlier run.
"""

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deit import errors, summaries
from tools.benchmarks import sides, speed

_PRECISIONS = ("float32", "mixed_bfloat16")
_VARIANTS = ("deit_tiny_distilled_patch16_224", "deit_small_distilled_patch16_224")


def measure(config, *, rounds: int, command: Sequence[str], out: str = "") -> dict[str, Any]:
    """Measure all rows; write the Markdown table to `out` where it is named."""
    result: dict[str, Any] = {"rounds": rounds, "train": {}, "eval": {}}
    for variant in _VARIANTS:
        for precision in _PRECISIONS:
            own = changed(config, variant, precision)
            flags = [*command, f"--config.model.variant={variant}", f"--config.precision={precision}"]
            name = f"{variant} {precision}"
            result["train"][name] = speed.train(own, rounds=rounds, command=flags)
            result["eval"][name] = speed.evaluation(own, rounds=rounds, command=flags)
    result["accumulate"] = speed.accumulate(config, rounds=rounds, command=command)
    result["startup"] = speed.startup(config, rounds=rounds, command=command)
    clipped = sides.examined(command=[*command, "--config.optim.clip_norm=1.0"], size=config.micro_batch)
    seconds = config.global_batch / result["accumulate"]["images_per_sec"][1]
    result["optimizer_share"] = clipped["groups"]["optimizer"] / seconds
    result["summaries_share"] = log_seconds() / seconds
    result["checkpoint"] = checkpoint(config, command)
    if out:
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        Path(out).write_text("\n".join(markdown(result)) + "\n", encoding="utf-8")
    return result


def changed(config, variant: str, precision: str) -> Any:
    """Return a copy of a configuration for another variant and precision."""
    copied = config.copy_and_resolve_references()
    with copied.unlocked():
        copied.model.variant, copied.precision = variant, precision
    return copied


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


def checkpoint(config, command: Sequence[str]) -> dict[str, Any]:
    """Return what `checkpoint` measures, `{"missing": why}` where the configured data is not there."""
    try:
        (found,) = sides.alternate(
            {"checkpoint": sides.Side((*command, "--json", "checkpoint"))}, rounds=1, said="checkpoint"
        )["checkpoint"]
    except errors.UserError as error:
        return {"missing": str(error)}
    update = config.global_batch / found["images_per_sec"]["never"]
    return {**found, "share": found["stop_seconds"] / (max(1, config.checkpoint.every_updates) * update)}


def markdown(result: dict[str, Any]) -> list[str]:
    """Return the table, and the lines below it."""
    rows = [
        "| what | ours, images/s | timm | ratio (rounds) | memory, MB | timm | ratio | of its floor |",
        "|---" * 8 + "|",
    ]
    for kind in ("train", "eval"):
        for name, found in result[kind].items():
            ours, theirs, ratio = found["ours"], found.get("timm"), found.get("ratio")
            cells = [f"{kind} {name}, {found['batch']}", f"{ours['images_per_sec']:.2f}"]
            cells.append(f"{theirs['images_per_sec']:.2f}" if theirs else "-")
            cells.append(f"**{ratio['images_per_sec']:.2f}** ({_span(ratio['rounds'])})" if ratio else "-")
            cells += [f"{ours['peak_mb']:.0f}", f"{theirs['peak_mb']:.0f}" if theirs else "-"]
            cells.append(f"{ratio['peak_mb']:.2f}" if ratio else "-")
            cells.append(f"{found['floor_fraction']:.3f}" if "floor_fraction" in found else "-")
            rows.append(f"| {' | '.join(cells)} |")
    return [*rows, "", *(f"- {line}" for line in below(result))]


def below(result: dict[str, Any]) -> list[str]:
    """Return a line for each measurement that is no row of the table."""
    whole, saved = result["accumulate"], result["checkpoint"]
    startup = ", ".join(f"{part} {seconds:.2f}" for part, seconds in result["startup"]["seconds"].items())
    lines = [
        f"{whole['global_batch']} as micro-batches of {whole['micro_batch']}: {whole['speed_ratio']:.3f} of the single "
        f"update's rate, {whole['memory_ratio']:.2f} times its memory",
        f"first update of {result['startup']['batch']} done after {result['startup']['total']:.2f} s: {startup}",
        f"optimizer, EMA, clipping and guard: {result['optimizer_share']:.2%} of an update of {whole['global_batch']}",
        f"a log line: {result['summaries_share']:.4%} of an update of {whole['global_batch']}",
    ]
    if "missing" in saved:
        return [*lines, f"a checkpoint was not measured: {saved['missing']}"]
    return [*lines, f"a checkpoint stops the loop for {saved['stop_seconds']:.3f} s: {saved['share']:.4%} of the time"]


def lines(result: dict[str, Any]) -> list[str]:
    """Return the text for what `measure` found."""
    return markdown(result)


def _span(values: Sequence[float]) -> str:
    return f"{min(values):.2f} to {max(values):.2f}"
