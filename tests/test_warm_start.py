"""init_from: what comes over, what begins anew, what is refused; and that it helps."""

import numpy as np
import pytest

from configs import base
from deit import checkpoint, errors, warm_start
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


def load(config):
    """Return (what is said, values of a fresh network, values after the start)."""
    network = factory.build(
        config.model,
        num_classes=len(config.resolved.classes),
        image_size=config.data.image_size,
        precision="float32",
    )
    fresh = {path: variable.numpy() for path, variable in paths.variables(network.model)}
    said = warm_start.load(config, network)
    return said, fresh, {path: variable.numpy() for path, variable in paths.variables(network.model)}


def stored(path, group="student"):
    return {n.removeprefix(f"{group}/"): v for n, v in checkpoint.read(path)[0].items() if n.startswith(f"{group}/")}


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
    said, fresh, now = load(resolved(""))
    assert said == "" and all(np.array_equal(now[name], value) for name, value in fresh.items())


@pytest.mark.parametrize(
    "source, ours, message",
    [
        ({"variant": PLAIN}, {}, r"with distilled False.*distilled True: tokens/dist_token does not fit"),
        ({}, {"patch": 4}, r"with patch 8.*patch 4: patch_embed/proj/kernel does not fit"),
        ({"variant": DEIT3}, {"variant": PLAIN}, r"layer_scale.*blocks/\*/ls1/gamma does not fit"),
        ({"registers": 2}, {}, r"with registers 2.*registers 0: tokens/reg_token does not fit"),
        ({"variant": "keras_example"}, {}, r"model.variant \(deit_m.*\) must be that of init_from \(keras_example\)"),
        ({"heads": "cls"}, {}, r"missing head_dist/bias; missing head_dist/kernel"),
    ],
)  # fmt: skip
def test_a_checkpoint_of_another_network_is_refused_by_the_tensor_s_name(tmp_path, source, ours, message):
    ckpt = family.checkpoint(tmp_path / "ckpt", **source)
    with pytest.raises(errors.UserError, match=message):
        load(resolved(ckpt, **ours))


def test_a_path_that_is_no_checkpoint_is_refused_before_anything_is_built(tmp_path):
    with pytest.raises(errors.UserError, match="is no run, checkpoint or export"):
        warm_start.check(resolved(tmp_path))
