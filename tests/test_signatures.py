"""The forms in which SavedModels are shared: TF-Hub's two, callables, integer inputs."""

import numpy as np
import pytest
import tensorflow as tf

from deit import errors
from tests.stand_ins import CLASSES, IMAGES, KERNEL, SIZE, assert_is_stand_in, build, expected

BACKGROUND = np.concatenate([np.full((SIZE * SIZE * 3, 1), 0.5, np.float32), KERNEL], 1)


def module_of_the_first_form(directory, signatures):
    """Save what TF-Hub saved under TensorFlow 1: graphs without and with the tag `train`, signatures by name.

    `signatures`: {name: (input name, {output name: factor of the logits})}.
    """
    for tags in ([], ["train"]):
        with tf.Graph().as_default(), tf.compat.v1.Session() as session:
            images = tf.compat.v1.placeholder(tf.float32, [None, SIZE, SIZE, 3], name="images")
            kernel = tf.compat.v1.get_variable("kernel", initializer=BACKGROUND)
            logits = tf.reshape(images, [-1, SIZE * SIZE * 3]) @ kernel * (0.0 if tags else 1.0)
            found = {
                name: tf.compat.v1.saved_model.predict_signature_def(
                    {given: images}, {output: logits * factor for output, factor in outputs.items()}
                )
                for name, (given, outputs) in signatures.items()
            }
            session.run(tf.compat.v1.global_variables_initializer())
            if not tags:
                builder = tf.compat.v1.saved_model.Builder(str(directory))
                builder.add_meta_graph_and_variables(session, tags, signature_def_map=found)
            else:
                builder.add_meta_graph(tags, signature_def_map=found)
    builder.save()
    (directory / "tfhub_module.pb").write_bytes(b"\x08\x03")


def test_a_module_of_tf_hub_s_first_form_gives_the_logits_of_its_image_signature(tmp_path):
    outputs = {"logits": 1.0, "default": 3.0, "features": 5.0}
    signatures = {"default": ("images", {"default": 7.0}), "image_classification": ("images", outputs)}
    module_of_the_first_form(tmp_path / "m", signatures)
    teacher = build(kind="saved_model", path=str(tmp_path / "m"), background=True, range=(0.0, 1.0), class_names="")
    logits = teacher.logits(tf.constant(IMAGES))
    np.testing.assert_allclose(logits, expected(IMAGES / 255), rtol=1e-4, atol=1e-3)
    assert (teacher.num_classes, teacher.parameters, teacher.input.size) == (3, BACKGROUND.size, SIZE)
    assert teacher.describe().endswith("8 px in [0, 1]")


def test_a_module_of_the_first_form_without_that_signature_gives_its_default(tmp_path):
    module_of_the_first_form(tmp_path / "m", {"default": ("images", {"default": 1.0, "block/1": 2.0})})
    teacher = build(kind="saved_model", path=str(tmp_path / "m"), background=True)
    assert_is_stand_in(teacher)


def test_a_module_that_takes_no_images_is_refused_by_its_signatures(tmp_path):
    module_of_the_first_form(tmp_path / "m", {"default": ("text", {"default": 1.0}), "other": ("images", {"x": 1.0})})
    with pytest.raises(
        errors.UserError, match=r"^teacher.path .* must have a signature .*; its signatures: default, other$"
    ):
        build(kind="saved_model", path=str(tmp_path / "m"))


def test_a_callable_that_knows_of_no_training_mode_is_called(tmp_path):
    class Model(tf.Module):
        @tf.function(input_signature=[tf.TensorSpec([None, None, None, 3], tf.float32)])
        def __call__(self, x):
            return tf.reshape(x, [-1, SIZE * SIZE * 3]) @ KERNEL

    tf.saved_model.save(Model(), str(tmp_path / "m"))
    teacher = build(kind="saved_model", path=str(tmp_path / "m"))
    assert_is_stand_in(teacher)
    assert teacher.input.size == SIZE  # the student's: nothing fixes another


def test_an_input_of_integers_gets_the_nearest_ones(tmp_path):
    class Model(tf.Module):
        @tf.function(input_signature=[tf.TensorSpec([None, SIZE, SIZE, 3], tf.uint8)])
        def serve(self, x):
            return tf.reshape(tf.cast(x, tf.float32), [-1, SIZE * SIZE * 3]) @ KERNEL

    module = Model()
    tf.saved_model.save(module, str(tmp_path / "m"), signatures={"serving_default": module.serve})
    mixed = np.clip(IMAGES + np.float32(0.7) * (IMAGES % 2) - np.float32(0.2), -3, 255.2)
    found = build(kind="saved_model", path=str(tmp_path / "m"), classes=CLASSES).logits(tf.constant(mixed))
    np.testing.assert_allclose(found, expected(np.clip(np.rint(mixed), 0, 255)), rtol=1e-4, atol=0.05)


def test_a_module_of_the_first_form_serves_under_a_strategy_of_two_devices(tmp_path):
    module_of_the_first_form(tmp_path / "m", {"default": ("images", {"default": 1.0})})
    devices = [device.name for device in tf.config.list_logical_devices("CPU")]
    strategy = tf.distribute.MirroredStrategy(devices[:2])
    with strategy.scope():
        teacher = build(kind="saved_model", path=str(tmp_path / "m"), background=True)
    answers = strategy.run(tf.function(teacher.logits), args=(tf.constant(IMAGES),))
    for answer in strategy.experimental_local_results(answers):
        np.testing.assert_allclose(answer, expected(IMAGES), rtol=1e-4, atol=0.05)
