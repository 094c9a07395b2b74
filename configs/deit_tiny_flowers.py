"""DeiT-Ti/16 on tf_flowers by hard distillation (Touvron et al., arXiv:2012.12877, eq. 3), one device.

python main.py --config=configs/deit_tiny_flowers.py[:ARG]

| ARG           | what                                                                                             |
|---------------|--------------------------------------------------------------------------------------------------|
| (none)        | DeiT's architecture and initialisation, batch 256 as 16 x 16, 20 epochs; 258 updates              |
| keras_example | the Keras example "Distilling Vision Transformers": key_dim 192 a head, x / 255, constant lr      |
| card          | keras_example with batch 16, lr 6.25e-5, TFA weight decay 1e-4 on everything: the model card      |
| scratch       | the variant without the distillation token, no teacher                                            |
| full          | the whole DeiT recipe: RandAugment, mixup, cutmix, erasing, 3 views an example, 300 epochs        |
| full_scratch  | the same for the variant without the distillation token, no teacher                               |
| smoke         | every part of the main job in half a minute: digits, small student, teacher of 2 updates            |

A prototype of the default reached 70.0 % in 88 minutes on 2 CPU cores (one seed); docs/recipes.md has the runs
of this code. The default teacher is the Keras example's BiT-M R50x3, downloaded once; any other is two flags:
--config.teacher.kind=run --config.teacher.path=runs/teacher_flowers.
"""

from ml_collections import ConfigDict

from configs import base, deit_imagenet, quickstart

BIT = "https://github.com/sayakpaul/deit-tf/releases/download/v0.1.0/bit_teacher_flowers.zip"


def get_config(arg: str = "") -> ConfigDict:
    """Return the locked configuration of a preset. Errors: KeyError listing the presets."""
    c = base.get_config()
    c.distill.kind = "hard"
    c.teacher.kind = "saved_model"
    c.teacher.path = BIT
    if arg not in PRESETS:
        raise KeyError(f"unknown preset {arg!r}: one of {', '.join(filter(None, PRESETS))}")
    return PRESETS[arg](c).lock()


def keras_example(c: ConfigDict) -> ConfigDict:
    """Change `c` to the Keras example: architecture, input range, constant schedule, TFA decay on everything."""
    c.model.variant = "keras_example"
    c.model.mean, c.model.std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    c.optim.peak_lr, c.optim.lr_batch = 5e-4, 512
    c.optim.schedule, c.optim.warmup_epochs = "constant", 0.0
    c.optim.weight_decay, c.optim.decay_coupled, c.optim.decay_exclude = 1e-4, False, False
    c.optim.epsilon, c.optim.ema_decay = 1e-7, 0.0
    return c


def card(c: ConfigDict) -> ConfigDict:
    """Change `c` to the model card: the Keras example at batch 16 with a constant 6.25e-5."""
    c = keras_example(c)
    c.global_batch = c.micro_batch = 16
    c.optim.peak_lr = 6.25e-5  # the card's value, whatever the scaling rule says of batch 16
    c.optim.lr_batch = 0
    return c


def scratch(c: ConfigDict) -> ConfigDict:
    """Change `c` to DeiT-Ti without distillation: no token, no teacher."""
    c.model.variant = "deit_tiny_patch16_224"
    c.distill.kind, c.teacher.kind, c.teacher.path = "none", "none", ""
    return c


def full(c: ConfigDict) -> ConfigDict:
    """Change `c` to the recipe of arXiv:2012.12877, section 6 and table 9, for one device: batch 256, not 1024."""
    return deit_imagenet.recipe(c)


def full_scratch(c: ConfigDict) -> ConfigDict:
    """Change `c` to the whole recipe without distillation."""
    return full(scratch(c))


def smoke(c: ConfigDict) -> ConfigDict:
    """Change `c` to three updates of everything on the digits that scikit-learn ships."""
    c = quickstart.on_digits(c)
    c.model.variant = "deit_micro_distilled_patch4_32"
    c.global_batch, c.micro_batch, c.total_updates = 32, 8, 3
    c.checkpoint.every_updates = c.eval.every_updates = 2
    c.teacher.kind, c.teacher.path, c.teacher.train = "train", "", quickstart.teacher(total_updates=2)
    return c


PRESETS = {
    "": lambda c: c,
    "keras_example": keras_example,
    "card": card,
    "scratch": scratch,
    "full": full,
    "full_scratch": full_scratch,
    "smoke": smoke,
}
