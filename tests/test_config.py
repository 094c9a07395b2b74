"""Configuration: one bad value a field, relations, units, what may differ on resume, json there and back."""

import json
import math

import pytest

from configs import base, deit3_imagenet, deit_imagenet, deit_tiny_flowers, finetune, quickstart, teacher_flowers
from deit import config as configuration
from deit import errors, rules

PRESETS = {
    "base": base.get_config,
    "teacher_flowers": teacher_flowers.get_config,
    **{f"deit_tiny_flowers:{a}": (lambda a=a: deit_tiny_flowers.get_config(a)) for a in deit_tiny_flowers.PRESETS},
    **{f"deit_imagenet:{a}": (lambda a=a: deit_imagenet.get_config(a)) for a in deit_imagenet.PRESETS},
    **{f"deit3_imagenet:{a}": (lambda a=a: deit3_imagenet.get_config(a)) for a in deit3_imagenet.PRESETS},
    **{f"finetune:{a}": (lambda a=a: finetune.get_config(a)) for a in finetune.PRESETS},
    **{f"quickstart:{a}": (lambda a=a: quickstart.get_config(a)) for a in quickstart.PRESETS},
}


def resolve(config, *, train_size=3303, replicas=1):
    return configuration.resolve(config, train_size=train_size, eval_size=367, classes="abcde", replicas=replicas)


def changed(**fields):
    config = base.get_config()
    config.update_from_flattened_dict(fields)
    return config


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_valid_locked_and_has_exactly_the_fields_of_base(name):
    config = PRESETS[name]()
    rules.validate(config)
    assert {key for key, _ in configuration.flatten(config)} == {
        key for key, _ in configuration.flatten(base.get_config())
    }
    if name != "base":
        with pytest.raises(AttributeError):
            config.stranger = 1


BAD = {
    "seed": -1, "epochs": 0.0, "total_updates": -1, "global_batch": 0, "micro_batch": 0, "precision": "float64",
    "tpu": "", "startup_seconds": 0.0, "init_weights": "best",
    "model.patch": -1, "model.registers": -1, "model.heads": "both", "model.norm_epsilon": 0.0,
    "optim.name": "adam", "optim.layer_decay": 1.5, "optim.train_only": "mlp",
    "strategy": "all", "devices": -1, "max_skipped": 0, "data.name": "flowers", "data.image_size": 4,
    "data.train_size": 0, "data.eval_size": 0, "data.num_classes": 1, "data.max_bad_fraction": 1.5,
    "data.threads": -1, "data.split_seed": -1, "data.max_ram_bytes": 0, "data.max_pixels": 0,
    "augment.randaugment": "rand-m9-mstd0.5", "augment.jitter": 1.5, "augment.erasing": -0.25, "augment.mixup": -0.8,
    "augment.cutmix": -1.0, "augment.mix_prob": 2.0, "augment.mix_switch": -1.0, "augment.mix_group": 1,
    "augment.repeats": 0, "augment.crop": "centre", "augment.resize_margin": -1, "augment.scale": (0.5, 0.1),
    "augment.ratio": (2.0, 1.0), "augment.flip": 1.1, "model.seed": -3, "model.drop_path": 1.0,
    "model.mean": (0.5,), "model.std": (1.0, 1.0, 0.0), "optim.peak_lr": 0.0, "optim.lr_batch": -1,
    "optim.schedule": "linear", "optim.warmup_epochs": -1.0, "optim.warmup_lr": -1.0, "optim.final_lr": -1.0,
    "optim.weight_decay": -0.1, "optim.beta_1": 1.0, "optim.beta_2": 1.0, "optim.epsilon": 0.0,
    "optim.clip_norm": -1.0, "optim.ema_decay": 1.0, "loss.kind": "mse", "loss.smoothing": 1.0,
    "distill.kind": "warm", "distill.alpha": 1.2, "distill.tau": 0.0, "distill.form": "js",
    "distill.reduction": "sum", "distill.weighting": "none", "teacher.kind": "bit", "teacher.image_size": -1,
    "teacher.batch": 0, "teacher.range": (1.0, 0.0), "teacher.mean": (0.5,), "teacher.std": (1.0, 0.0, 1.0),
    "teacher.members": ("run:runs/a",), "teacher.precision": "bf16", "teacher.top_k": -1,
    "teacher.logits_dtype": "int8", "teacher.cache": "on", "teacher.min_accuracy": 91.0,
    "teacher.sha256": "abc", "checkpoint.every_updates": -1, "checkpoint.every_minutes": -0.5,
    "checkpoint.keep_every": -1, "checkpoint.max_failed": -1,
    "checkpoint.keep": 0, "eval.every_updates": -1, "eval.batch": 0, "eval.crop_ratio": 1.5, "log.every_updates": 0,
}  # fmt: skip

