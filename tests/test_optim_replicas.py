"""The optimizers on one device and on two replicas, as the train step calls them; run as a script, it prints that."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from deit import ema, optim
from tests.optimizers import BIAS, GRADIENTS, KERNEL, config, numpy_adamw, numpy_lamb, rate


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
