"""Teachers against networks whose answers are known; downloads from a server on loopback."""

import contextlib
import gc
import hashlib
import http.server
import shutil
import stat
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from configs import base as template
from deit import checkpoint, errors, keras, teachers
from deit import config as configuration
from deit.models import factory, paths
from deit.teachers import base, report

CLASSES = ("a", "b", "c")
SIZE = 8
KERNEL = np.random.default_rng(0).normal(0, 1, (SIZE * SIZE * 3, 3)).astype(np.float32)
IMAGES = np.random.default_rng(1).integers(0, 256, (2, SIZE, SIZE, 3)).astype(np.float32)


def expected(images):
    return images.reshape(len(images), -1) @ KERNEL


def config(**teacher):
    c = template.get_config()
    c.data.image_size = SIZE
    c.teacher.update(teacher)
    return c


def build(workdir=".", classes=CLASSES, **teacher):
    return teachers.build(config(**teacher), classes=classes, workdir=Path(workdir))


class StandIn(tf.Module):
    """A linear classifier of raw pixels."""

    def __init__(self, outputs):
        super().__init__()
        self.kernel, self.outputs = tf.Variable(KERNEL), outputs

    @tf.function(input_signature=[tf.TensorSpec([None, SIZE, SIZE, 3], tf.float32, name="image")])
    def serve(self, image):
        logits = tf.reshape(image, [-1, SIZE * SIZE * 3]) @ self.kernel
        return dict.fromkeys(self.outputs, logits)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    directory = tmp_path_factory.mktemp("saved") / "stand_in"
    module = StandIn(["logits"])
    tf.saved_model.save(module, str(directory), signatures={"serving_default": module.serve})
    return directory


@pytest.fixture(scope="module")
def zipped(saved, tmp_path_factory):
    return Path(shutil.make_archive(str(tmp_path_factory.mktemp("zip") / "t"), "zip", saved.parent, "stand_in"))


@pytest.fixture
def archive(zipped, tmp_path):
    return Path(shutil.copy(zipped, tmp_path / "teacher.zip"))


def assert_is_stand_in(teacher):
    np.testing.assert_allclose(teacher.logits(tf.constant(IMAGES)), expected(IMAGES), rtol=1e-4, atol=0.05)


def test_no_teacher_is_none():
    assert build(kind="none") is None


def test_a_saved_model_gets_raw_pixels_and_its_only_output_is_the_logits(saved):
    teacher = build(kind="saved_model", path=str(saved))
    assert_is_stand_in(teacher)
    assert (teacher.num_classes, teacher.parameters, teacher.classes) == (3, KERNEL.size, None)


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
    module = StandIn(["logits", "features"])
    tf.saved_model.save(module, str(tmp_path / "m"), signatures={"serving_default": module.serve})
    with pytest.raises(errors.UserError, match=r"one output, it gives .*'features', 'logits'"):
        build(kind="saved_model", path=str(tmp_path / "m"))


def test_another_number_of_classes_is_refused(saved):
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
    with pytest.raises(errors.UserError, match=r"can't be unpacked as a zip"):
        build(kind="saved_model", path=str(tmp_path / "text.zip"))
    damaged = Path(shutil.copytree(saved, tmp_path / "damaged"))
    (damaged / "saved_model.pb").write_bytes((damaged / "saved_model.pb").read_bytes()[:-100])
    with pytest.raises(errors.UserError, match=r"can't be loaded"):
        build(kind="saved_model", path=str(damaged))


def describe(num_classes=3, **teacher):
    return teachers.describe(config(**teacher), num_classes)


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
    (copy / "assets" / "labels.txt").write_text("x")
    assert build(kind="saved_model", path=str(copy)).identity != teacher.identity


def test_a_zip_s_identity_is_its_sha256_and_a_damaged_stream_is_one_line(archive, tmp_path):
    data = archive.read_bytes()
    assert build(kind="saved_model", path=str(archive)).identity == hashlib.sha256(data).hexdigest()
    with zipfile.ZipFile(archive) as file:
        member = max(file.infolist(), key=lambda info: info.compress_size)
    start = member.header_offset + 30 + len(member.filename)
    for filling in (b"\xff", b"\x00"):
        bad = tmp_path / f"bad{filling[0]}.zip"
        bad.write_bytes(data[:start] + filling * member.compress_size + data[start + member.compress_size :])
        with pytest.raises(errors.UserError, match=r"can't be unpacked as a zip: ") as caught:
            build(kind="saved_model", path=str(bad))
        assert "\n" not in str(caught.value)
    assert [p.name for p in tmp_path.iterdir() if p.is_dir() and p.name.startswith("bad")] == []


