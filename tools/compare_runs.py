"""Print the results of runs side by side, one line a run.

python tools/compare_runs.py runs/quickstart/teacher runs/quickstart/scratch runs/quickstart/distilled
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from configs import base
from deit import checkpoint, cli, errors
from deit import config as configuration

COLUMNS = ("run", "student", "distillation", "updates", "top1", "ema", "agreement", "images")


def main(argv: list[str]) -> int:
    """Print the table of the run directories in argv."""
    if len(argv) < 2:
        raise errors.UserError("usage: python tools/compare_runs.py RUN [RUN ...]")
    rows = [COLUMNS, *(row(Path(path)) for path in argv[1:])]
    widths = [max(len(cells[i]) for cells in rows) for i in range(len(COLUMNS))]
    print()
    for cells in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(cells, widths)).rstrip())
    logdir = os.path.relpath(os.path.commonpath([Path(path).absolute().parent for path in argv[1:]]))
    print(f"\nCurves and pictures: tensorboard --logdir {logdir}")
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


if __name__ == "__main__":
    cli.run(main)
