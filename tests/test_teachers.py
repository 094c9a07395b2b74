"""Teachers against networks whose answers are known: SavedModels and our own runs."""

import gc
import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from configs import base as template
from deit import checkpoint, errors, teachers
from deit.teachers import base
from tests import stand_ins
from tests.stand_ins import (
    CLASSES,
    IMAGES,
    KERNEL,
    SIZE,
    assert_is_stand_in,
    build,
    config,
    describe,
    expected,
    identity,
)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DEIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_no_teacher_is_none():
    assert build(kind="none") is None


def test_a_saved_model_gets_raw_pixels_and_its_only_output_is_the_logits(saved):
    teacher = build(kind="saved_model", path=str(saved))
    assert_is_stand_in(teacher)
    assert (teacher.num_classes, teacher.parameters, teacher.classes) == (3, KERNEL.size, None)


def test_a_saved_model_is_fed_range_mean_and_std_as_declared(saved):
    declared = {"range": (-1.0, 1.0), "mean": (0.5, 0.25, 0.0), "std": (0.2, 0.4, 0.8)}
    teacher = build(kind="saved_model", path=str(saved), **declared)
    wanted = ((-1 + IMAGES.astype(np.float64) / 255 * 2) - np.array([0.5, 0.25, 0.0])) / np.array([0.2, 0.4, 0.8])
    np.testing.assert_allclose(teacher.logits(tf.constant(IMAGES)), expected(wanted), rtol=1e-4, atol=1e-3)
    assert teacher.describe().endswith("8 px in [-1, 1], mean (0.5, 0.25, 0), std (0.2, 0.4, 0.8)")
    assert teachers.preprocessing(config(kind="saved_model", path="absent", **declared)) == {
        "teacher.image_size": 0,
        "teacher.range": [-1.0, 1.0],
        "teacher.mean": [0.5, 0.25, 0.0],
        "teacher.std": [0.2, 0.4, 0.8],
        "teacher.channels": "RGB",
        "teacher.background": False,
    }


def test_a_raw_picture_is_passed_on_bit_by_bit_and_bgr_only_turned():
    picture = tf.constant(np.random.default_rng(0).uniform(0, 255, (2, SIZE, SIZE, 3)).astype(np.float32))
    for size in (SIZE, 0):
        assert base.Input(size).apply(picture) is picture
    turned = base.Input(SIZE, channels="BGR").apply(picture)
    np.testing.assert_array_equal(turned, picture.numpy()[..., ::-1])


def test_the_background_is_cut_off_and_not_counted(saved):
    teacher = build(kind="saved_model", path=str(saved), background=True, classes=("b", "c"))
    np.testing.assert_allclose(teacher.logits(tf.constant(IMAGES)), expected(IMAGES)[:, 1:], rtol=1e-4, atol=0.05)
    assert teacher.num_classes == 2
    with pytest.raises(errors.UserError, match=r"has 2 classes, it must have the data's 3"):
        build(kind="saved_model", path=str(saved), background=True)


def test_class_names_are_compared_by_name_and_do_not_belong_to_the_identity(saved, tmp_path):
    names = tmp_path / "names.txt"
    names.write_text("a\nb \nc\n\n\n")
    teacher = build(kind="saved_model", path=str(saved), class_names=str(names))
    assert teacher.classes == ("a", "b", "c")
    assert teacher.identity == build(kind="saved_model", path=str(saved)).identity
    with pytest.raises(errors.UserError, match=r"class 1 of .* is 'b', it must be the data's 'c'"):
        build(kind="saved_model", path=str(saved), class_names=str(names), classes=("a", "c", "b"))
    with pytest.raises(errors.UserError, match=r"teacher.class_names \(.*names.txt'\) has 3 names, .* has 2"):
        build(kind="saved_model", path=str(saved), class_names=str(names), background=True, classes=("a", "b"))
    lost = config(kind="saved_model", path=str(saved), class_names=str(tmp_path / "none.txt"))
    with pytest.raises(errors.UserError, match=r"^teacher.class_names \(.*none.txt'\): .* can't be read: No such file"):
        teachers.check(lost)


