"""A SavedModel in low precision: its graph's products change, its answers hardly, the process not at all."""

import gc

import numpy as np
import pytest
import tensorflow as tf

from deit import errors, keras, teachers
from deit.teachers import precision
from tests.stand_ins import CLASSES, build, config

SIZE = 16
IMAGES = np.random.default_rng(1).integers(0, 256, (4, SIZE, SIZE, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    """A convolution, group normalisation and two dense layers, saved: (its directory, the network)."""
    given = keras.Input((SIZE, SIZE, 3))
    x = keras.layers.Conv2D(16, 3, 2, padding="same")(given)
    x = keras.layers.GroupNormalization(4)(x)
    x = keras.layers.Conv2D(32, 3, 2, padding="same", activation="relu")(x)
    x = keras.layers.GlobalAveragePooling2D()(x)
    x = keras.layers.Dense(3)(keras.layers.Dense(32, activation="gelu")(x))
    model = keras.Model(given, x)
    rng = np.random.default_rng(0)
    model.set_weights([rng.normal(0, 0.3, weight.shape) for weight in model.get_weights()])
    directory = tmp_path_factory.mktemp("saved") / "network"
    tf.saved_model.save(model, str(directory))
    return directory, model


def operations(teacher):
    graph = tf.function(teacher.logits).get_concrete_function(tf.TensorSpec([None, SIZE, SIZE, 3])).graph
    nodes = [*graph.as_graph_def().node, *(n for f in graph.as_graph_def().library.function for n in f.node_def)]
    return {(node.op, tf.as_dtype(node.attr["T"].type).name) for node in nodes if "T" in node.attr}


def test_bfloat16_is_in_the_graph_and_hardly_in_the_answers(network):
    path, model = network
    options = tf.config.optimizer.get_experimental_options()
    exact = build(kind="saved_model", path=str(path), image_size=SIZE)
    low = build(kind="saved_model", path=str(path), image_size=SIZE, precision="mixed_bfloat16")
    gc.collect()
    answers = [tf.function(teacher.logits)(tf.constant(IMAGES)).numpy() for teacher in (exact, low)]
    np.testing.assert_allclose(answers[0], model(IMAGES), rtol=1e-4, atol=1e-4)
    difference = np.abs(answers[0] - answers[1]).max()
    assert 0 < difference < 0.02 * np.ptp(answers[0])  # bfloat16 keeps 8 bits: 0.4 % a product
    assert {("Conv2D", "bfloat16"), ("MatMul", "bfloat16")} <= operations(low)
    assert not {each for each in operations(low) if each[0] in ("Conv2D", "MatMul") and each[1] != "bfloat16"}
    assert not {each for each in operations(exact) if each[1] == "bfloat16"}
    assert (low.parameters, low.identity) == (exact.parameters, exact.identity) and exact.parameters > 1000
    assert tf.config.optimizer.get_experimental_options() == options
    assert keras.mixed_precision.global_policy().name == "float32"


def test_a_batch_of_any_number_and_no_gradient_pass_through_a_low_graph(network):
    low = build(kind="saved_model", path=str(network[0]), precision="mixed_bfloat16", image_size=SIZE)
    images = tf.constant(IMAGES)
    np.testing.assert_allclose(low.logits(images[:1]), low.logits(images)[:1], rtol=0.02, atol=0.05)
    with tf.GradientTape() as tape:
        tape.watch(images)
        total = tf.reduce_sum(low.logits(images)) + tf.reduce_sum(images)
    np.testing.assert_array_equal(tape.gradient(total, images), np.ones_like(IMAGES))


def test_a_student_in_bfloat16_leaves_a_saved_model_as_it_was_saved(network):
    path, model = network
    c = config(kind="saved_model", path=str(path), image_size=SIZE)
    c.precision = "mixed_bfloat16"
    teacher = teachers.build(c, classes=CLASSES, workdir=".")
    np.testing.assert_allclose(teacher.logits(tf.constant(IMAGES)), model(IMAGES), rtol=1e-4, atol=1e-4)


def test_low_precision_serves_under_a_strategy_of_two_devices(network):
    devices = [device.name for device in tf.config.list_logical_devices("CPU")]
    strategy = tf.distribute.MirroredStrategy(devices[:2])
    given = {"kind": "saved_model", "path": str(network[0]), "image_size": SIZE, "precision": "mixed_bfloat16"}
    alone = tf.function(build(**given).logits)(tf.constant(IMAGES))
    with strategy.scope():
        teacher = build(**given)
    answers = strategy.run(tf.function(teacher.logits), args=(tf.constant(IMAGES),))
    for answer in strategy.experimental_local_results(answers):
        np.testing.assert_allclose(answer, alone, rtol=1e-3, atol=1e-3)


def test_what_cannot_be_lowered_is_one_line(network, monkeypatch, tmp_path):
    given = {"kind": "saved_model", "path": str(network[0]), "image_size": SIZE}
    rule = r"^teacher.precision \('mixed_%s'\) must be empty or float32 where teacher.kind is saved_model: "
    if not tf.config.list_physical_devices("GPU"):
        with pytest.raises(errors.UserError, match=rule % "float16" + "no product of .* can be in float16 on this"):
            build(**given, precision="mixed_float16")
    monkeypatch.setattr(precision, "MAX_BYTES", 1000)
    with pytest.raises(
        errors.UserError, match=rule % "bfloat16" + r".* holds [\d,]+ bytes and a graph .* at most 1,000$"
    ):
        build(**given, precision="mixed_bfloat16")

    def fails(*arguments):
        raise ValueError("first line\nsecond line")

    monkeypatch.undo()
    monkeypatch.setattr(precision, "_rewritten", fails)
    with pytest.raises(errors.UserError, match=rule % "bfloat16" + r"the graph of .* can't be rewritten: first line$"):
        build(**given, precision="mixed_bfloat16")


def test_a_model_with_a_loop_and_a_branch_can_be_lowered(tmp_path):
    kernel = np.random.default_rng(2).normal(0, 0.1, (SIZE * SIZE * 3, 8)).astype(np.float32)
    square = np.random.default_rng(3).normal(0, 0.3, (8, 8)).astype(np.float32)

    class Model(tf.Module):
        def __init__(self):
            super().__init__()
            self.kernel, self.square = tf.Variable(kernel), tf.Variable(square)

        @tf.function(input_signature=[tf.TensorSpec([None, SIZE, SIZE, 3], tf.float32)])
        def serve(self, x):
            y = tf.reshape(x / 255, [-1, SIZE * SIZE * 3]) @ self.kernel
            for _ in tf.range(3):
                y = tf.cond(tf.reduce_sum(y) > 1e9, lambda: y, lambda: tf.nn.relu(y @ self.square))  # noqa: B023
            return y[:, :3]

    module = Model()
    tf.saved_model.save(module, str(tmp_path / "m"), signatures={"serving_default": module.serve})
    found = build(kind="saved_model", path=str(tmp_path / "m"), precision="mixed_bfloat16").logits(tf.constant(IMAGES))
    y = (IMAGES / 255).reshape(len(IMAGES), -1) @ kernel
    for _ in range(3):
        y = np.maximum(y @ square, 0)
    np.testing.assert_allclose(found, y[:, :3], rtol=0.05, atol=0.05)
