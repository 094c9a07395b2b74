"""init_from: what comes over, what begins anew, what is refused; and that it helps."""

import shutil

import numpy as np
import pytest

from configs import base
from deit import checkpoint, commit, errors, warm_start
from deit import config as configuration
from deit.models import factory, paths
from tests import family

VARIANT, PLAIN, DEIT3 = "deit_micro_distilled_patch8_32", "deit_micro_patch8_32", "deit3_micro_patch8_32"


def resolved(init_from, variant=VARIANT, *, size=32, classes=("a", "b", "c"), weights="raw", **model):
    c = base.get_config()
    c.init_from, c.init_weights = str(init_from), weights
    c.model.variant, c.data.image_size = variant, size
    for name, value in model.items():
        c.model[name] = value
    return configuration.resolve(c, train_size=256, eval_size=10, classes=classes, replicas=1)


def built(config):
    return factory.build(
        config.model,
        num_classes=len(config.resolved.classes),
        image_size=config.data.image_size,
        precision="float32",
    )


def load(config):
    """Return (what is said, values of a fresh network, values after the start)."""
    network = built(config)
    fresh = {path: variable.numpy() for path, variable in paths.variables(network.model)}
    start = warm_start.load(config, network)
    return start.said, fresh, {path: variable.numpy() for path, variable in paths.variables(network.model)}


def stored(path, group="student"):
    return {n.removeprefix(f"{group}/"): v for n, v in checkpoint.read(path)[0].items() if n.startswith(f"{group}/")}


def rewrite(ckpt, change):
    """Let `change` alter the tensors of a checkpoint, by their paths in its file."""
    (tensors, manifest), config_json = checkpoint.read(ckpt), checkpoint.read_config(ckpt)
    change(tensors)
    shutil.rmtree(ckpt)
    commit.commit(
        ckpt, tensors, step=manifest["step"], config_json=config_json, metrics={}, versions={}, temporary="tmp"
    )


def test_the_same_classes_and_size_bring_everything_bit_for_bit(tmp_path):
    ckpt = family.checkpoint(tmp_path / "ckpt")
    said, _, now = load(resolved(ckpt))
    assert "heads kept: the same 3 classes" in said and "resized" not in said
    assert all(np.array_equal(now[name], value) for name, value in stored(ckpt).items())


def test_other_classes_leave_both_heads_fresh_and_bring_the_trunk(tmp_path):
    ckpt = family.checkpoint(tmp_path / "ckpt")
    for classes in (("a", "b", "d"), ("b", "a", "c"), ("a", "b", "c", "d")):  # a name, an order, a number
        said, fresh, now = load(resolved(ckpt, classes=classes))
        assert f"heads re-initialised: 3 classes (a, b, c) -> {len(classes)}" in said
        for name, value in now.items():
            if name.startswith(("head/", "head_dist/")):
                np.testing.assert_array_equal(value, fresh[name])
            else:
                np.testing.assert_array_equal(value, stored(ckpt)[name])


def test_another_resolution_resizes_the_positions_and_nothing_else(tmp_path):
    ckpt = family.checkpoint(tmp_path / "ckpt")
    said, _, now = load(resolved(ckpt, size=48))
    assert "tokens/pos_embed resized from 4 x 4 to 6 x 6" in said
    before = stored(ckpt)
    np.testing.assert_array_equal(now["tokens/pos_embed"][:, :2], before["tokens/pos_embed"][:, :2])
    assert now["tokens/pos_embed"].shape == (1, 2 + 36, 64)
    assert all(np.array_equal(now[n], v) for n, v in before.items() if n != "tokens/pos_embed")


def test_deit_iii_is_resized_without_prefix_slots(tmp_path):
    ckpt = family.checkpoint(tmp_path / "ckpt", "deit3_micro_patch8_32")
    _, _, now = load(resolved(ckpt, "deit3_micro_patch8_32", size=64))
    assert now["tokens/pos_embed"].shape == (1, 64, 64)
    np.testing.assert_array_equal(now["blocks/2/ls1/gamma"], stored(ckpt)["blocks/2/ls1/gamma"])


def test_the_averages_come_over_where_they_are_asked_for(tmp_path):
    ckpt = family.checkpoint(tmp_path / "ckpt", ema=True)
    _, _, now = load(resolved(ckpt, weights="ema"))
    assert all(np.array_equal(now[name], value) for name, value in stored(ckpt, "ema").items())
    with pytest.raises(errors.UserError, match=r"has no averages \(EMA\)"):
        load(resolved(family.checkpoint(tmp_path / "plain"), weights="ema"))


