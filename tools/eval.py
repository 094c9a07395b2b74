"""Evaluate a checkpoint: top-1 of both heads, of their averages and of the EMA, recall a class, teacher agreement.

python tools/eval.py --ckpt=runs/deit_tiny_flowers [--data_dir=DIR] [--json=FILE]
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from absl import flags, logging

from configs import base
from deit import checkpoint, cli, errors
from deit import config as configuration

CKPT = flags.DEFINE_string("ckpt", None, "A run directory (its newest checkpoint) or one checkpoint.", required=True)
DATA_DIR = flags.DEFINE_string("data_dir", None, "Where the data is now; default: data.data_dir of the run.")
TEACHER = flags.DEFINE_string("teacher", None, "Where the teacher is now; default: teacher.path of the run.")
JSON = flags.DEFINE_string("json", None, "Also write the metrics to this file.")


def main(_) -> int:
    """Evaluate --ckpt on its run's evaluation split and print the metrics."""
    path = checkpoint.locate(CKPT.value)
    config = configuration.from_json(checkpoint.read_config(path), base.get_config())
    with config.unlocked():
        config.data.data_dir = DATA_DIR.value or config.data.data_dir
        config.teacher.path = TEACHER.value or config.teacher.path

    from deit import evaluate, runtime  # TensorFlow starts only now

    runtime.prepare(config.precision)
    report = evaluate.saved(path, config, run=_run_of(path), progress=sys.stderr.isatty())
    for name, value in report.metrics.items():
        print(f"{name:<28} {value:.4f}" if value != int(value) or abs(value) <= 1 else f"{name:<28} {int(value)}")
    if JSON.value:
        _write(Path(JSON.value), {"step": report.step, "checkpoint": str(CKPT.value), **report.metrics})
    return 0


def _run_of(path: Path) -> Path:
    """Return the run directory that a checkpoint lies in: RUN/checkpoints/step-N."""
    return path.parent.parent if path.parent.name == "checkpoints" else path


def _write(path: Path, content: dict) -> None:
    if not path.parent.is_dir():
        raise errors.UserError(f"--json ({path}) must lie in an existing directory")
    path.write_text(json.dumps(content, indent=2) + "\n")
    logging.info("wrote %s", path)


if __name__ == "__main__":
    cli.run(main)
