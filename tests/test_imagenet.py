"""The ImageNet presets: every number of the papers, and what --mode=plan makes of it."""

import re
from pathlib import Path

import pytest

from configs import base, deit3_imagenet, deit_imagenet, finetune
from deit import config as configuration
from deit import plan, rules
from deit.data import sources
from tests.published import DEIT, DEIT3, DEIT3_FINER, DEIT_384, PARAMETERS, TRANSFER

IMAGES = 1_281_167
UPDATES_DEIT = round(300 * IMAGES / 1024)  # 375,342
GIGA = {"tiny": 1.26, "small": 4.6, "base": 17.5}  # multiply-adds, facebookresearch/deit README_revenge.md; timm
IMAGENET = {
    "data.name": "tfds:imagenet2012",
    "data.train_split": "train",
    "data.eval_split": "validation",
    "data.train_size": IMAGES,
    "data.eval_size": 50_000,
    "data.num_classes": 1000,
    "precision": "mixed_float16",
}
TAUGHT = {
    "distill.kind": "hard",
    "teacher.kind": "keras_application",
    "teacher.name": "RegNetY160",
    "teacher.min_accuracy": 0.7,
}
ALONE = {"distill.kind": "none", "teacher.kind": "none"}
# A group that shares its mixing is a whole process' batch in the papers: here it must divide micro-batches.
BATCH_1024 = {"global_batch": 1024, "augment.mix_group": 64, "init_from": ""}
BATCH_2048 = {"global_batch": 2048, "augment.mix_group": 64, "init_from": ""}
BATCH_512 = {"global_batch": 512, "augment.mix_group": 32}


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


def held(config):
    return dict(configuration.flatten(config))


def assert_holds(config, expected):
    """Every field of a recipe is expected, and has the value expected."""
    found = held(config)
    recipe = {name for name in found if name.split(".")[0] in ("augment", "optim", "loss")} - {"augment.resize_margin"}
    assert recipe - expected.keys() == set()
    assert {name: found[name] for name in expected} == expected


@pytest.mark.parametrize("distilled", ["", "_distilled"])
@pytest.mark.parametrize("size", ["tiny", "small", "base"])
def test_deit_s_presets_have_the_paper_s_numbers(size, distilled):
    config = deit_imagenet.get_config(f"{size}{distilled}")
    variant = {"model.variant": f"deit_{size}{distilled}_patch16_224"}
    assert_holds(config, {**DEIT, **IMAGENET, **BATCH_1024, **variant, **(TAUGHT if distilled else ALONE)})
    found = resolved(config).resolved
    assert found.peak_lr == 1e-3  # 5e-4 x 1024 / 512
    assert (found.total_updates, found.warmup_updates) == (UPDATES_DEIT, round(5 * IMAGES / 1024))


@pytest.mark.parametrize("distilled", ["", "_distilled"])
def test_deit_b_is_fine_tuned_at_384_px_as_its_authors_do(distilled):
    config = deit_imagenet.get_config(f"base{distilled}_384")
    expected = {
        "model.variant": f"deit_base{distilled}_patch16_384",
        "init_from": f"runs/deit_imagenet-base{distilled}",
    }
    assert_holds(config, {**DEIT_384, **IMAGENET, **BATCH_512, **expected, **(TAUGHT if distilled else ALONE)})
    found = resolved(config).resolved
    assert (found.peak_lr, found.total_updates) == (5e-6, round(30 * IMAGES / 512))


@pytest.mark.parametrize(
    "size, patch, px, rate, drop_path",
    [
        ("small", 16, 224, 4e-3, 0.05),
        ("base", 16, 192, 3e-3, 0.2),
        ("large", 16, 192, 3e-3, 0.45),
        ("huge", 14, 160, 3e-3, 0.6),
    ],
)
def test_deit_iii_s_presets_have_the_paper_s_numbers(size, patch, px, rate, drop_path):
    config = deit3_imagenet.get_config(size)
    expected = {"model.variant": f"deit3_{size}_patch{patch}_224", "data.image_size": px, "optim.peak_lr": rate}
    assert_holds(config, {**DEIT3, **IMAGENET, **BATCH_2048, **ALONE, **expected, "model.drop_path": drop_path})
    found = resolved(config).resolved
    assert (found.peak_lr, found.total_updates) == (rate, round(800 * IMAGES / 2048))


@pytest.mark.parametrize(
    "size, patch, px, drop_path",
    [("base", 16, 224, 0.2), ("large", 16, 224, 0.45), ("huge", 14, 224, 0.55), ("small", 16, 384, 0.0)],
)
def test_deit_iii_is_fine_tuned_as_in_its_paper(size, patch, px, drop_path):
    config = deit3_imagenet.get_config(f"{size}_{px}")
    expected = {
        "model.variant": f"deit3_{size}_patch{patch}_{px}",
        "data.image_size": px,
        "model.drop_path": drop_path,
        "init_from": f"runs/deit3_imagenet-{size}",
    }
    assert_holds(config, {**DEIT3_FINER, **IMAGENET, **BATCH_512, **ALONE, **expected})
    assert resolved(config).resolved.total_updates == round(20 * IMAGES / 512)


