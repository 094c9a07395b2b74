"""The recipes as their authors published them, every field written out: a new default must not change one.

What a recipe changes is a dictionary over the one that it is built on.
"""

# Touvron et al., arXiv:2012.12877, section 6 and table 9 (column DeiT-B, used for every size) and, for what the table
# leaves out, the defaults of facebookresearch/deit's main.py at 7e160fe. Written out field by field: a new default of
# configs/base.py must not change a published recipe.
DEIT = {
    "epochs": 300.0,
    "augment.crop": "random_resized",  # bicubic
    "augment.scale": (0.08, 1.0),
    "augment.ratio": (3 / 4, 4 / 3),
    "augment.flip": 0.5,
    "augment.randaugment": "rand-m9-mstd0.5-inc1",  # table 9: 9 / 0.5
    "augment.three_augment": False,
    "augment.jitter": 0.0,  # main.py's 0.4 is not used where there is RandAugment
    "augment.erasing": 0.25,
    "augment.mixup": 0.8,
    "augment.cutmix": 1.0,
    "augment.mix_prob": 1.0,
    "augment.mix_switch": 0.5,
    "augment.repeats": 3,
    "eval.crop_ratio": 0.875,  # 224 of 256 px
    "data.image_size": 224,
    "model.mean": (0.485, 0.456, 0.406),
    "model.std": (0.229, 0.224, 0.225),
    "model.drop_path": 0.1,
    "optim.name": "adamw",
    "optim.peak_lr": 5e-4,  # table 9: 0.0005 x batch / 512
    "optim.lr_batch": 512,
    "optim.schedule": "cosine",
    "optim.warmup_epochs": 5.0,
    "optim.warmup_lr": 1e-6,
    "optim.final_lr": 1e-5,
    "optim.weight_decay": 0.05,
    "optim.decay_coupled": True,  # PyTorch's AdamW
    "optim.decay_exclude": True,
    "optim.beta_1": 0.9,
    "optim.beta_2": 0.999,
    "optim.epsilon": 1e-8,
    "optim.amsgrad": False,
    "optim.clip_norm": 0.0,
    "optim.layer_decay": 1.0,
    "optim.train_only": "",  # everything
    "optim.ema_decay": 0.99996,
    "loss.kind": "ce",
    "loss.smoothing": 0.1,
    "distill.alpha": 0.5,
    "distill.form": "kl",
    "distill.reduction": "batch",
    "distill.weighting": "convex",
    "distill.tau": 3.0,
}

# facebookresearch/deit's README, "fine-tune at 384": 30 epochs of batch 512; what it leaves out is DeiT's. Its
# scheduler warms up for 5 epochs from 1e-6, and its cosine from 5e-6 to 5e-6 is a constant.
DEIT_384 = {
    **DEIT,
    "epochs": 30.0,
    "data.image_size": 384,
    "optim.peak_lr": 5e-6,
    "optim.final_lr": 5e-6,
    "optim.schedule": "constant",
    "optim.weight_decay": 1e-8,
}

# Touvron et al., arXiv:2204.07118, table 1 and section 4; facebookresearch/deit README_revenge.md. Size, drop-path and
# rate are by the network.
DEIT3 = {
    **DEIT,
    "epochs": 800.0,
    "augment.randaugment": "",
    "augment.three_augment": True,
    "augment.jitter": 0.3,
    "augment.erasing": 0.0,
    "eval.crop_ratio": 1.0,
    "optim.name": "lamb",
    "optim.lr_batch": 0,  # the rate is that of batch 2048
    "optim.clip_norm": 1.0,  # NVIDIA's FusedLAMB unless told otherwise
    "loss.kind": "bce",
    "loss.smoothing": 0.0,
}

# The same README, "finetuning": 20 epochs of batch 512 with DeiT's augmentation, not erased, not repeated.
DEIT3_FINER = {
    **DEIT,
    "epochs": 20.0,
    "augment.erasing": 0.0,
    "augment.repeats": 1,
    "eval.crop_ratio": 1.0,
    "optim.peak_lr": 1e-5,
    "optim.lr_batch": 0,
    "optim.weight_decay": 0.1,
}

# facebookresearch/dino issue 81: CIFAR-10 with a base network; issue 144: CIFAR-100, at 5e-6. The end of the cosine is
# ours.
TRANSFER = {
    **DEIT,
    "epochs": 1000.0,
    "augment.erasing": 0.0,
    "optim.peak_lr": 7.5e-6,
    "optim.lr_batch": 0,
    "optim.final_lr": 1e-6,
}

# Parameters with 1000 classes, as timm 1.0.31 counts them; facebookresearch/deit's tables have the same in millions.
PARAMETERS = {
    "deit_tiny_patch16_224": 5_717_416,
    "deit_tiny_distilled_patch16_224": 5_910_800,
    "deit_small_patch16_224": 22_050_664,
    "deit_small_distilled_patch16_224": 22_436_432,
    "deit_base_patch16_224": 86_567_656,
    "deit_base_distilled_patch16_224": 87_338_192,
    "deit_base_patch16_384": 86_859_496,
    "deit_base_distilled_patch16_384": 87_630_032,
    "deit3_small_patch16_224": 22_059_496,
    "deit3_small_patch16_384": 22_205_416,
    "deit3_medium_patch16_224": 38_849_512,
    "deit3_base_patch16_224": 86_585_320,
    "deit3_base_patch16_384": 86_877_160,
    "deit3_large_patch16_224": 304_374_760,
    "deit3_large_patch16_384": 304_763_880,
    "deit3_huge_patch14_224": 632_126_440,
}