def test_the_class_head_alone_leaves_the_other_one_out(tmp_path):
    ckpt = family.checkpoint(tmp_path / "ckpt")
    said, _, now = load(resolved(ckpt, heads="cls"))
    assert "head_dist left out (model.heads is cls)" in said and "head_dist/kernel" not in now
    np.testing.assert_array_equal(now["head/kernel"], stored(ckpt)["head/kernel"])
    np.testing.assert_array_equal(now["tokens/dist_token"], stored(ckpt)["tokens/dist_token"])


def test_a_start_from_nothing_assigns_nothing():
    config = resolved("")
    network = built(config)
    fresh = {path: variable.numpy() for path, variable in paths.variables(network.model)}
    assert warm_start.load(config, network) is None and warm_start.describe(config, network, None) == ""
    assert all(np.array_equal(variable, fresh[path]) for path, variable in paths.variables(network.model))


@pytest.mark.parametrize(
    "source, ours, message",
    [
        ({"variant": PLAIN}, {}, r"with distilled False.*distilled True: tokens/dist_token does not fit"),
        ({}, {"patch": 4}, r"with patch 8.*patch 4: patch_embed/proj/kernel does not fit"),
        ({"variant": DEIT3}, {"variant": PLAIN}, r"layer_scale.*blocks/\*/ls1/gamma does not fit"),
        ({"registers": 2}, {}, r"with registers 2.*registers 0: tokens/reg_token does not fit"),
        ({"variant": "keras_example"}, {}, r"model.variant \(deit_m.*\) must be that of init_from \(keras_example\)"),
    ],
)  # fmt: skip
def test_a_checkpoint_of_another_network_is_refused_by_the_tensor_s_name(tmp_path, source, ours, message):
    ckpt = family.checkpoint(tmp_path / "ckpt", **source)
    for call in (load, lambda config: warm_start.check(config, config.resolved.classes)):
        with pytest.raises(errors.UserError, match=message):
            call(resolved(ckpt, **ours))


def test_a_path_that_is_no_checkpoint_is_refused_and_a_file_of_weights_is_told_the_converter(tmp_path):
    (tmp_path / "x.safetensors").write_text("x")
    file = resolved(tmp_path / "x.safetensors")
    for call in (lambda config: warm_start.check(config, None), load):
        with pytest.raises(errors.UserError, match=r"init_from \(\S+\): \S+ is no run, .*in it$"):
            call(resolved(tmp_path))
        with pytest.raises(
            errors.UserError, match=r"init_from \(\S+\): .*: tools/convert_weights.py makes a checkpoint"
        ):
            call(file)


def test_a_network_of_one_head_starts_one_of_two_and_the_other_begins_anew(tmp_path):
    ckpt = family.checkpoint(tmp_path / "ckpt", heads="cls")
    config = resolved(ckpt)
    warm_start.check(config, config.resolved.classes)
    said, fresh, now = load(config)
    assert said.endswith("heads kept: the same 3 classes, head_dist initialised: it has none")
    np.testing.assert_array_equal(now["head/kernel"], stored(ckpt)["head/kernel"])
    np.testing.assert_array_equal(now["head_dist/kernel"], fresh["head_dist/kernel"])
    rewrite(ckpt, lambda tensors: tensors.pop("student/head/bias"))
    with pytest.raises(errors.UserError, match="missing head/bias"):
        load(config)


@pytest.mark.parametrize("fields", [{"classes": ("d", "e")}, {"heads": "all"}])
def test_a_network_that_was_not_drawn_gets_the_same_values_as_one_that_was(tmp_path, fields):
    config = resolved(family.checkpoint(tmp_path / "ckpt", heads="cls"), **fields)
    _, _, drawn = load(config)
    network = factory.build(
        config.model, num_classes=len(config.resolved.classes), image_size=32, precision="float32", load_weights=False
    )
    warm_start.load(config, network)
    assert drawn["head_dist/kernel"].any()
    assert all(np.array_equal(variable, drawn[path]) for path, variable in paths.variables(network.model))


def test_a_backbone_that_starts_from_a_checkpoint_needs_no_weights_of_its_own(tmp_path, monkeypatch):
    from deit import job, loop
    from deit.models import cnn
    from tests import devices

    ckpt = family.checkpoint(tmp_path / "ckpt", "backbone", classes=tuple("01"), cut="conv_pw_1_relu")
    real = cnn._construct
    monkeypatch.setattr(cnn, "_construct", lambda *a, **k: pytest.fail("fetched") if "imagenet" in a else real(*a, **k))
    config = base.get_config()
    config.init_from, config.model.variant, config.model.cut = str(ckpt), "backbone", "conv_pw_1_relu"
    config.data.name, config.data.train_split, config.data.eval_split = "digits:56", "train", "test"
    config.data.image_size, config.global_batch, config.micro_batch, config.total_updates = 32, 8, 8, 1
    config.optim.peak_lr = config.optim.warmup_epochs = 0.0
    run = job.prepare(config, tmp_path / "run", replicas=1)
    (tmp_path / "run").mkdir()
    loop.train(run, strategy=devices.one_device())
    now, before = stored(checkpoint.newest(tmp_path / "run", set_aside=False)), stored(ckpt)
    assert now["head/kernel"].any() and not np.array_equal(now["head/kernel"], before["head/kernel"])
    trunk = [path for path in before if not path.startswith("head/")]
    assert trunk and all(np.array_equal(now[path], before[path]) for path in trunk)


