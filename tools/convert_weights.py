"""Weights of timm, facebookresearch/deit and Hugging Face transformers into a checkpoint of ours, and back.

python tools/convert_weights.py --from=FILE --variant=NAME --out=DIR [--classifier=keep|drop|replace] [--image_size=384]
python tools/convert_weights.py --from=RUN|CHECKPOINT --to=timm|facebook|huggingface --out=FILE|DIR

FILE is .safetensors, a directory with model.safetensors, or .pth where torch is installed. The checkpoint is what
tools/eval.py --ckpt, tools/predict.py --ckpt and --config.init_from read. To timm and huggingface: a directory that
create_model("local-dir:DIR", pretrained=True) and from_pretrained open, with the names of the classes, mean, std and
crop; to facebook: a .safetensors file. Nothing that exists is overwritten.
"""

import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from absl import flags

from deit import cli, errors

FROM = flags.DEFINE_string("from", None, "Weights of another code base; with --to, a run or checkpoint.", required=True)
OUT = flags.DEFINE_string("out", None, "What is written; it must not exist.", required=True)
TO = flags.DEFINE_enum("to", None, ["timm", "facebook", "huggingface"], "Write another code base's weights.")
VARIANT = flags.DEFINE_string("variant", None, "timm's name of the network, such as deit_tiny_distilled_patch16_224.")
LAYOUT = flags.DEFINE_enum(
    "layout", None, ["timm", "facebook", "huggingface"], "Of --from; default: seen from the names of its tensors."
)
IMAGE_SIZE = flags.DEFINE_integer(
    "image_size",
    0,
    "px; the position embedding is resized. 0 = as the variant's name, and the file must be of that size.",
    lower_bound=0,
    upper_bound=4096,
)
PATCH = flags.DEFINE_integer("patch", 0, "px; 0 = as the variant's name.", lower_bound=0)
REGISTERS = flags.DEFINE_integer("registers", 0, "Register tokens (timm's reg_tokens).", lower_bound=0)
CLASSIFIER = flags.DEFINE_enum(
    "classifier",
    "keep",
    ["keep", "drop", "replace"],
    "keep the file's heads; drop them (for init_from and --to); replace them by fresh ones for --class_names.",
)
CLASS_NAMES = flags.DEFINE_string("class_names", None, "File of class names, one a line, in the order of the logits.")
WEIGHTS = flags.DEFINE_enum("weights", "raw", ["raw", "ema"], "With --to: which of a run's two sets of weights.")


_ONE_WAY = {  # which flags say nothing in the other direction
    True: ("variant", "layout", "image_size", "patch", "registers", "classifier", "class_names"),
    False: ("weights",),
}


def main(_) -> int:
    """Convert --from to --out."""
    if TO.value is None and VARIANT.value is None:
        raise errors.UserError("--variant must name the network, or --to the layout to write")
    for name in _ONE_WAY[TO.value is not None]:
        if flags.FLAGS[name].present:
            where = "without --to" if TO.value else "with --to"
            raise errors.UserError(f"--{name} ({flags.FLAGS[name].value}) says something only {where}")
    from deit import convert, export_weights  # TensorFlow starts only now

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # what is half written goes, as for Ctrl-C

    if TO.value:
        print(export_weights.export(Path(FROM.value), Path(OUT.value), layout=TO.value, weights=WEIGHTS.value))
        return errors.DONE
    done = convert.load(
        Path(FROM.value),
        Path(OUT.value),
        variant=VARIANT.value,
        layout=LAYOUT.value or "",
        image_size=IMAGE_SIZE.value,
        patch=PATCH.value,
        registers=REGISTERS.value,
        classifier=CLASSIFIER.value,
        names_file=Path(CLASS_NAMES.value) if CLASS_NAMES.value else None,
    )
    print(done)
    return errors.DONE


if __name__ == "__main__":
    cli.run(main)
