"""Print the results of runs side by side, one line a run.

python tools/compare_runs.py runs/quickstart/teacher runs/quickstart/scratch runs/quickstart/distilled
python tools/compare_runs.py runs/a runs/b --picture=curves.png [--metric=train/loss]
    The same, and a picture: the metric of each run over its updates, and how far it is from the first run's.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from absl import flags

from configs import base
from deit import checkpoint, cli, errors
from deit import config as configuration

PICTURE = flags.DEFINE_string("picture", "", "Where a picture (PNG) of the runs' curves goes; empty: none is drawn.")
METRIC = flags.DEFINE_string("metric", "train/loss", "What the picture is of: a name in metrics.jsonl.")
COLUMNS = ("run", "student", "distillation", "updates", "top1", "ema", "agreement", "images")


def main(argv: list[str]) -> int:
    """Print the table of the run directories in argv."""
    if len(argv) < 2:
        raise errors.UserError("usage: python tools/compare_runs.py RUN [RUN ...]")
    picture = cli.new_file("--picture", PICTURE.value, ".png")
    if not picture and flags.FLAGS["metric"].present:
        raise errors.UserError("--metric chooses what --picture=FILE.png shows: give that too")
    rows = [COLUMNS, *(row(Path(path)) for path in argv[1:])]
    widths = [max(len(cells[i]) for cells in rows) for i in range(len(COLUMNS))]
    print()
    for cells in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(cells, widths)).rstrip())
    logdir = os.path.relpath(os.path.commonpath([Path(path).absolute().parent for path in argv[1:]]))
    print(f"\nCurves and pictures: tensorboard --logdir {logdir}")
    if picture:
        draw([Path(path) for path in argv[1:]], METRIC.value, picture)
    return 0


main.takes_arguments = True


def row(run: Path) -> tuple[str, ...]:
    """Return the cells of one run: its newest checkpoint's metrics, top-1 as a fraction of the images evaluated."""
    path = checkpoint.locate(run)
    config = configuration.from_json(checkpoint.read_config(path), base.get_config())
    manifest = checkpoint.manifest(path)
    metrics = manifest["metrics"]

    def number(name: str) -> str:
        return f"{metrics[name]:.4f}" if metrics.get(name) is not None else "-"

    return (
        str(run),
        config.model.variant,
        config.distill.kind if config.distill.kind != "none" else "-",
        f"{manifest['step']}/{config.resolved.total_updates}",
        number("eval/top1"),
        number("eval/top1_ema"),
        number("eval/teacher_agreement"),
        f"{metrics.get('eval/images') or 0:.0f}",
    )


def draw(runs: list[Path], metric: str, picture: Path) -> None:
    """Draw a metric of several runs. Errors: UserError where a run has none, or the picture can't be written."""
    from PIL import Image

    from deit import pictures, summaries

    lines = {}
    for run in runs:
        logged = summaries.read_metrics(run / "metrics.jsonl")
        # A value that was not finite is logged as null.
        found = [(line["step"], line[metric]) for line in logged if line.get(metric) is not None]
        if not found:
            raise errors.UserError(f"--metric ({metric}) is not in {run / 'metrics.jsonl'}")
        lines[str(run)] = tuple(map(np.asarray, zip(*found)))
    try:
        Image.fromarray(pictures.curves(lines, metric)).save(picture, format="PNG")
    except OSError as error:
        raise errors.UserError(f"--picture ({picture}) can't be written: {error.strerror or error}") from error


if __name__ == "__main__":
    cli.run(main)