# Any value is legal, or the value is checked against the machine: paths, names of networks, booleans, free text.
UNBOUNDED = {
    "init_from",
    "data.data_dir", "data.train_split", "data.eval_split", "model.variant", "model.backbone", "model.weights",
    "model.cut", "optim.decay_coupled", "optim.decay_exclude", "optim.amsgrad", "augment.three_augment",
    "teacher.path", "teacher.name", "teacher.weights", "teacher.class_names", "teacher.background",
    "teacher.cache_dir", "teacher.allow_ties", "xla", "model.fused_gradients",
}  # fmt: skip


def test_every_field_of_base_has_a_bad_value_or_a_reason_to_have_none():
    assert {name for name, _ in configuration.flatten(base.get_config())} == BAD.keys() | UNBOUNDED


@pytest.mark.parametrize("name", BAD)
def test_a_bad_value_is_refused_with_its_name_and_value(name):
    with pytest.raises(errors.UserError) as caught:
        rules.validate(changed(**{name: BAD[name]}))
    assert name in str(caught.value)
    assert str(BAD[name]) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_number_that_is_not_finite_is_refused(value):
    with pytest.raises(errors.UserError, match=r"optim.weight_decay .* must be finite"):
        rules.validate(changed(**{"optim.weight_decay": value}))


def test_a_cache_needs_a_directory_that_is_mounted_and_something_to_ask():
    taught = {"distill.kind": "hard", "teacher.kind": "run", "teacher.path": "runs/a", "teacher.cache": "read"}
    for changes, message in (
        ({}, r"teacher.cache_dir \(''\) must be given"),
        ({"teacher.cache_dir": "gs://b/c"}, r"teacher.cache_dir \('gs://b/c'\) must be a path"),
        ({"teacher.cache_dir": "c", "distill.kind": "none"}, r"teacher.cache \('read'\) must be off"),
        ({"teacher.cache_dir": "c", "teacher.top_k": 3}, r"teacher.top_k \(3\) must be 0"),
        ({"teacher.cache_dir": "c", "teacher.logits_dtype": "float16"}, r"teacher.logits_dtype \('float16'\)"),
    ):
        with pytest.raises(errors.UserError, match=message):
            rules.validate(changed(**{**taught, **changes}))


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"optim.name": "lamb", "optim.amsgrad": True}, r"optim.amsgrad \(True\) must be False"),
        ({"optim.name": "lamb", "optim.decay_coupled": False}, r"optim.decay_coupled \(False\) must be True"),
        ({"model.variant": "backbone", "optim.layer_decay": 0.7}, r"optim.layer_decay \(0.7\) must be 1 where"),
        ({"model.variant": "backbone", "optim.train_only": "attention"}, r"train_only \('attention'\) must be ''"),
        ({"init_from": "gs://b/x"}, r"init_from \('gs://b/x'\) must be a path of a mounted file system"),
        ({"init_weights": "ema"}, r"init_weights \('ema'\) must be 'raw' where init_from is ''"),
    ],
)
def test_settings_of_optimizer_and_start_that_do_not_go_together_are_refused(fields, message):
    with pytest.raises(errors.UserError, match=message):
        rules.validate(changed(**fields))


def test_the_class_head_alone_is_no_choice_where_there_is_no_other_head():
    for variant in ("deit_tiny_patch16_224", "deit3_small_patch16_224.fb_in1k"):
        with pytest.raises(errors.UserError, match=r"model.heads \('cls'\) must be 'all' where model.variant \('deit"):
            rules.validate(changed(**{"model.variant": variant, "model.heads": "cls"}))
    rules.validate(changed(**{"model.variant": "deit_tiny_distilled_patch16_224.fb_in1k", "model.heads": "cls"}))


