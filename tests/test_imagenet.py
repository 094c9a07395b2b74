"""The ImageNet presets: every number of the papers, and what --mode=plan makes of it."""

import re

import pytest

from configs import deit3_imagenet, deit_imagenet, finetune
from deit import config as configuration
from deit import plan, rules

IMAGES = 1_281_167
UPDATES_DEIT = round(300 * IMAGES / 1024)  # 375,342
SIZES = {"tiny": 5.7, "small": 22.1, "base": 86.6}  # million parameters, arXiv:2012.12877, table 1 (5, 22, 86)


def resolved(config):
    rules.validate(config)
    d = config.data
    return configuration.resolve(
        config,
        train_size=d.train_size,
        eval_size=d.eval_size,
        classes=[str(i) for i in range(d.num_classes)],
        replicas=1,
    )


@pytest.mark.parametrize("preset", deit_imagenet.PRESETS)
def test_deit_s_presets_have_the_paper_s_numbers(preset):
    c = resolved(deit_imagenet.get_config(preset))
    a, o, r = c.augment, c.optim, c.resolved
    assert (a.crop, a.randaugment, a.erasing, a.mixup, a.cutmix, a.mix_prob, a.mix_switch, a.repeats) == (
        "random_resized", "rand-m9-mstd0.5-inc1", 0.25, 0.8, 1.0, 1.0, 0.5, 3,
    )  # fmt: skip
    assert (tuple(a.scale), a.flip, c.loss.kind, c.loss.smoothing, c.model.drop_path) == (
        (0.08, 1.0),
        0.5,
        "ce",
        0.1,
        0.1,
    )
    assert (o.name, o.beta_1, o.beta_2, o.epsilon, o.clip_norm, o.decay_coupled) == (
        "adamw",
        0.9,
        0.999,
        1e-8,
        0.0,
        True,
    )
    assert (c.eval.crop_ratio, r.train_size) == (0.875, IMAGES)
    if preset.endswith("384"):
        assert (c.epochs, c.global_batch, c.data.image_size) == (30, 512, 384)
        assert (r.peak_lr, o.schedule, o.weight_decay, r.total_updates) == (
            5e-6,
            "constant",
            1e-8,
            round(30 * IMAGES / 512),
        )
    else:
        assert (c.epochs, c.global_batch, c.data.image_size) == (300, 1024, 224)
        assert (r.peak_lr, o.schedule, o.weight_decay, o.warmup_lr, o.final_lr) == (1e-3, "cosine", 0.05, 1e-6, 1e-5)
        assert (r.total_updates, r.warmup_updates) == (UPDATES_DEIT, round(5 * IMAGES / 1024))
    if "distilled" in preset:
        assert (c.distill.kind, c.distill.alpha, c.teacher.name) == ("hard", 0.5, "RegNetY160")


@pytest.mark.parametrize(
    "preset, rate, drop_path, size",
    [("small", 4e-3, 0.05, 224), ("base", 3e-3, 0.2, 192), ("large", 3e-3, 0.45, 192), ("huge", 3e-3, 0.6, 154)],
)
def test_deit_iii_s_presets_have_the_paper_s_numbers(preset, rate, drop_path, size):
    c = resolved(deit3_imagenet.get_config(preset))
    a, o, r = c.augment, c.optim, c.resolved
    assert (o.name, r.peak_lr, o.weight_decay, o.warmup_lr) == ("lamb", rate, 0.05, 1e-6)
    assert (c.epochs, c.global_batch, r.total_updates) == (800, 2048, round(800 * IMAGES / 2048))
    assert (c.loss.kind, c.loss.smoothing) == ("bce", 0.0)
    assert (a.three_augment, a.jitter, a.randaugment, a.erasing) == (True, 0.3, "", 0.0)
    assert (a.mixup, a.cutmix, a.repeats) == (0.8, 1.0, 3)
    assert (c.model.drop_path, c.data.image_size, c.eval.crop_ratio) == (drop_path, size, 1.0)


