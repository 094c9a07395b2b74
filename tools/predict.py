"""Classes and probabilities of pictures, or the logits of an array.

python tools/predict.py --ckpt=runs/deit_tiny_flowers IMAGE_OR_DIR... [--top=5] [--json] [--picture=sheet.png]
python tools/predict.py --ckpt=runs/deit_tiny_flowers --array=x.npy [--raw] --out=y.npz

--ckpt is a run, a checkpoint, or what tools/convert_weights.py wrote. An array is [N, S, S, 3], pixels in [0, 255];
with --raw it is float32 and normalised already. y.npz holds logits_cls, logits_dist (two heads) and logits, their mean.
Everything is computed in float32, whatever precision the network was trained in.
Pictures are read as training reads them: as they are stored, without the turn that EXIF may ask for.
"""

import io
import json
import sys
import zipfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from absl import flags

from deit import checkpoint, cli, errors, workdir

CKPT = flags.DEFINE_string("ckpt", None, "A run (its newest checkpoint) or one checkpoint.", required=True)
TOP = flags.DEFINE_integer("top", 5, "Classes shown a picture.", lower_bound=1)
JSON = flags.DEFINE_bool("json", False, "Print JSON instead of a table.")
PICTURE = flags.DEFINE_string("picture", None, "Also draw up to 24 pictures with their classes: a new .png file.")
ARRAY = flags.DEFINE_string("array", None, "A .npy file instead of pictures.")
RAW = flags.DEFINE_bool("raw", False, "--array is normalised already: the network's own normalisation is left out.")
OUT = flags.DEFINE_string("out", None, "The .npz file that the logits of --array are written to; it must not exist.")
WEIGHTS = flags.DEFINE_enum("weights", "raw", ["raw", "ema"], "Which of a run's two sets of weights.")


def main(argv: list[str]) -> int:
    """Answer to the pictures in `argv`, or to --array."""
    files = argv[1:]
    if bool(files) == bool(ARRAY.value):
        raise errors.UserError("name pictures or directories of pictures, or an --array")
    if bool(ARRAY.value) != bool(OUT.value) or (RAW.value and not ARRAY.value):
        raise errors.UserError("--array and --out go together, and --raw goes with them")
    if PICTURE.value and ARRAY.value:
        raise errors.UserError("--picture goes with pictures, not with an --array")
    out = cli.new_file("--out", OUT.value, ".npz")
    picture = cli.new_file("--picture", PICTURE.value, ".png")
    checkpoint.locate(CKPT.value)
    return _array(out) if out else _pictures(files, picture)


main.takes_arguments = True


def _array(out: Path) -> int:
    """Write the logits of --array."""
    images = _load(ARRAY.value)

    from deit import predict  # TensorFlow starts only now, with everything checked that can be

    found = predict.logits(predict.open_network(CKPT.value, weights=WEIGHTS.value), images, raw=RAW.value)
    content = io.BytesIO()
    np.savez(content, **found)
    _write(out, content)
    print(f"{out}: {', '.join(f'{name} {list(value.shape)}' for name, value in found.items())}")
    return errors.DONE


def _pictures(paths: list[str], picture: Path | None) -> int:
    """Print the classes of the pictures at `paths`; draw them to `picture`."""
    from deit import predict

    sys.stdout.reconfigure(errors="backslashreplace")  # a file's name need not be UTF-8
    files = predict.find(paths)
    opened = predict.open_network(CKPT.value, weights=WEIGHTS.value)
    answers = predict.pictures(opened, files, top=TOP.value)
    print(json.dumps([_plain(a) for a in answers], indent=2) if JSON.value else "\n".join(map(_text, answers)))
    if picture:
        import PIL.Image

        content = io.BytesIO()
        PIL.Image.fromarray(predict.sheet(opened, answers)).save(content, format="PNG")
        _write(picture, content)
    lost = [answer.file for answer in answers if not answer.classes]
    if lost:
        raise errors.UserError(f"{len(lost)} of {len(files)} pictures can't be read: {', '.join(lost[:5])}")
    return errors.DONE


def _load(path: str) -> np.ndarray:
    try:
        found = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError, MemoryError, zipfile.BadZipFile) as error:
        raise errors.UserError(f"--array ({path}) can't be read as a .npy file: {error}") from None
    if not isinstance(found, np.ndarray):
        raise errors.UserError(f"--array ({path}) is an .npz archive, not a .npy file")
    return found


def _write(path: Path, content: io.BytesIO) -> None:
    """Write a new file, whole or not at all."""
    try:
        workdir.write(path, content.getvalue())
    except OSError as error:
        raise errors.UserError(f"{path} can't be written: {error.strerror or error}") from None


def _plain(answer) -> dict:
    classes = [{"class": name, "probability": share} for name, share in answer.classes]
    return {"file": answer.file, "classes": classes, **({"problem": answer.problem} if answer.problem else {})}


def _text(answer) -> str:
    rows = [f"  {share:6.2%}  {name}" for name, share in answer.classes] or [f"  can't be read: {answer.problem}"]
    return "\n".join([answer.file, *rows])


if __name__ == "__main__":
    cli.run(main)