@pytest.mark.parametrize(
    "preset, data, sizes, rate",
    [
        ("cifar10", "tfds:cifar10", (50_000, 10_000, 10), 7.5e-6),
        ("cifar100", "tfds:cifar100", (50_000, 10_000, 100), 5e-6),
        ("flowers102", "tfds:oxford_flowers102", (2040, 6149, 102), 7.5e-6),
    ],
)
def test_transfer_has_the_numbers_of_deit_s_author(preset, data, sizes, rate):
    config = finetune.get_config(preset)
    variant = "deit_base_distilled_patch16_224"
    expected = {
        "model.variant": variant,
        "init_from": f"weights/{variant}",
        "data.name": data,
        "global_batch": 768,
        "optim.peak_lr": rate,
    }
    assert_holds(config, {**TRANSFER, **ALONE, **expected, "augment.mix_group": 64, "precision": "mixed_float16"})
    assert (config.data.train_size, config.data.eval_size, config.data.num_classes) == sizes


FLOWERS = {
    "init_from": "weights/deit_tiny_distilled_patch16_224",
    "augment.crop": "random_resized",
    "augment.scale": (0.35, 1.0),
    "eval.crop_ratio": 0.875,
    "optim.peak_lr": 5e-4,
    "optim.layer_decay": 0.75,
}


@pytest.mark.parametrize(
    "preset, changes",
    [
        ("", {}),
        ("distilled", {"distill.kind": "hard", "teacher.kind": "run", "teacher.path": "runs/teacher_flowers"}),
        ("cls", {"model.heads": "cls"}),
        ("attention", {"optim.train_only": "attention", "optim.layer_decay": 1.0}),
        ("probe", {"optim.train_only": "heads", "optim.layer_decay": 1.0}),
        ("384", {"data.image_size": 384, "micro_batch": 8}),
    ],
)
def test_fine_tuning_on_flowers_changes_what_its_table_says(preset, changes):
    default = held(base.get_config())
    expected = {**FLOWERS, **changes}
    changed = {name: value for name, value in held(finetune.get_config(preset)).items() if value != default[name]}
    assert changed == {name: value for name, value in expected.items() if value != default[name]}


@pytest.mark.parametrize("preset", finetune.PRESETS)
def test_every_fine_tuning_preset_is_valid(preset):
    c = resolved(finetune.get_config(preset))
    assert bool(c.init_from) != (preset == "digits_before")


@pytest.mark.parametrize("preset", ["digits_before", "digits"])
def test_the_digits_are_as_many_as_the_preset_says(preset):
    d = finetune.get_config(preset).data
    assert sources.sizes(d) == (d.train_size, d.eval_size, d.num_classes)


def planned(config):
    """Return the plan's rows by name."""
    rules.validate(config)
    return dict(re.match(r"  (.{14}) (.*)", line).groups() for line in plan.offline(config, replicas=1).splitlines())


def row(rows, name):
    return rows[f"{name:<14}"]


def million(rows):
    return int(re.search(r"([\d,]+) parameters", row(rows, "student"))[1].replace(",", "")) / 1e6


def gigaflops(rows):
    return float(re.search(r"([\d.]+) GFLOPs an image", row(rows, "student"))[1])


def v100_hours(rows):
    """Return the hours that the plan counts for the student and for the teacher."""
    found = [float(hours.replace(",", "")) for hours in re.findall(r"([\d,.]+) V100-hours", row(rows, "compute"))]
    return (*found, 0.0)[:2]


@pytest.mark.parametrize("preset", ["tiny", "small"])
def test_the_plan_of_deit_fits_the_paper(preset):
    rows = planned(deit_imagenet.get_config(preset))
    assert round(million(rows) * 1e6) == PARAMETERS[f"deit_{preset}_patch16_224"]
    # Less than published: the last block computes its prefix tokens only.
    assert 0.9 < gigaflops(rows) / 2 / GIGA[preset] < 1.0
    assert row(rows, "updates").startswith("375,342 (300.00 epochs), 6,256 of them warm-up")
    assert "peak 0.001 after scaling, cosine" in row(rows, "learning rate")
    assert "1,281,167 train (train), 50,000 evaluation (validation), 1000 classes" in row(rows, "data")


def test_hours_are_floating_point_operations_over_a_fifth_of_the_peak():
    config = deit_imagenet.get_config("base")
    expected = 6e9 * UPDATES_DEIT * 1024 / (0.2 * 125e12) / 3600
    assert plan.gpu_hours(6e9, resolved(config)) == pytest.approx(expected)
    config.precision = "float32"
    assert plan.gpu_hours(6e9, resolved(config)) == pytest.approx(expected * 125 / 15.7)