@pytest.mark.parametrize("name", ["digits:", "digits:5", "digits:55", "digits:5a", "digits:٣٤"])
def test_a_subset_of_the_digits_has_two_different_ones_or_more(name):
    with pytest.raises(errors.UserError, match=r"data.name .* must be tfds:NAME"):
        rules.validate(changed(**{"data.name": name}))
    rules.validate(changed(**{"data.name": "digits:52"}))


def test_a_misspelt_choice_is_answered_with_the_nearest_one():
    with pytest.raises(errors.UserError, match="did you mean mixed_bfloat16"):
        rules.validate(changed(precision="mixed_bfloat"))


def test_a_batch_that_does_not_divide_is_refused_with_both_numbers():
    with pytest.raises(
        errors.UserError, match=r"global_batch \(250\) must be divisible by replicas \* micro_batch \(1 \* 16\)"
    ):
        rules.validate(changed(global_batch=250))
    with pytest.raises(errors.UserError, match=r"global_batch \(256\) must be .* replicas \* micro_batch \(3 \* 16\)"):
        resolve(base.get_config(), replicas=3)


def test_distillation_without_a_teacher_is_refused():
    with pytest.raises(errors.UserError, match=r"teacher.kind \('none'\) must name a teacher"):
        rules.validate(changed(**{"distill.kind": "hard"}))


def test_a_bad_value_of_a_nested_teacher_is_named_in_full():
    config = quickstart.get_config("")
    config.teacher.train.loss.smoothing = 2.0
    with pytest.raises(errors.UserError, match=r"teacher\.train\.loss\.smoothing"):
        rules.validate(config)


def test_twenty_epochs_of_the_flowers_are_258_updates_of_256():
    resolved = resolve(deit_tiny_flowers.get_config()).resolved
    assert resolved.total_updates == 258  # 20 * 3303 / 256 = 258.05
    assert resolved.warmup_updates == 26  # 2 * 3303 / 256 = 25.8
    assert resolved.accum_steps == 16
    assert resolved.peak_lr == 1e-3


def test_the_linear_rule_scales_the_examples_rate_and_leaves_the_cards_alone():
    assert resolve(deit_tiny_flowers.get_config("keras_example")).resolved.peak_lr == pytest.approx(2.5e-4)
    assert resolve(deit_tiny_flowers.get_config("card")).resolved.peak_lr == 6.25e-5


def test_total_updates_replaces_epochs_and_shrinks_the_warm_up_in_proportion():
    resolved = resolve(changed(total_updates=129)).resolved
    assert (resolved.total_updates, resolved.warmup_updates) == (129, 13)
    assert resolve(changed(total_updates=3)).resolved.warmup_updates == 0
    assert resolve(changed(total_updates=1, **{"optim.warmup_epochs": 20.0})).resolved.warmup_updates == 0


@pytest.mark.parametrize("name", PRESETS)
def test_json_there_and_back_is_the_same_configuration(name):
    config = resolve(PRESETS[name]())
    text = configuration.to_json(config)
    back = configuration.from_json(text, base.get_config())
    assert configuration.difference(config, back) == []
    assert json.loads(configuration.to_json(back)) == json.loads(text)
    rules.validate(back)


# Fields that came after the first runs, and what those did.
LATER = {
    "tpu": "local", "startup_seconds": 600.0, "xla": False, "checkpoint.every_minutes": 0.0, "checkpoint.keep_every": 0,
    "checkpoint.max_failed": 0,
}  # fmt: skip


def test_a_run_recorded_before_a_field_came_is_read_as_what_it_was_and_can_be_continued():
    today = resolve(quickstart.get_config(""))
    recorded = json.loads(configuration.to_json(today))
    for node in (recorded, recorded["teacher"]["train"]):
        for name in LATER:
            *above, last = name.split(".")
            (node[above[0]] if above else node).pop(last)
    back = configuration.from_json(json.dumps(recorded), base.get_config())
    rules.validate(back)
    assert configuration.difference(back, today) == []
    for config in (back, back.teacher.train):
        values = dict(configuration.flatten(config))
        assert {name: values[name] for name in LATER} == LATER