def test_a_saved_model_outlives_its_loading_in_a_graph_and_lets_no_gradient_pass(saved):
    teacher, images = build(kind="saved_model", path=str(saved)), tf.constant(IMAGES)
    gc.collect()

    @tf.function
    def gradient():
        with tf.GradientTape() as tape:
            tape.watch(images)
            logits = teacher.logits(images)
            total = tf.reduce_sum(logits) + tf.reduce_sum(images)
        return logits, tape.gradient(total, images)

    logits, to_images = gradient()
    np.testing.assert_allclose(logits, expected(IMAGES), rtol=1e-4, atol=0.05)
    np.testing.assert_array_equal(to_images, np.ones_like(IMAGES))


def test_images_of_another_size_are_resized_as_pillow_does(saved):
    teacher = build(kind="saved_model", path=str(saved))
    large = np.random.default_rng(2).integers(0, 256, (1, 20, 20, 3)).astype(np.float32)
    channels = [
        np.asarray(Image.fromarray(large[0, ..., i]).resize((SIZE, SIZE), Image.Resampling.BILINEAR)) for i in range(3)
    ]
    small = np.stack(channels, -1)[None]
    np.testing.assert_allclose(teacher.logits(tf.constant(large)), expected(small), rtol=1e-3, atol=1.0)


def test_a_callable_without_signature_is_called_in_inference_mode(tmp_path):
    class Model(tf.Module):
        @tf.function(input_signature=[tf.TensorSpec([None, SIZE, SIZE, 3], tf.float32), tf.TensorSpec([], tf.bool)])
        def __call__(self, x, training):
            logits = tf.reshape(x, [-1, SIZE * SIZE * 3]) @ KERNEL
            return tf.where(training, tf.zeros_like(logits), logits)

    tf.saved_model.save(Model(), str(tmp_path / "m"))
    assert_is_stand_in(build(kind="saved_model", path=str(tmp_path / "m")))


def test_two_outputs_are_refused_by_name(tmp_path):
    stand_ins.save(tmp_path / "m", outputs=("logits", "features"))
    with pytest.raises(errors.UserError, match=r"m'\) must give one output, it gives features, logits$"):
        build(kind="saved_model", path=str(tmp_path / "m"))


def test_a_model_without_output_or_without_a_way_in_is_one_line(tmp_path):
    stand_ins.save(tmp_path / "mute", outputs=())
    with pytest.raises(errors.UserError, match=r"^teacher.path .*mute'\) must give one output, it gives none$"):
        build(kind="saved_model", path=str(tmp_path / "mute"))
    module = stand_ins.StandIn()
    tf.saved_model.save(module, str(tmp_path / "other"), signatures={"classify": module.serve})
    with pytest.raises(
        errors.UserError, match=r"serving_default of one input or be callable; its signatures: classify"
    ):
        build(kind="saved_model", path=str(tmp_path / "other"))


def test_more_and_fewer_classes_than_the_data_s_are_refused(saved):
    with pytest.raises(errors.UserError, match=r"has 3 classes, it must have the data's 2"):
        build(kind="saved_model", path=str(saved), classes=("a", "b"))
    with pytest.raises(errors.UserError, match=r"has 3 classes, it must have the data's 4"):
        build(kind="saved_model", path=str(saved), classes=("a", "b", "c", "d"))


def test_an_image_size_that_the_signature_does_not_take_is_refused(saved):
    with pytest.raises(errors.UserError, match=r"teacher.image_size \(16\) must be 0 or the 8 px"):
        build(kind="saved_model", path=str(saved), image_size=16)


def test_paths_that_hold_no_saved_model_are_refused(tmp_path, saved):
    with pytest.raises(errors.UserError, match=r"teacher.path .*nowhere.* must be an existing"):
        build(kind="saved_model", path=str(tmp_path / "nowhere"))
    with pytest.raises(errors.UserError, match=r"must hold one SavedModel: 0 saved_model.pb"):
        build(kind="saved_model", path=str(tmp_path))
    (tmp_path / "text.zip").write_text("not a zip")
    with pytest.raises(errors.UserError, match=r"can't be unpacked as a zip, tar or tar.gz: "):
        build(kind="saved_model", path=str(tmp_path / "text.zip"))
    damaged = Path(shutil.copytree(saved, tmp_path / "damaged"))
    (damaged / "saved_model.pb").write_bytes((damaged / "saved_model.pb").read_bytes()[:-100])
    with pytest.raises(errors.UserError, match=r"can't be loaded"):
        build(kind="saved_model", path=str(damaged))


