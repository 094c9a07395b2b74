"""Write a run's student as files that others open.

python tools/export.py --ckpt=RUN|CHECKPOINT --out=DIR [--formats=saved_model,keras,tflite] [--weights=raw|ema]
                       [--force]

saved_model: opens in plain TensorFlow; decoding, resizing and class names are inside. serving_default takes images
uint8 [B, H, W, 3] of any size, encoded takes JPEG or PNG files; both give probabilities, logits and class names.
keras: model.keras, which tf_keras.models.load_model opens; images [B, S, S, 3] in [0, 255] give logits.
tflite: model-float32, -float16 and -int8 (dynamic range) of a DeiT, images already resized; size, time, and accuracy
on the evaluation split stand beside each other.
Each file is read again and compared with the checkpoint's logits before DIR appears.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from absl import flags, logging

from deit import checkpoint, cli, errors

CKPT = flags.DEFINE_string("ckpt", None, "A run directory (its newest checkpoint) or one checkpoint.", required=True)
OUT = flags.DEFINE_string("out", None, "The directory to write; it must not exist, or --force.", required=True)
FORMATS = flags.DEFINE_list("formats", ["saved_model", "keras"], "Of saved_model, keras, tflite, separated by commas.")
WEIGHTS = flags.DEFINE_enum("weights", "raw", ["raw", "ema"], "Which of a run's two sets of weights.")
FORCE = flags.DEFINE_boolean("force", False, "Replace --out where it exists.")
KNOWN = ("saved_model", "keras", "tflite")


def main(_) -> int:
    """Export --ckpt to --out and print what was written."""
    for name in FORMATS.value or [""]:
        if name not in KNOWN:
            raise errors.UserError(f"--formats ({name}) must be of {', '.join(KNOWN)}")
    out = Path(OUT.value).expanduser()
    if os.path.lexists(out) and not FORCE.value:
        raise errors.UserError(f"--out ({out}) exists: --force replaces it, once the new export is whole")
    checkpoint.locate(CKPT.value)

    from deit import export  # TensorFlow starts only now, with everything checked that can be

    logging.set_verbosity(logging.WARNING)  # TensorFlow tells every step of writing a SavedModel
    written = export.export(
        CKPT.value, out, formats=list(dict.fromkeys(FORMATS.value)), weights=WEIGHTS.value, force=FORCE.value
    )
    print("\n".join(lines(out, written)))
    return errors.DONE


def lines(out: Path, written: Sequence) -> list[str]:
    """Return a line a file: size, distance from the checkpoint, and of a TFLite file time and accuracy."""
    exact = next((each.top1 for each in written if each.name == "model-float32.tflite"), None)
    found = []
    for each in written:
        parts = [f"{each.bytes / 1e6:.1f} MB", f"logits at most {each.difference:.1e} from the checkpoint's"]
        if each.milliseconds is not None:
            parts.append(f"{each.milliseconds:.1f} ms a picture")
            parts.append("accuracy not measured: the data is absent" if each.top1 is None else f"top-1 {each.top1:.4f}")
        if each.top1 is not None and exact - each.top1 > 0.01:
            parts.append(f"LOSES {100 * (exact - each.top1):.1f} POINTS")
        found.append(f"{out / each.name}  {', '.join(parts)}")
    return found


if __name__ == "__main__":
    cli.run(main)
