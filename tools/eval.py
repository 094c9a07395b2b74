"""Evaluate a checkpoint: top-1 of both heads, of their averages and of the EMA, recall a class, teacher agreement.

python tools/eval.py --ckpt=runs/deit_tiny_flowers [--data_dir=DIR] [--weights=raw|ema] [--json=FILE]
python tools/eval.py --ckpt=weights/deit_tiny_patch16_224 --data_name=folder:imagenet --split=val
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from absl import flags

from deit import checkpoint, cli, errors

CKPT = flags.DEFINE_string("ckpt", None, "A run directory (its newest checkpoint) or one checkpoint.", required=True)
DATA_DIR = flags.DEFINE_string("data_dir", None, "Where the data is now; default: data.data_dir of the run.")
DATA_NAME = flags.DEFINE_string("data_name", None, "tfds:NAME or folder:PATH instead of data.name of the run.")
SPLIT = flags.DEFINE_string("split", None, "Split to evaluate on instead of data.eval_split of the run.")
TEACHER = flags.DEFINE_string("teacher", None, "Where the teacher is now; default: teacher.path of the run.")
WEIGHTS = flags.DEFINE_enum(
    "weights", "both", ["raw", "ema", "both"], "Which to measure: as trained, their averages, or top-1 of both."
)
JSON = flags.DEFINE_string("json", None, "Also write the metrics to this file.")


def main(_) -> int:
    """Evaluate --ckpt on its run's evaluation split and print the metrics."""
    if JSON.value and (Path(JSON.value).is_dir() or not Path(JSON.value).absolute().parent.is_dir()):
        raise errors.UserError(f"--json ({JSON.value}) must be a file in an existing directory")
    checkpoint.locate(CKPT.value)

    from deit import evaluate  # TensorFlow starts only now, with everything checked that can be

    step, report = evaluate.checkpointed(
        CKPT.value,
        data_dir=DATA_DIR.value or "",
        data_name=DATA_NAME.value or "",
        split=SPLIT.value or "",
        teacher_path=TEACHER.value or "",
        weights=WEIGHTS.value,
    )
    print(evaluate.table(report.metrics))
    if JSON.value:
        content = {"step": step, "checkpoint": str(CKPT.value), **report.metrics}
        Path(JSON.value).write_text(json.dumps(content, indent=2) + "\n")
    return errors.DONE


if __name__ == "__main__":
    cli.run(main)