def test_a_saved_model_s_identity_is_that_of_its_files(saved, tmp_path):
    copy = Path(shutil.copytree(saved, tmp_path / "copy"))
    teacher = build(kind="saved_model", path=str(copy))
    digest = hashlib.sha256()
    files = sorted(str(file.relative_to(copy)) for file in copy.rglob("*") if file.is_file())
    assert len(files) > 2
    for name in files:
        digest.update(len(name).to_bytes(8, "little") + name.encode())
        digest.update(hashlib.sha256((copy / name).read_bytes()).digest())
    assert teacher.identity == digest.hexdigest()
    assert build(kind="saved_model", path=str(saved)).identity == teacher.identity  # wherever it lies
    assert identity(kind="saved_model", path=str(copy)) == teacher.identity
    (copy / "assets" / "labels.txt").write_text("x")
    assert build(kind="saved_model", path=str(copy)).identity != teacher.identity


def test_weights_behind_a_linked_directory_are_part_of_the_identity(saved, tmp_path):
    def linked(name, change=b""):
        copy = Path(shutil.copytree(saved, tmp_path / name))
        store = Path(shutil.move(copy / "variables", tmp_path / f"{name}-store"))
        data = store / "variables.data-00000-of-00001"
        data.write_bytes(data.read_bytes() + change)
        (copy / "variables").symlink_to(store, target_is_directory=True)
        return identity(kind="saved_model", path=str(copy))

    assert linked("a") == identity(kind="saved_model", path=str(saved)) != linked("b", b"x")


def test_check_refuses_what_the_files_show_and_touches_nothing(saved, archive, tmp_path):
    def check(**teacher):
        teachers.check(config(**teacher))

    for kind in ("none", "train"):
        check(kind=kind)
    for path in (saved, archive, "https://example.invalid/t.zip"):
        check(kind="saved_model", path=str(path))
    check(kind="keras_application", name="ResNet50")
    for wrong, message in (
        ({"kind": "keras_application", "name": "ResNet51"}, r"'ResNet51'.*nearest: ResNet50"),
        ({"kind": "keras_application", "weights": str(tmp_path / "no.h5")}, r"no.h5'\) must be imagenet or"),
        ({"kind": "saved_model", "path": str(tmp_path / "none")}, r"none'\) must be an existing"),
        ({"kind": "saved_model", "path": str(saved), "sha256": "0" * 64}, r"teacher.sha256 must be empty"),
        ({"kind": "run", "path": str(tmp_path / "none")}, r"teacher.path .*is no run"),
        ({"kind": "run", "path": str(saved)}, r"teacher.path .*is no run"),
    ):
        with pytest.raises(errors.UserError, match=message):
            check(**wrong)
    assert [file.name for file in archive.parent.iterdir()] == ["teacher.zip"]


def test_the_plan_s_line_counts_what_is_there_and_writes_nothing(saved, archive, cache):
    assert describe(kind="none") == "none"
    size = f"{KERNEL.size} parameters, 8 px in [0, 255]"
    assert describe(kind="saved_model", path=str(saved)) == f"{saved}, {size}"
    before = f"{archive}: not unpacked, parameters not checked"
    assert describe(kind="saved_model", path=str(archive)) == before
    assert [file.name for file in archive.parent.iterdir()] == ["teacher.zip"]
    build(kind="saved_model", path=str(archive))
    assert describe(kind="saved_model", path=str(archive)) == f"{archive}, {size}"
    url = "https://example.invalid/t.zip"
    assert describe(kind="saved_model", path=url) == f"{url}: not downloaded, parameters not checked"
    assert not cache.exists()


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    return stand_ins.finished_run(tmp_path_factory.mktemp("run") / "teacher")


@pytest.mark.parametrize("kind", ["run", "train"])
def test_a_run_teaches_with_the_fused_logits_of_its_newest_checkpoint(finished_run, kind):
    workdir, network = finished_run
    teacher = build(kind=kind, path=str(workdir), workdir=workdir.parent)
    images = np.random.default_rng(4).integers(0, 256, (3, 16, 16, 3)).astype(np.float32)
    outputs = network.model(images)
    np.testing.assert_allclose(teacher.logits(tf.constant(images)), (outputs["cls"] + outputs["dist"]) / 2, atol=1e-5)
    assert teacher.classes == CLASSES
    assert teacher.parameters == network.model.count_params()
    assert teacher.input == base.Input(16)  # the model scales for itself
    tensors, manifest = checkpoint.read(checkpoint.locate(workdir))
    assert teacher.identity == manifest["state_sha256"] == checkpoint.state_sha256(tensors)
    assert identity(kind=kind, path=str(workdir), workdir=workdir.parent) == teacher.identity


