"""DeiT-III on ImageNet-1k (Touvron et al., arXiv:2204.07118; facebookresearch/deit README_revenge.md).

python main.py --config=configs/deit3_imagenet.py[:ARG] --mode=plan

| ARG       | parameters | px  | epochs | batch | optimizer, rate | drop-path | top-1 of the paper's weights at 224 |
|-----------|------------|-----|--------|-------|-----------------|-----------|-------------------------------------|
| small     | 22 M       | 224 | 800    | 2048  | LAMB 4e-3       | .05       | 81.4 %                              |
| base      | 87 M       | 192 | 800    | 2048  | LAMB 3e-3       | .2        |                                     |
| large     | 304 M      | 192 | 800    | 2048  | LAMB 3e-3       | .45       |                                     |
| huge      | 632 M      | 160 | 800    | 2048  | LAMB 3e-3       | .6        |                                     |
| base_224  | 87 M       | 224 | 20     | 512   | AdamW 1e-5      | .2        | 83.8 %                              |
| large_224 | 304 M      | 224 | 20     | 512   | AdamW 1e-5      | .45       | 84.9 %                              |
| huge_224  | 632 M      | 224 | 20     | 512   | AdamW 1e-5      | .55       | 85.2 %                              |
| small_384 | 22 M       | 384 | 20     | 512   | AdamW 1e-5      | 0         | 83.4 % at 384                       |

(none) is small. The second half fine-tunes the first (--config.init_from=runs/deit3_imagenet-base), or other weights.
At 160 px the patches of huge, 14 px, cover 154. For the medium network no training command is published: `small` with
--config.model.variant=deit3_medium_patch16_224 is a guess.
These are the paper's numbers, not ours: nobody has trained them here (docs/recipes.md has the plans and their cost).
"""

from ml_collections import ConfigDict

from configs import base, deit_imagenet


def get_config(arg: str = "") -> ConfigDict:
    """Return the locked configuration of a preset. Errors: KeyError listing the presets."""
    if arg and arg not in PRESETS:
        raise KeyError(f"unknown preset {arg!r}: one of {', '.join(PRESETS)}")
    size, _, finer = (arg or "small").partition("_")
    c = deit_imagenet.imagenet(base.get_config())
    c.eval.crop_ratio = 1.0
    c.optim.ema_decay = 0.99996
    c.model.variant = f"deit3_{size}_patch{14 if size == 'huge' else 16}_{finer or 224}"
    c.data.image_size, c.model.drop_path = PRESETS[arg or "small"]
    return (_finer(c, f"runs/deit3_imagenet-{size}") if finer else _recipe(c, size)).lock()


def _recipe(c: ConfigDict, size: str) -> ConfigDict:
    """Change `c` to 800 epochs with LAMB, binary cross-entropy and 3-Augment."""
    c.epochs, c.global_batch, c.micro_batch = 800.0, 2048, 64
    c.augment.crop, c.augment.repeats = "random_resized", 3
    c.augment.three_augment, c.augment.jitter = True, 0.3
    c.augment.mixup, c.augment.cutmix = 0.8, 1.0
    c.loss.kind, c.loss.smoothing = "bce", 0.0
    c.optim.name, c.optim.weight_decay = "lamb", 0.05
    c.optim.peak_lr = 4e-3 if size == "small" else 3e-3  # as it is, not scaled by the batch
    c.optim.warmup_epochs, c.optim.warmup_lr, c.optim.final_lr = 5.0, 1e-6, 1e-5
    c.optim.clip_norm = 1.0  # what NVIDIA's FusedLAMB does unless told otherwise (max_grad_norm)
    return c


def _finer(c: ConfigDict, init_from: str) -> ConfigDict:
    """Change `c` to 20 epochs at a higher resolution, with DeiT's augmentation, not erased and not repeated."""
    c.init_from = init_from
    c.epochs, c.global_batch, c.micro_batch = 20.0, 512, 32
    c.augment.crop, c.augment.randaugment = "random_resized", "rand-m9-mstd0.5-inc1"
    c.augment.mixup, c.augment.cutmix, c.augment.mix_group = 0.8, 1.0, 32
    c.loss.kind, c.loss.smoothing, c.optim.name = "ce", 0.1, "adamw"
    c.optim.peak_lr, c.optim.weight_decay = 1e-5, 0.1
    c.optim.warmup_epochs, c.optim.warmup_lr, c.optim.final_lr = 5.0, 1e-6, 1e-5
    return c


PRESETS = {  # px, drop-path
    "small": (224, 0.05),
    "base": (192, 0.2),
    "large": (192, 0.45),
    "huge": (160, 0.6),
    "base_224": (224, 0.2),
    "large_224": (224, 0.45),
    "huge_224": (224, 0.55),
    "small_384": (384, 0.0),
}
