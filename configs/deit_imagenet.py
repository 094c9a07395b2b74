"""DeiT on ImageNet-1k (Touvron et al., arXiv:2012.12877, section 6 and table 9; facebookresearch/deit main.py).

python main.py --config=configs/deit_imagenet.py[:ARG] --mode=plan

| ARG                              | parameters | top-1 of the paper's weights | epochs | batch |
|----------------------------------|------------|------------------------------|--------|-------|
| tiny, tiny_distilled             | 5.7, 5.9 M | 72.2, 74.5 %                 | 300    | 1024  |
| small, small_distilled           | 22, 22 M   | 79.9, 81.2 %                 | 300    | 1024  |
| base, base_distilled             | 87, 87 M   | 81.8, 83.4 %                 | 300    | 1024  |
| base_384, base_distilled_384     | 87, 88 M   | 82.9, 85.2 % (1000 epochs)   | 30     | 512   |

(none) is tiny_distilled. The *_384 presets fine-tune: --config.init_from=runs/deit_imagenet-base, or weights that
tools/convert_weights.py wrote. Distilled ones are taught by RegNetY-16GF with tf_keras' ImageNet weights (82.9 % in the
paper), downloaded once; with tools/cache_teacher.py its answers are computed once. How to get ImageNet: docs/data.md.
These are the papers' numbers, not ours: nobody has trained them here (docs/recipes.md has the plans and their cost).
"""

from ml_collections import ConfigDict

from configs import base


def get_config(arg: str = "") -> ConfigDict:
    """Return the locked configuration of a preset. Errors: KeyError listing the presets."""
    arg = arg or "tiny_distilled"
    if arg not in PRESETS:
        raise KeyError(f"unknown preset {arg!r}: one of {', '.join(PRESETS)}")
    c = recipe(imagenet(base.get_config()))
    c.global_batch, c.micro_batch = 1024, 64
    size, *rest = arg.split("_")
    distilled, high = "distilled" in rest, "384" in rest
    c.model.variant = f"deit_{size}{'_distilled' if distilled else ''}_patch16_{'384' if high else '224'}"
    if distilled:
        taught(c)
    return (at_384(c) if high else c).lock()


def imagenet(c: ConfigDict) -> ConfigDict:
    """Change `c` to ImageNet-1k through TFDS, in half precision; evaluation and checkpoint about once an epoch."""
    c.data.name, c.data.train_split, c.data.eval_split = "tfds:imagenet2012", "train", "validation"
    c.data.train_size, c.data.eval_size, c.data.num_classes = 1_281_167, 50_000, 1000
    c.precision = "mixed_float16"
    c.eval.batch = 256
    c.log.every_updates, c.eval.every_updates, c.checkpoint.every_updates = 50, 1250, 1250
    return c


def recipe(c: ConfigDict) -> ConfigDict:
    """Change `c` to DeiT's recipe; its batch is 1024."""
    c.epochs = 300.0
    c.augment.crop, c.augment.repeats = "random_resized", 3
    c.augment.randaugment, c.augment.erasing = "rand-m9-mstd0.5-inc1", 0.25
    c.augment.mixup, c.augment.cutmix = 0.8, 1.0
    c.eval.crop_ratio = 0.875
    c.loss.smoothing, c.model.drop_path = 0.1, 0.1
    c.optim.peak_lr, c.optim.lr_batch, c.optim.weight_decay = 5e-4, 512, 0.05
    c.optim.warmup_epochs, c.optim.warmup_lr, c.optim.final_lr = 5.0, 1e-6, 1e-5
    c.optim.ema_decay = 0.99996
    return c


def taught(c: ConfigDict) -> ConfigDict:
    """Change `c` to hard distillation by RegNetY-16GF (equation 3)."""
    c.distill.kind, c.distill.alpha = "hard", 0.5
    c.teacher.kind, c.teacher.name, c.teacher.weights = "keras_application", "RegNetY160", "imagenet"
    c.teacher.min_accuracy = 0.7  # a teacher fed wrongly is at a thousandth
    return c


def at_384(c: ConfigDict) -> ConfigDict:
    """Change `c` to the fine-tuning at 384 px: 30 epochs, batch 512, 5e-6 after 5 epochs of warm-up from 1e-6."""
    c.init_from = f"runs/deit_imagenet-base{'_distilled' if 'distilled' in c.model.variant else ''}"
    c.data.image_size = 384
    c.global_batch, c.micro_batch, c.epochs = 512, 32, 30.0
    c.augment.mix_group = 32
    c.optim.peak_lr, c.optim.lr_batch, c.optim.weight_decay = 5e-6, 512, 1e-8
    c.optim.schedule, c.optim.warmup_epochs, c.optim.final_lr = "constant", 5.0, 5e-6
    return c


PRESETS = (
    *(f"{size}{distilled}" for size in ("tiny", "small", "base") for distilled in ("", "_distilled")),
    "base_384",
    "base_distilled_384",
)