def test_of_the_later_fields_only_xla_changes_a_result():
    others = {"tpu": "grpc://10.0.0.2:8470", "startup_seconds": 5.0, "strategy": "mirrored"}
    others |= {"checkpoint.every_minutes": 9.0, "checkpoint.keep_every": 100, "checkpoint.max_failed": 3}
    assert configuration.difference(resolve(changed()), resolve(changed(**others))) == []
    assert configuration.difference(resolve(changed()), resolve(changed(xla=True))) == ["xla: False -> True"]


def test_a_recorded_field_that_is_gone_is_refused_with_the_nearest_name():
    data = json.loads(configuration.to_json(base.get_config()))
    data["global_bach"] = 3
    with pytest.raises(errors.UserError, match="unknown config field global_bach; did you mean global_batch"):
        configuration.from_json(json.dumps(data), base.get_config())


def test_damaged_json_is_one_line():
    with pytest.raises(errors.UserError, match=r"config.json is damaged"):
        configuration.from_json("{", base.get_config())


def test_what_changes_the_result_differs_and_what_does_not_is_free():
    before = resolve(base.get_config())
    assert configuration.difference(before, resolve(changed(**{"optim.peak_lr": 2e-3}))) == [
        "optim.peak_lr: 0.001 -> 0.002",
        "resolved.peak_lr: 0.001 -> 0.002",
    ]
    free = {"micro_batch": 32, "data.data_dir": "elsewhere", "log.every_updates": 7, "checkpoint.keep": 9}
    assert configuration.difference(before, resolve(changed(**free), replicas=2)) == []


def test_a_changed_field_of_the_nested_teacher_is_a_difference():
    one, other = quickstart.get_config(""), quickstart.get_config("")
    other.teacher.train.epochs = 9.0
    assert configuration.difference(resolve(one), resolve(other)) == ["teacher.train.epochs: 8.0 -> 9.0"]


def test_augmentations_that_exclude_each_other_are_refused():
    policy = "rand-m9-mstd0.5-inc1"
    with pytest.raises(errors.UserError, match=r"augment\.three_augment \(True\) must be False"):
        rules.validate(changed(**{"augment.randaugment": policy, "augment.three_augment": True}))
    with pytest.raises(errors.UserError, match=r"augment\.jitter \(0\.3\) must be 0"):
        rules.validate(changed(**{"augment.randaugment": policy, "augment.jitter": 0.3}))


def test_randaugment_is_read_in_timms_notation():
    assert rules.randaugment_policy("rand-m9-mstd0.5-inc1") == rules.Policy(magnitude=9.0, std=0.5, num_ops=2)
    assert rules.randaugment_policy("rand-m7-n3-inc1") == rules.Policy(magnitude=7.0, std=0.0, num_ops=3)
    for text in ("rand-m11-inc1", "rand-m9-n0-inc1", "rand-inc1", "augmix", "rand-m9-inc0"):
        with pytest.raises(errors.UserError, match=r"augment\.randaugment"):
            rules.validate(changed(**{"augment.randaugment": text}))


def test_a_mixing_group_must_divide_a_replicas_share_and_only_where_examples_are_mixed():
    rules.validate(changed(**{"augment.mix_group": 48}))
    with pytest.raises(errors.UserError, match=r"augment\.mix_group \(48\) must divide .*\(256 / 1\)"):
        rules.validate(changed(**{"augment.mix_group": 48, "augment.mixup": 0.8}))
    with pytest.raises(errors.UserError, match=r"\(256 / 8\)"):
        resolve(changed(**{"augment.cutmix": 1.0}), replicas=8)


def test_limits_that_only_say_when_to_stop_may_differ_on_resume():
    assert configuration.difference(changed(), changed(**{"data.max_bad_fraction": 0.5, "max_skipped": 99})) == []


def test_a_mixing_group_has_an_even_number_of_examples():
    with pytest.raises(errors.UserError, match=r"augment\.mix_group \(3\) must be even"):
        rules.validate(changed(**{"augment.mix_group": 3}))
