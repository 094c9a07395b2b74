"""Real training in a minute or two on a CPU, no network: scikit-learn's handwritten digits, 32 px.

python main.py --config=configs/quickstart.py[:teacher|:scratch|:distilled]      (make quickstart runs all three)

(none) is `distilled` with the teacher trained first, into <workdir>/teacher.
"""

from ml_collections import ConfigDict

from configs import base


def get_config(arg: str = "") -> ConfigDict:
    """Return the locked configuration of a preset. Errors: KeyError listing the presets."""
    if arg not in PRESETS:
        raise KeyError(f"unknown preset {arg!r}: one of {', '.join(filter(None, PRESETS))}")
    return PRESETS[arg]().lock()


def on_digits(c: ConfigDict) -> ConfigDict:
    """Change `c` to the digits: 32 px, a quarter held out, no flip (a mirrored 2 is no 2)."""
    c.data.name, c.data.train_split, c.data.eval_split = "digits", "train", "test"
    c.data.image_size, c.data.train_size, c.data.eval_size, c.data.num_classes = 32, 1347, 450, 10
    c.augment.resize_margin, c.augment.flip = 4, 0.0
    return c


def teacher(total_updates: int = 0) -> ConfigDict:
    """Return the small GroupNorm ResNet that teaches; >= 97 % on the held-out quarter."""
    c = on_digits(base.get_config())
    c.model.variant, c.model.drop_path = "groupnorm_resnet", 0.0
    c.epochs, c.total_updates, c.global_batch, c.micro_batch = 8.0, total_updates, 64, 64
    c.optim.peak_lr, c.optim.warmup_epochs, c.optim.ema_decay = 3e-3, 1.0, 0.0
    return _intervals(c)


def scratch() -> ConfigDict:
    """Return the small DeiT without a teacher."""
    c = on_digits(base.get_config())
    c.model.variant, c.model.drop_path = "deit_micro_patch8_32", 0.0
    c.epochs, c.global_batch, c.micro_batch = 40.0, 64, 64
    c.optim.peak_lr = 2e-3
    return _intervals(c)


def distilled() -> ConfigDict:
    """Return the same small DeiT, taught by the run in runs/quickstart/teacher."""
    c = scratch()
    c.model.variant, c.distill.kind = "deit_micro_distilled_patch8_32", "hard"
    c.teacher.kind, c.teacher.path, c.teacher.min_accuracy = "run", "runs/quickstart/teacher", 0.9
    return c


def whole() -> ConfigDict:
    """Return `distilled` with its teacher trained first."""
    c = distilled()
    c.teacher.kind, c.teacher.path, c.teacher.train = "train", "", teacher()
    return c


def _intervals(c: ConfigDict) -> ConfigDict:
    c.log.every_updates, c.eval.every_updates, c.checkpoint.every_updates = 20, 0, 100
    return c


PRESETS = {"": whole, "teacher": teacher, "scratch": scratch, "distilled": distilled}
