"""AdamW and LAMB in NumPy, three gradients, and the optimizer trained on them."""

import numpy as np
import tensorflow as tf
from ml_collections import ConfigDict

from deit import optim

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


def numpy_lamb(*, scales=(1.0, 1.0), skip=(), adapted=True):
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
            if i == 0 and adapted:
                update = update + 0.5 * value
                update = update * np.sqrt((value**2).sum()) / np.sqrt((update**2).sum())
            value -= rate(step) * scales[i] * update
    return values, moments
