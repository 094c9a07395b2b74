"""The optimizer against AdamW written in NumPy; run as a script, the same under MirroredStrategy."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from ml_collections import ConfigDict

from deit import ema, optim
from deit.models import paths

KERNEL, BIAS = np.array([[1.0, -2.0], [0.5, 3.0]]), np.array([0.3, -0.7])
GRADIENTS = [
    (np.array([[0.1, 0.2], [-0.3, 0.4]]), np.array([1.0, -0.5])),
    (np.array([[-0.2, 0.1], [0.05, 0.01]]), np.array([0.2, 0.1])),
    (np.array([[0.01, 0.02], [0.03, -0.04]]), np.array([-0.1, 0.3])),
]


def config(**changes):
    fields = {
        "name": "adamw",
        "schedule": "constant",
        "warmup_lr": 0.1,
        "final_lr": 0.0,
        "weight_decay": 0.5,
        "decay_coupled": True,
        "beta_1": 0.9,
        "beta_2": 0.99,
        "epsilon": 1e-3,
        "amsgrad": False,
    }
    resolved = {"total_updates": 10, "warmup_updates": 2, "peak_lr": 0.3}
    return ConfigDict({"optim": {**fields, **changes}, "resolved": resolved})


def rate(step):
    return min(0.1 + 0.1 * step, 0.3)


def numpy_adamw(decay_of, *, decay_bias=False, amsgrad=False, skip=(), scales=(1.0, 1.0)):
    """AdamW as tensorflow-addons defines it: decay first, epsilon outside the bias correction."""
    values, moments, applied = [KERNEL.copy(), BIAS.copy()], [np.zeros((3, 2, 2)), np.zeros((3, 2))], 0
    for step, gradients in enumerate(GRADIENTS):
        if step in skip:
            continue
        applied += 1
        correction = np.sqrt(1 - 0.99**applied) / (1 - 0.9**applied)
        for i, (value, moment, gradient) in enumerate(zip(values, moments, gradients)):
            if i == 0 or decay_bias:
                value -= decay_of(step) * value
            moment[0] = 0.9 * moment[0] + 0.1 * gradient
            moment[1] = 0.99 * moment[1] + 0.01 * gradient**2
            moment[2] = np.maximum(moment[2], moment[1])
            value -= scales[i] * rate(step) * correction * moment[0] / (np.sqrt(moment[2 if amsgrad else 1]) + 1e-3)
    return values, moments


def train(settings, *, decayed=("kernel",), skip=(), scales=()):
    variables = {"kernel": tf.Variable(KERNEL, dtype=tf.float32), "bias": tf.Variable(BIAS, dtype=tf.float32)}
    step = tf.Variable(0, dtype=tf.int64)
    optimizer = optim.build(settings, step)
    optim.create_slots(optimizer, list(variables.values()))
    for i, gradients in enumerate(GRADIENTS):
        if i not in skip:
            pairs = [(tf.constant(g, tf.float32), v) for g, v in zip(gradients, variables.values())]
            optim.apply(optimizer, pairs, decayed=[variables[name] for name in decayed], scales=scales)
        step.assign_add(1)
    return optimizer, variables


def assert_equal(variables, expected):
    np.testing.assert_allclose(variables["kernel"], expected[0], rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(variables["bias"], expected[1], rtol=2e-5, atol=1e-6)


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


def numpy_lamb(*, scales=(1.0, 1.0), skip=()):
    """LAMB (arXiv:1904.00962, algorithm 2): the kernel decays and its step has its norm; the bias is plain Adam."""
    values, moments, applied = [KERNEL.copy(), BIAS.copy()], [np.zeros((2, 2, 2)), np.zeros((2, 2))], 0
    for step, gradients in enumerate(GRADIENTS):
        if step in skip:
            continue
        applied += 1
        for i, (value, moment, gradient) in enumerate(zip(values, moments, gradients)):
            moment[0] = 0.9 * moment[0] + 0.1 * gradient
            moment[1] = 0.99 * moment[1] + 0.01 * gradient**2
            update = moment[0] / (1 - 0.9**applied) / (np.sqrt(moment[1] / (1 - 0.99**applied)) + 1e-3)
            if i == 0:
                update = update + 0.5 * value
                update = update * np.sqrt((value**2).sum()) / np.sqrt((update**2).sum())
            value -= rate(step) * scales[i] * update
    return values, moments


def test_lamb_is_the_paper_s_step_and_leaves_unadapted_what_does_not_decay():
    optimizer, variables = train(config(name="lamb"))
    expected, moments = numpy_lamb()
    assert_equal(variables, expected)
    slots = dict(optim.slots(optimizer, list(variables.items())))
    assert sorted(slots) == ["optimizer/iterations", *(f"optimizer/{m}/{v}" for m in "mv" for v in ("bias", "kernel"))]
    np.testing.assert_allclose(slots["optimizer/v/kernel"], moments[0][1], rtol=2e-5, atol=1e-6)


def test_a_skipped_update_of_lamb_keeps_its_place_in_the_schedule_too():
    _, variables = train(config(name="lamb"), skip=(1,))
    assert_equal(variables, numpy_lamb(skip=(1,))[0])


def test_a_scale_multiplies_the_step_of_lamb_after_the_norm_is_taken():
    _, variables = train(config(name="lamb"), scales=[0.25, 1.0])
    assert_equal(variables, numpy_lamb(scales=(0.25, 1.0))[0])
    assert not np.allclose(variables["kernel"], numpy_lamb()[0][0], atol=1e-2)


@pytest.mark.parametrize("coupled", [True, False])
def test_a_scale_multiplies_the_applied_step_of_adamw_and_a_decay_that_follows_the_rate(coupled):
    _, variables = train(config(decay_coupled=coupled), scales=[0.25, 1.0])
    decay = (lambda step: 0.25 * 0.5 * rate(step)) if coupled else (lambda step: 0.5)
    expected, moments = numpy_adamw(decay, scales=(0.25, 1.0))
    assert_equal(variables, expected)
    # A scaled gradient would have been divided out again: its moments are those of the whole one.
    np.testing.assert_allclose(moments[0][0], numpy_adamw(decay)[1][0][0])
    assert not np.allclose(expected[0], numpy_adamw(decay)[0][0], atol=1e-2)


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


@pytest.fixture(scope="module")
def under_strategies():
    """What `_main` prints: it needs two logical CPUs, which must be asked for before TensorFlow starts."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("strategy", ["OneDeviceStrategy", "MirroredStrategy"])