def test_an_archive_that_is_pinned_and_absent_has_the_pin_for_identity(archive, tmp_path, cache):
    pin = "AB" * 32
    for path in ("https://example.invalid/t.zip", str(tmp_path / "none.zip")):
        assert identity(kind="saved_model", path=path, sha256=pin) == pin.lower()
        cached = config(kind="saved_model", path=path, sha256=pin, cache="read", cache_dir="x")
        teachers.check(cached)
    assert not cache.exists()
    with pytest.raises(errors.UserError, match=r"none.zip'\) must be an existing"):
        build(kind="saved_model", path=str(tmp_path / "none.zip"), sha256=pin)
    with pytest.raises(errors.UserError, match=r"teacher.path .*none.zip can't be read: No such file"):
        identity(kind="saved_model", path=str(tmp_path / "none.zip"))
    with pytest.raises(errors.UserError, match=r"teacher.sha256 .* must be that of"):
        identity(kind="saved_model", path=str(archive), sha256=pin)
    assert identity(kind="saved_model", path=str(archive)) == hashlib.sha256(archive.read_bytes()).hexdigest()
    assert identity(kind="none") == "" and teachers.preprocessing(config(kind="none")) == {}


def test_what_a_run_makes_of_a_picture_is_in_its_configuration(finished_run):
    workdir, _ = finished_run
    found = teachers.preprocessing(config(kind="run", path=str(workdir)))
    assert found["teacher.image_size"] == 16 and found["teacher.model.mean"] == list(template.get_config().model.mean)
    c = config(kind="train")
    c.teacher.train = template.get_config()
    c.teacher.train.data.image_size = 16
    c.teacher.train.model.variant = found["teacher.model.variant"]
    assert teachers.preprocessing(c) == found == json.loads(json.dumps(found))


def test_a_run_computes_in_the_teacher_s_precision_and_else_in_the_student_s(finished_run):
    workdir, _ = finished_run
    images = tf.constant(np.random.default_rng(4).integers(0, 256, (3, 16, 16, 3)).astype(np.float32))

    def answers(precision, own):
        c = config(kind="run", path=str(workdir), precision=own)
        c.precision = precision
        return teachers.build(c, classes=CLASSES, workdir=workdir.parent).logits(images).numpy()

    exact, low = answers("float32", ""), answers("mixed_bfloat16", "")
    assert 0 < np.abs(exact - low).max() < 0.1
    np.testing.assert_array_equal(answers("mixed_bfloat16", "float32"), exact)
    np.testing.assert_array_equal(answers("float32", "mixed_bfloat16"), low)
    with pytest.raises(
        errors.UserError, match=r"teacher.precision \('float32'\) must be empty where precision is 'tf32'"
    ):
        answers("tf32", "float32")


def test_a_run_that_is_not_finished_teaches_with_a_warning(finished_run, caplog):
    workdir, _ = finished_run
    build(kind="run", path=str(workdir))
    (line,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert str(workdir) in line and "not finished (update 3 of 40)" in line


def test_the_plan_s_line_on_a_run_or_a_teacher_to_be_trained_counts_its_network(finished_run, tmp_path):
    workdir, network = finished_run
    teachers.check(config(kind="run", path=str(workdir)))
    size = f"deit_micro_distilled_patch4_32, {network.model.count_params():,} parameters, 16 px in [0, 255]"
    assert describe(kind="run", path=str(workdir)) == f"{workdir}: {size}"
    assert describe(kind="run", path=str(tmp_path / "no")) == f"{tmp_path / 'no'}: absent"
    c = config(kind="train")
    c.teacher.train = template.get_config()
    c.teacher.train.data.image_size, c.teacher.train.model.variant = 16, "deit_micro_distilled_patch4_32"
    assert teachers.describe(c, 3).line == f"train: {size}"


def test_a_run_with_the_same_classes_in_another_order_is_refused(finished_run):
    with pytest.raises(errors.UserError, match=r"class 0 of .* is 'a', it must be the data's 'b'"):
        build(kind="run", path=str(finished_run[0]), classes=("b", "a", "c"))


def test_a_directory_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(errors.UserError, match=r"teacher.path .*is no run"):
        build(kind="run", path=str(tmp_path))