def test_a_teacher_file_that_may_not_be_read_is_one_line_with_its_path(archive, monkeypatch):
    def denied(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("deit.workdir.describe", denied)
    with pytest.raises(errors.UserError, match=rf"^teacher.path .*{archive} can't be read: Permission denied$"):
        build(kind="saved_model", path=str(archive))
    monkeypatch.undo()
    for call in (build, lambda **teacher: teachers.check(config(**teacher))):
        with pytest.raises(errors.UserError, match=r"^teacher.path .* can't be read: File name too long$"):
            call(kind="saved_model", path=str(archive.parent / ("x" * 300)))


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
    assert describe(kind="saved_model", path=str(saved)) == f"{saved}, {KERNEL.size} parameters"
    before = f"{archive}: not unpacked, parameters not checked"
    assert describe(kind="saved_model", path=str(archive)) == before
    assert [file.name for file in archive.parent.iterdir()] == ["teacher.zip"]
    build(kind="saved_model", path=str(archive))
    assert describe(kind="saved_model", path=str(archive)) == f"{archive}, {KERNEL.size} parameters"
    url = "https://example.invalid/t.zip"
    assert describe(kind="saved_model", path=url) == f"{url}: not downloaded, parameters not checked"
    assert not cache.exists()


@contextlib.contextmanager
def server(directory, *, cut=0):
    """Serve a directory on loopback, each answer `cut` bytes short; yield (url, paths asked for)."""
    requests = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments):
            super().__init__(*arguments, directory=str(directory))

        def do_GET(self):
            requests.append(self.path)
            file = Path(directory) / self.path[1:]
            if not file.is_file():
                return self.send_error(404)
            body = file.read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[: len(body) - cut])

        def log_message(self, *arguments):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{httpd.server_port}", requests
        httpd.shutdown()
        thread.join()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DEIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_url_is_downloaded_once_and_its_sha256_recorded(zipped, cache):
    with server(zipped.parent) as (url, requests):
        path = f"{url}/{zipped.name}"
        assert_is_stand_in(build(kind="saved_model", path=path))
        assert_is_stand_in(build(kind="saved_model", path=path))
        assert requests == [f"/{zipped.name}"]
    assert_is_stand_in(build(kind="saved_model", path=path))  # and with the server gone
    (record,) = cache.glob("*.sha256")
    assert len(record.read_text().split()[0]) == 64
    assert not list(cache.glob("*.part-*")) + list(cache.glob("*.tmp-*"))


def test_a_download_that_breaks_off_leaves_nothing_and_a_missing_file_says_so(zipped, cache):
    with server(zipped.parent, cut=7) as (url, _):
        with pytest.raises(errors.UserError, match=r"the connection ended after|IncompleteRead"):
            build(kind="saved_model", path=f"{url}/{zipped.name}")
        with pytest.raises(errors.UserError, match=r"can't be downloaded: HTTP Error 404.*give its path"):
            build(kind="saved_model", path=f"{url}/none.zip")
    assert not list(cache.iterdir())


def test_content_that_changed_since_its_first_use_is_refused(archive):
    assert_is_stand_in(build(kind="saved_model", path=str(archive)))
    with zipfile.ZipFile(archive, "a") as file:
        file.writestr("more.txt", "more")
    with pytest.raises(errors.UserError, match=r"changed: its sha256 is"):
        build(kind="saved_model", path=str(archive))


def test_a_pinned_sha256_must_match_before_anything_is_unpacked(archive):
    with pytest.raises(errors.UserError, match=r"teacher.sha256 .0{64}. must be that of"):
        build(kind="saved_model", path=str(archive), sha256="0" * 64)
    assert [file.name for file in archive.parent.iterdir()] == ["teacher.zip"]


def link(name, target):
    info = zipfile.ZipInfo(name)
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    return info, target