@pytest.mark.parametrize("coupled", [True, False])
def test_under_a_strategy_every_replica_decays_skips_and_averages_as_one_device(under_strategies, strategy, coupled):
    found = under_strategies[f"{strategy} {coupled}"]
    expected, _ = numpy_adamw(lambda step: 0.5 * rate(step) if coupled else 0.5, skip=(1,))
    assert len(found["kernel"]) == (2 if strategy == "MirroredStrategy" else 1)
    for copy, average in zip(found["kernel"], found["average"]):
        np.testing.assert_allclose(copy, expected[0], rtol=2e-5, atol=1e-6)
        np.testing.assert_allclose(average, 0.5 * KERNEL + 0.5 * expected[0], rtol=2e-5, atol=1e-6)
    assert found["iterations"] == 2


@pytest.mark.parametrize("strategy", ["OneDeviceStrategy", "MirroredStrategy"])
def test_under_a_strategy_every_replica_of_lamb_is_scaled_and_adapted(under_strategies, strategy):
    found = under_strategies[f"{strategy} lamb"]
    expected, _ = numpy_lamb(scales=(0.5, 1.0), skip=(1,))
    for copy in found["kernel"]:
        np.testing.assert_allclose(copy, expected[0], rtol=2e-5, atol=1e-6)


def _main():
    """Apply, skip, apply; by `tf.cond` in cross-replica context, as the train step does."""
    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
    result = {}
    for strategy in (
        tf.distribute.OneDeviceStrategy("/cpu:0"),
        tf.distribute.MirroredStrategy(["/cpu:0", "/cpu:1"]),
    ):
        for coupled in (True, False):
            result[f"{type(strategy).__name__} {coupled}"] = _run(strategy, config(decay_coupled=coupled))
        result[f"{type(strategy).__name__} lamb"] = _run(strategy, config(name="lamb"), scales=[0.5, 1.0])
    print(json.dumps(result))


def _run(strategy, settings, scales=()):
    with strategy.scope():
        step = tf.Variable(0, dtype=tf.int64, aggregation=tf.VariableAggregation.ONLY_FIRST_REPLICA)
        kernel, bias = tf.Variable(KERNEL, dtype=tf.float32), tf.Variable(BIAS, dtype=tf.float32)
        optimizer = optim.build(settings, step)
        optim.create_slots(optimizer, [kernel, bias])
        average = tf.Variable(kernel, trainable=False)

    def apply(gradients, last):
        optim.apply(optimizer, list(zip(gradients, [kernel, bias])), decayed=[kernel], scales=scales)
        ema.update([average], [kernel], tf.where(last, 0.5, 1.0))

    @tf.function
    def update(gradients, finite, last):
        def applied():
            strategy.run(apply, args=(gradients, last))
            return tf.constant(0)

        tf.cond(finite, applied, lambda: tf.constant(0))
        step.assign_add(1)

    for i, gradients in enumerate(GRADIENTS):
        gradients = [tf.constant(g, tf.float32) for g in gradients]
        update(gradients, tf.constant(i != 1), tf.constant(i == 2))
    local = strategy.experimental_local_results
    return {
        "kernel": [copy.numpy().tolist() for copy in local(kernel)],
        "average": [copy.numpy().tolist() for copy in local(average)],
        "iterations": int(optimizer.iterations.numpy()),
    }


if __name__ == "__main__":
    _main()
