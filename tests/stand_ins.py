"""Teachers small enough to be worked out by hand, shared by the tests of deit/teachers."""

from pathlib import Path

import numpy as np
import tensorflow as tf

from configs import base as template
from deit import config as configuration
from deit import saver, teachers
from deit.models import factory, paths

CLASSES = ("a", "b", "c")
SIZE = 8
KERNEL = np.random.default_rng(0).normal(0, 1, (SIZE * SIZE * 3, 3)).astype(np.float32)
IMAGES = np.random.default_rng(1).integers(0, 256, (2, SIZE, SIZE, 3)).astype(np.float32)


def expected(images, kernel=KERNEL):
    """Return the logits of a StandIn, worked out in float64."""
    return images.reshape(len(images), -1).astype(np.float64) @ kernel


def config(**teacher):
    c = template.get_config()
    c.data.image_size = SIZE
    c.teacher.update(teacher)
    return c


def build(workdir=".", classes=CLASSES, **teacher):
    return teachers.build(config(**teacher), classes=classes, workdir=Path(workdir))


def describe(num_classes=3, **teacher):
    return teachers.describe(config(**teacher), num_classes).line


def identity(workdir=".", **teacher):
    return teachers.identity(config(**teacher), workdir=Path(workdir))


class StandIn(tf.Module):
    """A linear classifier of pixels as they come."""

    def __init__(self, outputs=("logits",), kernel=KERNEL):
        super().__init__()
        self.kernel, self.outputs = tf.Variable(kernel), outputs

    @tf.function(input_signature=[tf.TensorSpec([None, SIZE, SIZE, 3], tf.float32, name="image")])
    def serve(self, image):
        logits = tf.reshape(image, [-1, SIZE * SIZE * 3]) @ self.kernel
        return dict.fromkeys(self.outputs, logits)


def save(directory, **arguments):
    """Save a StandIn and return its directory."""
    module = StandIn(**arguments)
    tf.saved_model.save(module, str(directory), signatures={"serving_default": module.serve})
    return Path(directory)


def finished_run(workdir, classes=CLASSES, seed=0):
    """Write a run with one checkpoint of a small network and return (workdir, network)."""
    c = template.get_config()
    c.data.image_size, c.model.variant, c.model.seed = 16, "deit_micro_distilled_patch4_32", 5
    c = configuration.resolve(c, train_size=512, eval_size=8, classes=classes, replicas=1)
    network = factory.build(c.model, num_classes=len(classes), image_size=16, precision="float32")
    rng = np.random.default_rng(seed)
    for _, variable in paths.variables(network.model):
        variable.assign(variable + rng.normal(0, 0.05, variable.shape))  # no longer the initial weights
    tensors = {f"student/{path}": variable.numpy() for path, variable in paths.variables(network.model)}
    writer = saver.Saver(workdir, config_json=configuration.to_json(c), keep=1, keep_every=0, max_failed=0, versions={})
    writer.save(3, tensors, metrics={})
    writer.finish()
    return workdir, network


def assert_is_stand_in(teacher):
    np.testing.assert_allclose(teacher.logits(tf.constant(IMAGES)), expected(IMAGES), rtol=1e-4, atol=0.05)
