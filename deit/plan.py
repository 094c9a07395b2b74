"""What a run will do and cost, before it does it: sizes, parameters, FLOPs, batch, updates, lr, disk, memory.

Promises: numbers come from the resolved configuration and from the student's own graph, not from tables;
`offline` trains, downloads and writes nothing, and marks what it could not check.
"""

import math
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from deit import config as configuration
from deit import cost, errors, estimates, job, teachers, warm_start
from deit.data import sources
from deit.models import factory, fused_block, paths
from deit.teachers import labels

# Resident bytes of a process on a CPU with TensorFlow 2.15.1 that has traced and optimised an update, no tensors.
_BASE_MEMORY = 0.8e9
_V100 = estimates.GPUS["V100-16GB"]
_UTILISATION = 0.2


def describe(
    config, *, network: factory.Network, teacher: str, teacher_flops: float = math.nan, note: str = "", start: str = ""
) -> str:
    """Return the plan of a resolved configuration as lines of `name  value`.

    `teacher` and `start` are lines on the teacher and on the checkpoint that the weights come from; `teacher_flops` is
    what the teacher's answer to one image costs, nan where nobody counted.
    """
    r, o = config.resolved, config.optim
    with fused_block.compiling(True):  # the same numbers on every machine
        spent = cost.of(network.logits, network.image_size)
    sizes = {path: int(np.prod(variable.shape)) for path, variable in paths.variables(network.model)}
    count, trained = sum(sizes.values()), sum(n for path, n in sizes.items() if paths.trains(path, o.train_only))
    copies = 2 + bool(o.ema_decay) + o.amsgrad  # two moments (Adam's, LAMB's), of what is trained
    disk = 4 * (count + trained * copies)
    weights = estimates.weights_bytes(config, count=count, trained=trained)
    calibrated = estimates.read(config)
    source = f"calibrated {calibrated.measured}" if calibrated else "estimate"
    memory = (
        (calibrated.base_bytes if calibrated else _BASE_MEMORY)
        + weights
        + disk  # the snapshot being written
        + config.micro_batch * estimates.kept_bytes(config, spent, calibrated)
        + 3 * config.data.image_size**2 * config.global_batch * 4  # uint8 batches in flight
    )
    rows = {
        "data": f"{config.data.name}  {r.train_size:,} train ({config.data.train_split}), "
        f"{r.eval_size:,} evaluation ({config.data.eval_split}), {len(r.classes)} classes{note}",
        "augmentation": _augmentation(config.augment),
        "student": f"{_student(config)}  {count:,} parameters, {spent.flops / 1e9:.2f} GFLOPs an image forward",
        "weights from": start,
        "teacher": teacher,
        "answers": _answers(config),
        "distillation": _distillation(config, two_heads="dist" in network.model.output),
        "batch": f"{r.replicas} replicas x {config.micro_batch} micro_batch x {r.accum_steps} accum_steps = "
        f"{config.global_batch} global_batch",
        "updates": f"{r.total_updates:,} ({r.total_updates * config.global_batch / r.train_size:.2f} epochs), "
        f"{r.warmup_updates:,} of them warm-up",
        "loss": _loss(config),
        "learning rate": f"{o.name}, peak {r.peak_lr:.4g} after scaling, {o.schedule}{_layers(o)}",
        "trained": f"{o.train_only} alone, {trained:,} parameters" if o.train_only else "",
        "weight decay": _decay(o),
        "precision": config.precision,
        "compute": _compute(spent.flops, teacher_flops, config),
        "disk": f"{disk / 1e6:.0f} MB a checkpoint, {config.checkpoint.keep} newest + best are kept",
        "memory": f"about {memory / 1e9:.1f} GB without the teacher ({source})",
        "speed here": _speed(spent, calibrated, config),
        **_gpus(spent, weights, config),
    }
    return "\n".join(f"  {name:<14} {value}" for name, value in rows.items() if value)


def _speed(spent: cost.Cost, calibrated: estimates.Calibration | None, config) -> str:
    """Return images/s of the student's updates on this machine, and how long the run's take."""
    if factory.shape_of(config.model) is None:
        return ""
    if calibrated is None:
        command = " ".join(["python tools/benchmark.py calibrate", *estimates.flags(config)])
        return f"not calibrated: {command} (two minutes)"
    rate = calibrated.machine.images_per_sec(spent, estimates.passes(config))
    return (
        f"about {rate:.3g} images/s of the student's updates, {_images(config) / rate / 3600:.3g} hours in all on "
        f"one such machine (calibrated {calibrated.measured}, {calibrated.worst:.0%} off at most there)"
    )