@pytest.mark.parametrize(
    "member", [("../out.txt", "x"), ("/tmp/deit-out.txt", "x"), ("in/../../out.txt", "x"), link("l", "/etc")]
)
def test_zip_members_that_lead_outside_are_refused(tmp_path, member):
    path = tmp_path / "inner" / "evil.zip"
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("saved_model.pb", "x")
        file.writestr(*member)
    with pytest.raises(errors.UserError, match=r"must be a relative path, no link, no \.\."):
        build(kind="saved_model", path=str(path))
    assert not (tmp_path / "out.txt").exists() and not Path("/tmp/deit-out.txt").exists()
    assert [file.name for file in path.parent.iterdir() if file.is_dir()] == []


@pytest.fixture(scope="module")
def mobilenet(tmp_path_factory):
    network = keras.applications.MobileNet(weights=None, input_shape=(32, 32, 3), classes=3, classifier_activation=None)
    rng = np.random.default_rng(0)
    for variable in network.variables:
        if "moving_mean" in variable.name:
            variable.assign(rng.normal(0, 0.1, variable.shape))
    path = tmp_path_factory.mktemp("weights") / "mobilenet.h5"
    network.save_weights(str(path))
    return network, path


def test_a_keras_application_preprocesses_for_itself_and_keeps_its_statistics(mobilenet):
    network, path = mobilenet
    teacher = build(kind="keras_application", name="MobileNet", weights=str(path), image_size=32)
    images = np.random.default_rng(3).integers(0, 256, (4, 32, 32, 3)).astype(np.float32)
    answers = network(images / 127.5 - 1, training=False)
    first, alone = teacher.logits(tf.constant(images)), teacher.logits(tf.constant(images[:1]))
    assert np.ptp(answers) > 1e-3
    np.testing.assert_allclose(first, answers, atol=1e-5)
    np.testing.assert_allclose(alone, answers[:1], atol=1e-5)  # whatever else is in the batch
    assert teacher.parameters == network.count_params()
    assert teacher.num_classes == 3
    assert teacher.identity == f"MobileNet {hashlib.sha256(path.read_bytes()).hexdigest()}"
    line = describe(kind="keras_application", name="MobileNet", weights=str(path), image_size=32)
    assert f"MobileNet ({path}), {network.count_params():,} parameters" in line


def test_an_application_that_cannot_be_built_is_one_line(mobilenet, tmp_path):
    _, path = mobilenet
    with pytest.raises(errors.UserError, match=r"'ResNet51'.*nearest: ResNet50"):
        build(kind="keras_application", name="ResNet51")
    with pytest.raises(errors.UserError, match=r"has 1000 classes, the data has 3"):
        build(kind="keras_application", name="ResNet50", weights="imagenet")
    with pytest.raises(errors.UserError, match=r"teacher.weights .*none.h5.* must be imagenet or"):
        build(kind="keras_application", name="ResNet50", weights=str(tmp_path / "none.h5"))
    with pytest.raises(errors.UserError, match=r"VGG16\) with teacher.weights .* can't be built"):
        build(kind="keras_application", name="VGG16", weights=str(path), image_size=32)


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    """A run with one checkpoint of a small network: (workdir, network)."""
    c = template.get_config()
    c.data.image_size, c.model.variant, c.model.seed = 16, "deit_micro_distilled_patch4_32", 5
    c = configuration.resolve(c, train_size=512, eval_size=8, classes=CLASSES, replicas=1)
    network = factory.build(c.model, num_classes=3, image_size=16, precision="float32")
    rng = np.random.default_rng(0)
    for _, variable in paths.variables(network.model):
        variable.assign(variable + rng.normal(0, 0.05, variable.shape))  # no longer the initial weights
    tensors = {f"student/{path}": variable.numpy() for path, variable in paths.variables(network.model)}
    workdir = tmp_path_factory.mktemp("run") / "teacher"
    saver = checkpoint.Saver(workdir, config_json=configuration.to_json(c), keep=1, versions={})
    saver.save(3, tensors, metrics={})
    saver.join()
    return workdir, network


