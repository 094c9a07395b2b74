"""The optimizers against AdamW and LAMB written in NumPy."""

import numpy as np
import pytest
import tensorflow as tf

from deit import optim
from deit.models import paths
from tests.optimizers import assert_equal, config, numpy_adamw, numpy_lamb, rate, train


def test_coupled_decay_is_weight_decay_times_the_rate_of_the_update():
    _, variables = train(config())
    assert_equal(variables, numpy_adamw(lambda step: 0.5 * rate(step))[0])


def test_addons_decay_does_not_follow_the_rate():
    _, variables = train(config(decay_coupled=False))
    assert_equal(variables, numpy_adamw(lambda step: 0.5)[0])


def test_variables_that_are_not_listed_do_not_decay_and_an_empty_list_decays_none():
    _, variables = train(config(), decayed=("kernel", "bias"))
    assert_equal(variables, numpy_adamw(lambda step: 0.5 * rate(step), decay_bias=True)[0])
    _, variables = train(config(), decayed=())
    assert_equal(variables, numpy_adamw(lambda step: 0.0)[0])


def test_lamb_is_the_paper_s_step_and_leaves_unadapted_what_does_not_decay():
    optimizer, variables = train(config(name="lamb"))
    expected, moments = numpy_lamb()
    assert_equal(variables, expected)
    slots = dict(optim.slots(optimizer, list(variables.items())))
    assert sorted(slots) == ["optimizer/iterations", *(f"optimizer/{m}/{v}" for m in "mv" for v in ("bias", "kernel"))]
    np.testing.assert_allclose(slots["optimizer/v/kernel"], moments[0][1], rtol=2e-5, atol=1e-6)


def test_lamb_without_decay_is_adam_as_in_fused_lamb():
    _, variables = train(config(name="lamb", weight_decay=0.0))
    assert_equal(variables, numpy_lamb(adapted=False)[0])


def test_a_skipped_update_of_lamb_keeps_its_place_in_the_schedule_too():
    _, variables = train(config(name="lamb"), skip=(1,))
    assert_equal(variables, numpy_lamb(skip=(1,))[0])


def test_a_scale_multiplies_the_step_of_lamb_after_the_norm_is_taken():
    _, variables = train(config(name="lamb"), scales=[0.25, 1.0])
    assert_equal(variables, numpy_lamb(scales=(0.25, 1.0))[0])
    assert not np.allclose(variables["kernel"], numpy_lamb()[0][0], atol=1e-2)


@pytest.mark.parametrize("coupled", [True, False])
def test_a_scale_multiplies_the_applied_step_of_adamw_decay_included(coupled):
    optimizer, variables = train(config(decay_coupled=coupled), scales=[0.25, 1.0])

    def decay(step):
        return 0.25 * 0.5 * (rate(step) if coupled else 1.0)

    expected, _ = numpy_adamw(decay, scales=(0.25, 1.0))
    assert_equal(variables, expected)
    assert not np.allclose(expected[0], numpy_adamw(decay)[0][0], atol=1e-2)
    # A scaled gradient would have been divided out again: the moments are those of the whole one.
    slots = dict(optim.slots(optimizer, list(variables.items())))
    np.testing.assert_allclose(slots["optimizer/m/kernel"], numpy_adamw(decay)[1][0][0], rtol=2e-5, atol=1e-6)


def test_the_distance_to_the_head_counts_blocks():
    found = {path: paths.layer(path, 13) for path in (
        "tokens/pos_embed", "tokens/cls_token", "patch_embed/proj/kernel", "blocks/0/norm1/gamma",
        "blocks/11/mlp/fc2/bias", "norm/gamma", "head/kernel", "head_dist/bias",
    )}  # fmt: skip
    assert list(found.values()) == [0, 0, 0, 1, 12, 13, 13, 13]


@pytest.mark.parametrize(
    "only, trained",
    [
        (
            "",
            {
                "patch_embed/proj/kernel",
                "tokens/pos_embed",
                "blocks/0/attn/qkv/bias",
                "blocks/0/mlp/fc1/kernel",
                "head/bias",
            },
        ),
        ("attention", {"tokens/pos_embed", "blocks/0/attn/qkv/bias", "head/bias"}),
        ("heads", {"head/bias"}),
    ],
)
def test_train_only_says_what_is_trained(only, trained):
    every = (
        "patch_embed/proj/kernel",
        "tokens/pos_embed",
        "blocks/0/attn/qkv/bias",
        "blocks/0/mlp/fc1/kernel",
        "head/bias",
    )
    assert {path for path in every if paths.trains(path, only)} == trained


def test_amsgrad_divides_by_the_largest_second_moment():
    optimizer, variables = train(config(amsgrad=True))
    expected, moments = numpy_adamw(lambda step: 0.5 * rate(step), amsgrad=True)
    assert_equal(variables, expected)
    slots = dict(optim.slots(optimizer, list(variables.items())))
    np.testing.assert_allclose(slots["optimizer/vhat/kernel"], moments[0][2], rtol=2e-5, atol=1e-6)


def test_a_skipped_update_keeps_its_place_in_the_schedule_and_out_of_the_bias_correction():
    optimizer, variables = train(config(), skip=(1,))
    assert_equal(variables, numpy_adamw(lambda step: 0.5 * rate(step), skip=(1,))[0])
    assert int(optimizer.iterations) == 2


def test_slots_have_own_paths_and_iterations_advance_once_an_update():
    optimizer, variables = train(config())
    slots = dict(optim.slots(optimizer, list(variables.items())))
    moments = numpy_adamw(lambda step: 0.5 * rate(step))[1]
    assert sorted(slots) == [
        "optimizer/iterations",
        "optimizer/m/bias",
        "optimizer/m/kernel",
        "optimizer/v/bias",
        "optimizer/v/kernel",
    ]
    np.testing.assert_allclose(slots["optimizer/m/kernel"], moments[0][0], rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(slots["optimizer/v/bias"], moments[1][1], rtol=2e-5, atol=1e-6)
    assert int(slots["optimizer/iterations"]) == 3


def test_slots_exist_before_the_first_update_and_are_zero():
    variable = tf.Variable([1.0, 2.0])
    optimizer = optim.build(config(), tf.Variable(0, dtype=tf.int64))
    optim.create_slots(optimizer, [variable])
    slots = optim.slots(optimizer, [("x", variable)])
    assert [name for name, _ in slots] == ["optimizer/m/x", "optimizer/v/x", "optimizer/iterations"]
    assert all(not np.any(value.numpy()) for _, value in slots)


def test_the_rate_of_any_update_can_be_read():
    optimizer = optim.build(config(), tf.Variable(7, dtype=tf.int64))
    np.testing.assert_allclose([float(optimizer.learning_rate_at(i)) for i in range(4)], [0.1, 0.2, 0.3, 0.3])