def _gpus(spent: cost.Cost, weights: float, config) -> dict[str, str]:
    """Return a row on a V100 and one on other GPUs, from their data sheets; none where the FLOPs are not known."""
    if math.isnan(spent.flops):
        return {}
    passes = estimates.passes(config)
    rates = {
        name: estimates.gpu_images_per_sec(gpu, spent, config.precision, passes) for name, gpu in estimates.GPUS.items()
    }
    kept = estimates.kept_bytes(config, spent)
    memory = estimates.gpu_memory(weights=weights, kept=kept, micro_batch=config.micro_batch)
    first, *others = rates
    hours = _images(config) / rates[first] / 3600
    own = f"about {rates[first]:,.0f} images/s of the student's updates, {hours:.3g} hours"
    if math.isnan(rates[first]):
        own = f"has no units for bfloat16 ({config.precision})"
    room = (
        f"{memory / 1e9:.1f} of {estimates.GPUS[first].memory / 1e9:.0f} GB for a micro-batch of {config.micro_batch}"
    )
    listed = ", ".join(f"{name} {rates[name]:,.0f}" for name in others if not math.isnan(rates[name]))
    return {first: f"{own}, {room} (estimate from FLOPs and bytes)", "other GPUs": f"{listed} images/s (estimates)"}


def gpu_hours(flops: float, config) -> float:
    """Return hours of a V100 that `flops` an image take over a run's updates, at a fifth of its peak.

    A student's update is three times its forward pass (twice that backward), a teacher's answer one. The fifth is what
    the paper's own time comes to: DeiT-B, 300 epochs, 53 hours on 8 V100 (arXiv:2012.12877, section 5.6), 3 x 35
    GFLOPs an image. Smaller networks reach less. Evaluation is not in it. nan: a V100 does not do this precision.
    """
    return flops * _images(config) / (_UTILISATION * estimates.gpu_flops(_V100, config.precision)) / 3600.0


def _images(config) -> int:
    return config.resolved.total_updates * config.global_batch


def _compute(forward: float, teacher: float, config) -> str:
    """Return what the updates cost: the student's, and the teacher's where it is asked during the run."""
    student, unknown = forward * estimates.passes(config), ""
    asked = config.distill.kind != "none" and config.teacher.cache != "read"
    if not asked or math.isnan(teacher):
        teacher, unknown = 0.0, "; the teacher's answers are not counted" if asked else ""
    total, peak = (student + teacher) * _images(config), estimates.gpu_flops(_V100, config.precision)
    if math.isnan(peak):
        return f"{total:.3g} FLOPs{unknown}; a V100 has no units for bfloat16"
    hours = [_hours(gpu_hours(flops, config)) for flops in (student, teacher) if flops]
    shares = f"{hours[0]} for the student and {hours[1]} for the teacher's answers" if teacher else hours[0]
    return f"{total:.3g} FLOPs, by these alone {shares} at {_UTILISATION:.0%} of {peak / 1e12:g} TFLOP/s{unknown}"


def _hours(hours: float) -> str:
    """Return hours of a V100 for people."""
    if hours < 1:
        return f"{60 * hours:.2g} V100-minutes"
    return f"{hours:,.{1 if hours < 100 else 0}f} V100-hours"


def size(count: float) -> str:
    """Return a number of bytes for people."""
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return f"{count / factor:.3g} {unit}"
    return f"{count:.0f} bytes"


def _student(config) -> str:
    """Return the network's name, and what its name does not say."""
    model, side, shape = config.model, config.data.image_size, factory.shape_of(config.model)
    left = side % shape.patch if shape is not None else 0
    parts = [
        f"patch {model.patch}" if model.patch else "",
        f"{model.registers} register tokens" if model.registers else "",
        "class head only" if model.heads == "cls" else "",
        f"the last {left} px at the right and at the bottom are not seen" if left else "",
    ]
    return ", ".join(filter(None, (f"{model.variant} at {side} px", *parts)))


def _loss(config) -> str:
    parts = [
        "binary cross-entropy" if config.loss.kind == "bce" else "cross-entropy",
        f"smoothing {config.loss.smoothing:g}" if config.loss.smoothing else "",
        f"drop-path {config.model.drop_path:g}" if config.model.drop_path else "",
        f"gradients clipped to a norm of {config.optim.clip_norm:g}" if config.optim.clip_norm else "",
    ]
    return ", ".join(filter(None, parts))


