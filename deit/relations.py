"""Fields of a configuration that must go together.

Promises: needs no device, no data and no TensorFlow; what is wrong names the fields, their values and the rule.
"""

from typing import Any

from deit import config as configuration
from deit import workdir
from deit.models import variants


def problem(config: Any) -> str | None:
    """Return the first pair of fields that do not go together, None where all do."""
    return next(filter(None, (relation(config) for relation in _RELATIONS)), None)


def _batch_divides(config) -> str | None:
    # 0 devices: known once they are counted, and checked again by config.resolve
    return configuration.batch_problem(config, max(1, config.devices) if config.strategy == "mirrored" else 1)


def _augmentations_fit(config) -> str | None:
    augment = config.augment
    if augment.randaugment and augment.three_augment:
        return "augment.three_augment (True) must be False where augment.randaugment is on: a recipe has one of them"
    if augment.randaugment and augment.jitter:
        return f"augment.jitter ({augment.jitter}) must be 0 where augment.randaugment is on: DeiT ignores it there"
    return None


def _optimizer_fits(config) -> str | None:
    optim, transformer = config.optim, config.model.variant.startswith(("deit", "keras_example"))
    if optim.name == "lamb" and optim.amsgrad:
        return "optim.amsgrad (True) must be False where optim.name is 'lamb'"
    if optim.name == "lamb" and not optim.decay_coupled:
        return "optim.decay_coupled (False) must be True where optim.name is 'lamb': its decay is part of its step"
    if not transformer and optim.layer_decay != 1:
        return f"optim.layer_decay ({optim.layer_decay}) must be 1 where model.variant is {config.model.variant!r}"
    if not transformer and optim.train_only == "attention":
        return f"optim.train_only ('attention') must be '' or 'heads' where model.variant is {config.model.variant!r}"
    return None


def _start_fits(config) -> str | None:
    if workdir.is_url(config.init_from):
        return f"init_from ({config.init_from!r}) must be a path of a mounted file system, not a URL"
    if config.init_weights != "raw" and not config.init_from:
        return f"init_weights ({config.init_weights!r}) must be 'raw' where init_from is ''"
    return None


def _teacher_fits(config) -> str | None:
    kind, teacher = config.distill.kind, config.teacher.kind
    if kind != "none" and teacher == "none":
        return f"teacher.kind ('none') must name a teacher where distill.kind is {kind!r}"
    if teacher in ("saved_model", "run") and not config.teacher.path:
        return f"teacher.path ('') must be given where teacher.kind is {teacher!r}"
    if teacher == "train" and not len(config.teacher.train):
        return "teacher.train must hold a configuration where teacher.kind is 'train'"
    if teacher == "train" and config.teacher.train.teacher.kind == "train":
        return "teacher.train.teacher.kind ('train') must be another kind: one teacher is trained before a student"
    if teacher == "train" and config.teacher.train.strategy not in ("auto", config.strategy):
        return f"teacher.train.strategy ({config.teacher.train.strategy!r}) must be 'auto' or the student's"
    return None


def _cache_fits(config) -> str | None:
    teacher = config.teacher
    if teacher.cache != "off" and not teacher.cache_dir:
        return f"teacher.cache_dir ('') must be given where teacher.cache is {teacher.cache!r}"
    if workdir.is_url(teacher.cache_dir):
        return f"teacher.cache_dir ({teacher.cache_dir!r}) must be a path of a mounted file system, not a URL"
    if teacher.cache != "off" and config.distill.kind == "none":
        return f"teacher.cache ({teacher.cache!r}) must be off where distill.kind is 'none': nothing asks the teacher"
    if config.distill.kind == "hard" and teacher.top_k:
        return f"teacher.top_k ({teacher.top_k}) must be 0 where distill.kind is 'hard': only the class is kept"
    if config.distill.kind == "hard" and teacher.logits_dtype != "float32":
        return f"teacher.logits_dtype ({teacher.logits_dtype!r}) must be float32 where distill.kind is 'hard'"
    return None


def _sha_is_hex(config) -> str | None:
    sha = config.teacher.sha256
    if sha and (len(sha) != 64 or set(sha.lower()) - set("0123456789abcdef")):
        return f"teacher.sha256 ({sha!r}) must be 64 hexadecimal digits"
    return None


def _heads_fit(config) -> str | None:
    model = config.model
    shape = variants.of_name(model.variant)
    if model.heads == "cls" and shape is not None and not shape.distilled:
        return (
            f"model.heads ('cls') must be 'all' where model.variant ({model.variant!r}) has no distillation token: "
            "the class head is the only one"
        )
    return None


_RELATIONS = (
    _batch_divides,
    _heads_fit,
    _augmentations_fit,
    _optimizer_fits,
    _start_fits,
    _teacher_fits,
    _cache_fits,
    _sha_is_hex,
)