@pytest.mark.parametrize("preset", ["base_224", "large_224", "huge_224", "small_384"])
def test_deit_iii_is_fine_tuned_as_in_its_paper(preset):
    c = resolved(deit3_imagenet.get_config(preset))
    o, r = c.optim, c.resolved
    assert (o.name, r.peak_lr, o.weight_decay, c.epochs, c.global_batch) == ("adamw", 1e-5, 0.1, 20, 512)
    assert (c.loss.kind, c.loss.smoothing, c.augment.repeats, c.augment.erasing) == ("ce", 0.1, 1, 0.0)
    assert c.init_from == f"runs/deit3_imagenet-{preset.partition('_')[0]}"


@pytest.mark.parametrize("preset", finetune.PRESETS)
def test_every_fine_tuning_preset_is_valid(preset):
    c = resolved(finetune.get_config(preset))
    assert bool(c.init_from) != (preset == "digits_before")


def planned(config):
    """Return the plan's rows by name."""
    rules.validate(config)
    return dict(re.match(r"  (.{14}) (.*)", line).groups() for line in plan.offline(config, replicas=1).splitlines())


def row(rows, name):
    return rows[f"{name:<14}"]


def million(rows):
    return int(re.search(r"([\d,]+) parameters", row(rows, "student"))[1].replace(",", "")) / 1e6


@pytest.mark.parametrize("preset", ["tiny", "tiny_distilled", "small"])
def test_the_plan_of_deit_fits_the_paper(preset):
    rows = planned(deit_imagenet.get_config(preset))
    assert abs(million(rows) - SIZES[preset.partition("_")[0]]) < 0.25
    assert row(rows, "updates").startswith("375,342 (300.00 epochs), 6,256 of them warm-up")
    assert "peak 0.001 after scaling, cosine" in row(rows, "learning rate")
    assert "1,281,167 train (train), 50,000 evaluation (validation), 1000 classes" in row(rows, "data")


def test_the_cost_of_deit_b_is_the_paper_s_53_hours_on_8_gpus_within_a_tenth():
    c = resolved(deit_imagenet.get_config("base"))
    assert abs(plan.gpu_hours(2 * 17.6e9, c) / (8 * 53) - 1) < 0.1  # 17.6 G multiply-adds, arXiv:2012.12877, table 5


# (million parameters at 1000 classes, updates, rate): the tables of both papers, facebookresearch/deit's commands.
PLANS = {
    **{
        ("deit", f"{size}{distilled}"): (SIZES[size] + bool(distilled) * more, UPDATES_DEIT, "0.001")
        for size, more in (("tiny", 0.2), ("small", 0.4), ("base", 0.8))
        for distilled in ("", "_distilled")
    },
    ("deit", "base_384"): (86.9, round(30 * IMAGES / 512), "5e-06"),
    ("deit", "base_distilled_384"): (87.6, round(30 * IMAGES / 512), "5e-06"),
    ("deit3", "small"): (22.0, round(800 * IMAGES / 2048), "0.004"),
    ("deit3", "base"): (86.6, round(800 * IMAGES / 2048), "0.003"),
    ("deit3", "large"): (304.4, round(800 * IMAGES / 2048), "0.003"),
    ("deit3", "huge"): (632.1, round(800 * IMAGES / 2048), "0.003"),
    ("deit3", "base_224"): (86.6, round(20 * IMAGES / 512), "1e-05"),
    ("deit3", "large_224"): (304.4, round(20 * IMAGES / 512), "1e-05"),
    ("deit3", "huge_224"): (632.1, round(20 * IMAGES / 512), "1e-05"),
    ("deit3", "small_384"): (22.0, round(20 * IMAGES / 512), "1e-05"),
}


def test_every_preset_has_a_plan_to_be_held_against():
    presets = {("deit", name) for name in deit_imagenet.PRESETS} | {("deit3", name) for name in deit3_imagenet.PRESETS}
    assert presets == PLANS.keys()


@pytest.mark.slow
@pytest.mark.parametrize("family, preset", PLANS)
def test_the_plan_of_every_preset_fits_its_paper(family, preset):
    parameters, updates, rate = PLANS[family, preset]
    rows = planned({"deit": deit_imagenet, "deit3": deit3_imagenet}[family].get_config(preset))
    assert abs(million(rows) - parameters) < 0.3
    assert row(rows, "updates").startswith(f"{updates:,} (")
    assert f"peak {rate} after scaling" in row(rows, "learning rate")
    assert re.search(r"about [\d,.]+ V100-hours at 20% of 125 TFLOP/s", row(rows, "compute"))