@pytest.mark.parametrize("kind", ["run", "train"])
def test_a_run_teaches_with_the_fused_logits_of_its_newest_checkpoint(finished_run, kind):
    workdir, network = finished_run
    teacher = build(kind=kind, path=str(workdir), workdir=workdir.parent)
    images = np.random.default_rng(4).integers(0, 256, (3, 16, 16, 3)).astype(np.float32)
    outputs = network.model(images)
    np.testing.assert_allclose(teacher.logits(tf.constant(images)), (outputs["cls"] + outputs["dist"]) / 2, atol=1e-5)
    assert teacher.classes == CLASSES
    assert teacher.parameters == network.model.count_params()
    assert teacher.image_size == 16
    tensors, manifest = checkpoint.read(checkpoint.locate(workdir))
    assert teacher.identity == manifest["state_sha256"] == checkpoint.state_sha256(tensors)


def test_a_run_that_is_not_finished_teaches_with_a_warning(finished_run, caplog):
    workdir, _ = finished_run
    build(kind="run", path=str(workdir))
    (line,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert str(workdir) in line and "not finished (update 3 of 40)" in line


def test_the_plan_s_line_on_a_run_or_a_teacher_to_be_trained_counts_its_network(finished_run, tmp_path):
    workdir, network = finished_run
    teachers.check(config(kind="run", path=str(workdir)))
    size = f"deit_micro_distilled_patch4_32, {network.model.count_params():,} parameters"
    assert describe(kind="run", path=str(workdir)) == f"{workdir}: {size}"
    assert describe(kind="run", path=str(tmp_path / "no")) == f"{tmp_path / 'no'}: absent"
    c = config(kind="train")
    c.teacher.train = template.get_config()
    c.teacher.train.data.image_size, c.teacher.train.model.variant = 16, "deit_micro_distilled_patch4_32"
    assert teachers.describe(c, 3) == f"train: {size}"


def test_a_run_with_the_same_classes_in_another_order_is_refused(finished_run):
    with pytest.raises(errors.UserError, match=r"class 0 of .* is 'a', it must be the data's 'b'"):
        build(kind="run", path=str(finished_run[0]), classes=("b", "a", "c"))


def test_a_directory_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(errors.UserError, match=r"teacher.path .*is no run"):
        build(kind="run", path=str(tmp_path))


def batches():
    """Four images in two batches; the answer is the brightest channel; the last row has weight 0."""
    images = np.zeros((4, SIZE, SIZE, 3), np.uint8)
    for row, channel in enumerate((0, 2, 1, 0)):
        images[row, ..., channel] = 200
    labels, weights = np.array([0, 2, 0, 1], np.int32), np.array([1, 1, 1, 0], np.float32)
    return [
        {
            "image": tf.constant(images[i : i + 2]),
            "label": tf.constant(labels[i : i + 2]),
            "weight": tf.constant(weights[i : i + 2]),
        }
        for i in (0, 2)
    ]


def brightest(scale=1.0):
    return base.Teacher("brightest", lambda x: scale * tf.reduce_mean(x, [1, 2]), SIZE, 3, 0, None, "")


def test_the_report_counts_rows_of_weight_above_zero_and_keeps_the_labels_of_all():
    found = report.measure(brightest(), batches(), CLASSES)
    assert found.labels.tolist() == [0, 2, 1, 0]
    assert found.metrics["teacher/top1"] == pytest.approx(2 / 3)
    assert found.metrics["teacher/images"] == 3
    assert found.metrics["teacher/recall/a"] == 0.5  # rows 0 and 2 are a, row 2 is taken for b
    assert found.metrics["teacher/recall/c"] == 1.0
    assert "teacher/recall/b" not in found.metrics  # its only row has weight 0


def test_the_gate_lets_pass_at_the_bound_and_names_both_numbers_below():
    found = report.Report({"teacher/top1": 0.75, "teacher/images": 8.0}, np.zeros(8, np.int32))
    report.gate(found, 0.75)
    with pytest.raises(errors.UserError, match=r"teacher.min_accuracy \(0.76\).*\(0.7500 of 8 images\)"):
        report.gate(found, 0.76)


def test_logits_that_are_not_finite_and_an_empty_split_are_refused():
    with pytest.raises(errors.UserError, match=r"not finite"):
        report.measure(brightest(float("nan")), batches(), CLASSES)
    with pytest.raises(errors.UserError, match=r"data.eval_split"):
        report.measure(brightest(), [], CLASSES)