def test_the_start_is_pinned_by_the_digest_of_its_tensors(tmp_path):
    config = resolved(family.checkpoint(tmp_path / "ckpt"))
    assert warm_start.load(config, built(config)).identity == checkpoint.manifest(tmp_path / "ckpt")["state_sha256"]


@pytest.mark.parametrize("classes", [("a", "b", "c"), ("d", "e"), None])
@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.pop("student/blocks/1/norm2/beta"), "missing blocks/1/norm2/beta"),
        (lambda t: t.update({"student/blocks/4/norm2/beta": t["student/norm/beta"]}), "left over blocks/4/norm2/beta"),
        (lambda t: t.update({"student/norm/beta": np.zeros(64, np.float16)}), r"norm/beta is \('float16', \(64,\)\)"),
        (
            lambda t: t.update({"student/tokens/pos_embed": np.zeros([1, 2 + 15, 64], np.float32)}),
            "tokens/pos_embed has a grid of 15 patches, which is not square",
        ),
    ],
)
def test_a_tensor_that_does_not_fit_is_found_without_data_and_whatever_the_classes(tmp_path, change, message, classes):
    ckpt = family.checkpoint(tmp_path / "ckpt")
    rewrite(ckpt, change)
    with pytest.raises(errors.UserError, match=message):
        warm_start.check(resolved(ckpt), classes)


def test_a_head_is_missed_only_where_it_would_come_over(tmp_path):
    ckpt = family.checkpoint(tmp_path / "ckpt")
    rewrite(ckpt, lambda t: t.pop("student/head_dist/bias"))
    with pytest.raises(errors.UserError, match=r"missing head_dist/bias$"):
        warm_start.check(resolved(ckpt), ("a", "b", "c"))
    warm_start.check(resolved(ckpt), ("d", "e"))


def test_averages_that_are_not_there_are_missed_before_data_is_opened(tmp_path):
    with pytest.raises(errors.UserError, match=r"has no averages \(EMA\)"):
        warm_start.check(resolved(family.checkpoint(tmp_path / "ckpt"), weights="ema"), None)
    warm_start.check(resolved(family.checkpoint(tmp_path / "averaged", ema=True), weights="ema"), None)


def test_a_check_reads_no_tensor(tmp_path, monkeypatch):
    ckpt = family.checkpoint(tmp_path / "ckpt")
    monkeypatch.setattr(checkpoint, "read", None)
    warm_start.check(resolved(ckpt, size=48), ("a", "b", "c"))


def test_what_is_told_before_is_what_happens(tmp_path):
    ckpt = family.checkpoint(tmp_path / "ckpt")
    for fields in ({}, {"size": 48}, {"classes": ("d", "e")}, {"heads": "cls"}):
        config = resolved(ckpt, **fields)
        network = built(config)
        told = warm_start.describe(config, network, config.resolved.classes)
        assert told == warm_start.load(config, network).said and told.startswith(f"{ckpt} (raw); heads ")
    config = resolved(ckpt)
    told = warm_start.describe(config, built(config), None)
    assert told == f"{ckpt} (raw); heads: re-initialised unless the classes are the same"


def test_another_input_scaling_or_epsilon_is_warned_of(tmp_path):
    ckpt = family.checkpoint(tmp_path / "ckpt", mean=(0.5, 0.5, 0.5), norm_epsilon=1e-12)
    config = resolved(ckpt)
    assert warm_start.describe(config, built(config), None).endswith(
        "; warning: model.mean (0.5, 0.5, 0.5) -> (0.485, 0.456, 0.406), model.norm_epsilon 1e-12 -> 1e-06: the "
        "weights were trained with the first, which --config.FIELD=VALUE keeps"
    )
    same = resolved(ckpt, mean=(0.5, 0.5, 0.5), norm_epsilon=1e-12)
    assert "warning" not in warm_start.describe(same, built(same), None)


def test_the_keras_example_is_resized_too(tmp_path):
    ckpt = family.checkpoint(tmp_path / "ckpt", "keras_example", size=64)
    said, _, now = load(resolved(ckpt, "keras_example", size=32))
    assert "tokens/pos_embed resized from 4 x 4 to 2 x 2" in said
    assert now["tokens/pos_embed"].shape == (1, 2 + 4, 192)
    np.testing.assert_array_equal(now["tokens/pos_embed"][:, :2], stored(ckpt)["tokens/pos_embed"][:, :2])