@pytest.mark.slow
def test_the_utilisation_is_calibrated_on_the_53_hours_of_deit_b_on_8_gpus():
    student, teacher = v100_hours(planned(deit_imagenet.get_config("base")))
    assert abs(student / (8 * 53) - 1) < 0.1 and teacher == 0  # arXiv:2012.12877, section 5.6


@pytest.mark.slow
def test_the_teacher_s_answers_are_counted_where_they_are_computed():
    """RegNetY-16GF: 15.9 G multiply-adds (arXiv:2003.13678, table 5), once an image."""
    config = deit_imagenet.get_config("tiny_distilled")
    _, teacher = v100_hours(planned(config))
    assert teacher == pytest.approx(2 * 15.9e9 * UPDATES_DEIT * 1024 / (0.2 * 125e12) / 3600, rel=0.01)
    config.unlock()
    config.teacher.cache, config.teacher.cache_dir = "read", "answers"
    assert v100_hours(planned(config))[1] == 0


# (timm's name of the network, updates, rate): the tables of both papers, facebookresearch/deit's commands.
PLANS = {
    **{
        ("deit", f"{size}{distilled}"): (f"deit_{size}{distilled}_patch16_224", UPDATES_DEIT, "0.001")
        for size in ("tiny", "small", "base")
        for distilled in ("", "_distilled")
    },
    ("deit", "base_384"): ("deit_base_patch16_384", round(30 * IMAGES / 512), "5e-06"),
    ("deit", "base_distilled_384"): ("deit_base_distilled_patch16_384", round(30 * IMAGES / 512), "5e-06"),
    ("deit3", "small"): ("deit3_small_patch16_224", round(800 * IMAGES / 2048), "0.004"),
    ("deit3", "base"): ("deit3_base_patch16_224", round(800 * IMAGES / 2048), "0.003"),
    ("deit3", "large"): ("deit3_large_patch16_224", round(800 * IMAGES / 2048), "0.003"),
    ("deit3", "huge"): ("deit3_huge_patch14_224", round(800 * IMAGES / 2048), "0.003"),
    ("deit3", "base_224"): ("deit3_base_patch16_224", round(20 * IMAGES / 512), "1e-05"),
    ("deit3", "large_224"): ("deit3_large_patch16_224", round(20 * IMAGES / 512), "1e-05"),
    ("deit3", "huge_224"): ("deit3_huge_patch14_224", round(20 * IMAGES / 512), "1e-05"),
    ("deit3", "small_384"): ("deit3_small_patch16_384", round(20 * IMAGES / 512), "1e-05"),
}
# What a grid of patches that is smaller than that of 224 px takes off the position embedding.
LESS = {
    ("deit3", "base"): (196 - 144) * 768,
    ("deit3", "large"): (196 - 144) * 1024,
    ("deit3", "huge"): (256 - 121) * 1280,
}


def test_every_preset_has_a_plan_to_be_held_against():
    presets = {("deit", name) for name in deit_imagenet.PRESETS} | {("deit3", name) for name in deit3_imagenet.PRESETS}
    assert presets == PLANS.keys()


def documented():
    """Return the table of plans in docs/recipes.md: {preset: cells}."""
    lines = (Path(__file__).parents[1] / "docs" / "recipes.md").read_text(encoding="utf-8").splitlines()
    rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines if "_imagenet.py:" in line)
    return {name: cells for name, *cells in rows}


def test_the_table_of_plans_has_every_preset():
    assert documented().keys() == {f"`{family}_imagenet.py:{preset}`" for family, preset in PLANS}


@pytest.mark.slow
@pytest.mark.parametrize("family, preset", PLANS)
def test_the_plan_of_every_preset_fits_its_paper(family, preset):
    variant, updates, rate = PLANS[family, preset]
    rows = planned({"deit": deit_imagenet, "deit3": deit3_imagenet}[family].get_config(preset))
    assert round(million(rows) * 1e6) == PARAMETERS[variant] - LESS.get((family, preset), 0)
    assert row(rows, "updates").startswith(f"{updates:,} (")
    assert f"peak {rate} after scaling" in row(rows, "learning rate")
    hours = v100_hours(rows)
    assert "at 20% of 125 TFLOP/s" in row(rows, "compute")
    assert bool(hours[1]) == ("distilled" in preset)
    # What docs/recipes.md says of it.
    cells = documented()[f"`{family}_imagenet.py:{preset}`"]
    assert cells == [
        f"{million(rows):.1f} M",
        f"{gigaflops(rows):.1f}",
        f"{updates:,}",
        rate,
        *(f"{spent:,.0f}" if spent else "" for spent in hours),
    ]
