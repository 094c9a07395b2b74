"""Fine-tune a trained DeiT: other classes, another resolution, with or without a teacher.

python main.py --config=configs/finetune.py[:ARG] --config.init_from=CHECKPOINT

| ARG        | what                                                                                              |
|------------|---------------------------------------------------------------------------------------------------|
| (none)     | tf_flowers from ImageNet weights: layer-wise decay of the rate .75, 20 epochs, both heads         |
| distilled  | the same, taught by a run: --config.teacher.path=runs/teacher_flowers                             |
| cls        | the same, the class head only: the distillation token stays and answers nothing                   |
| attention  | the same, attention, heads and position embedding trained, all else frozen (arXiv:2203.09795)     |
| probe      | the same, nothing but the heads                                                                   |
| 384        | the same at 384 px: the position embedding is resized                                             |
| cifar10    | CIFAR-10 at 224 px, the numbers of DeiT's author: batch 768, AdamW 7.5e-6, 1000 epochs            |
| cifar100   | CIFAR-100 the same way, AdamW 5e-6                                                                |
| flowers102 | Oxford Flowers-102, with the numbers for CIFAR-10: its own are not published                      |
| digits     | digits 5 to 9 from a network that knows 0 to 4, in seconds; digits_before trains that one first   |

--config.init_from is a run (its newest checkpoint), a checkpoint, or what tools/convert_weights.py wrote. Heads come
over where the classes are the same, else they begin anew; the log and the plan say which. ImageNet at 384 px is in
configs/deit_imagenet.py (base_384) and deit3_imagenet.py (small_384). CIFAR's numbers are those of
facebookresearch/dino issues 81 and 144 (rate, decay, batch, epochs, warm-up; stochastic depth .1), and no erasing after
facebookresearch/deit issue 45, which has none for SGD; the cosine ends at 1e-6 by our choice. The test split also
picks `best`: name another --config.data.eval_split where that matters.
"""

from ml_collections import ConfigDict

from configs import base, deit_imagenet, quickstart


def get_config(arg: str = "") -> ConfigDict:
    """Return the locked configuration of a preset. Errors: KeyError listing the presets."""
    if arg not in PRESETS:
        raise KeyError(f"unknown preset {arg!r}: one of {', '.join(filter(None, PRESETS))}")
    return PRESETS[arg]().lock()


def flowers() -> ConfigDict:
    """Return the fine-tuning on tf_flowers, at DeiT's evaluation crop."""
    c = base.get_config()
    c.init_from = "weights/deit_tiny_distilled_patch16_224"
    c.augment.crop, c.augment.scale = "random_resized", (0.35, 1.0)  # small pictures of a small data set
    c.eval.crop_ratio = 0.875
    c.optim.peak_lr, c.optim.layer_decay = 5e-4, 0.75
    return c


def distilled() -> ConfigDict:
    """Return `flowers` with hard distillation."""
    c = flowers()
    c.distill.kind, c.teacher.kind, c.teacher.path = "hard", "run", "runs/teacher_flowers"
    return c


def cls() -> ConfigDict:
    """Return `flowers` with the class head only."""
    c = flowers()
    c.model.heads = "cls"
    return c


def only(part: str) -> ConfigDict:
    """Return `flowers` with a part of the network trained, all of it at the same rate."""
    c = flowers()
    c.optim.train_only, c.optim.layer_decay = part, 1.0
    return c


def at_384() -> ConfigDict:
    """Return `flowers` at 384 px."""
    c = flowers()
    c.data.image_size, c.micro_batch = 384, 8
    return c


def transfer(name: str, train: str, held_out: str, sizes: tuple[int, int, int], rate: float = 7.5e-6) -> ConfigDict:
    """Return the transfer recipe of DeiT's author for a data set of TFDS."""
    c = deit_imagenet.recipe(base.get_config())
    c.init_from = "weights/deit_base_distilled_patch16_224"
    c.model.variant = "deit_base_distilled_patch16_224"
    c.data.name, c.data.train_split, c.data.eval_split = f"tfds:{name}", train, held_out
    c.data.train_size, c.data.eval_size, c.data.num_classes = sizes
    c.epochs, c.global_batch, c.micro_batch = 1000.0, 768, 64
    c.precision = "mixed_float16"
    c.augment.erasing = 0.0
    c.optim.peak_lr, c.optim.lr_batch = rate, 0
    c.optim.warmup_lr, c.optim.final_lr = 1e-6, 1e-6
    c.log.every_updates, c.eval.every_updates, c.checkpoint.every_updates = 10, 500, 500
    return c


def digits(before: bool) -> ConfigDict:
    """Return the quickstart's small DeiT on half of the digits: 0 to 4 (`before`), or then 5 to 9."""
    c = quickstart.scratch()
    c.data.name = "digits:01234" if before else "digits:56789"
    c.data.train_size, c.data.eval_size, c.data.num_classes = (672, 229, 5) if before else (675, 221, 5)
    if not before:
        c.init_from, c.total_updates = "runs/finetune-digits_before", 60
    return c


PRESETS = {
    "": flowers,
    "distilled": distilled,
    "cls": cls,
    "attention": lambda: only("attention"),
    "probe": lambda: only("heads"),
    "384": at_384,
    "cifar10": lambda: transfer("cifar10", "train", "test", (50_000, 10_000, 10)),
    "cifar100": lambda: transfer("cifar100", "train", "test", (50_000, 10_000, 100), 5e-6),
    "flowers102": lambda: transfer("oxford_flowers102", "train+validation", "test", (2040, 6149, 102)),
    "digits_before": lambda: digits(True),
    "digits": lambda: digits(False),
}