def _decay(o) -> str:
    """Return weight decay and whom it spares."""
    rule = "x lr (PyTorch, DeiT paper)" if o.decay_coupled else "per update, not x lr (tensorflow-addons)"
    spared = "1-D tensors, biases, position embedding and tokens excluded" if o.decay_exclude else "on everything"
    if o.name == "lamb":
        rule = "inside the step, before that takes the norm of its variable"
        spared += ", and their steps keep their norm" if o.decay_exclude else ""
    return f"{o.weight_decay:g} {rule}; {spared}"


def _layers(o) -> str:
    return f"; a layer's step is {o.layer_decay:g} of that of the one above" if o.layer_decay != 1 else ""


def _augmentation(a) -> str:
    mixing = [f"{name} {a[name]:g}" for name in ("mixup", "cutmix") if a[name]]
    parts = [
        a.crop,
        f"flip {a.flip:g}" if a.flip else "",
        a.randaugment,
        "three_augment" if a.three_augment else "",
        f"jitter {a.jitter:g}" if a.jitter else "",
        f"erasing {a.erasing:g}" if a.erasing else "",
        f"{' and '.join(mixing)} in groups of {a.mix_group}" if configuration.mixes(a) else "",
        f"a group mixed with probability {a.mix_prob:g}" if configuration.mixes(a) and a.mix_prob < 1 else "",
        f"{a.repeats} views of an example in a row" if a.repeats > 1 else "",
    ]
    return ", ".join(filter(None, parts))


def _answers(config) -> str:
    if config.distill.kind == "none":
        return ""
    form, total = labels.layout(config), config.resolved.total_updates * config.global_batch
    told = {"hard": "the class", "soft": f"{form.kept} of {form.classes} logits, {form.dtype}"}[form.kind]
    kept = f"{config.teacher.cache} in {config.teacher.cache_dir}, {size(form.bytes_per_position() * total)} in all"
    where = "computed" if config.teacher.cache == "off" else kept
    return f"{told}; {where}; by the teacher in batches of {labels.rows_a_pass(config)}"


def _distillation(config, *, two_heads: bool) -> str:
    d = config.distill
    if d.kind == "none":
        trained = "none; the average of both heads is trained" if two_heads else "none"
        return trained + ("" if config.teacher.kind == "none" else "; the teacher only measures agreement")
    soft = f", tau {d.tau:g}, {d.form}, reduced by {d.reduction}" if d.kind == "soft" else ""
    return f"{d.kind}, alpha {d.alpha:g} ({d.weighting}){soft}"


def offline(config: ConfigDict, *, replicas: int, workdir: Path | None = None) -> str:
    """Return the plan without training: data sizes from what is prepared, else from the configuration.

    `workdir`: of the run; where it has checkpoints, `init_from` is no longer looked at. Errors: UserError.
    """
    begins = bool(config.init_from) and not (workdir and job.has_checkpoints(workdir))
    found = sources.sizes(config.data)
    note = "" if found else "  [not checked: the data is absent]"
    classes = sources.classes(config.data) if found and begins else None
    train, held_out, count = found or (config.data.train_size, config.data.eval_size, config.data.num_classes)
    resolved = configuration.resolve(
        config,
        train_size=train,
        eval_size=held_out,
        classes=classes or [str(i) for i in range(count)],
        replicas=replicas,
    )
    network = factory.build(
        config.model,
        num_classes=count,
        image_size=config.data.image_size,
        precision=config.precision,
        load_weights=False,  # a backbone's are neither downloaded nor read
    )
    start = ""
    if begins and not Path(config.init_from).exists():
        start = f"{config.init_from} ({config.init_weights})  [not checked: it is absent]"
    elif begins:
        start = warm_start.describe(resolved, network, classes)
    if config.teacher.kind == "train" and not (workdir and job.has_checkpoints(workdir / "teacher")):
        _check_start(config.teacher.train)
    taught_by = teachers.describe(config, count)
    return describe(
        resolved, network=network, teacher=taught_by.line, teacher_flops=taught_by.flops, note=note, start=start
    )


def _check_start(teacher: ConfigDict) -> None:
    """Refuse an `init_from` of the teacher that is trained first, where there is one. Errors: UserError."""
    if teacher.init_from and Path(teacher.init_from).exists():
        try:
            warm_start.check(teacher, sources.classes(teacher.data))
        except errors.UserError as error:
            raise errors.UserError(f"teacher.train: {error}") from error
