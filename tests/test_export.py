"""tools/export.py: what it writes opens in processes without this package and answers as the checkpoint does."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from deit import errors, evaluate, export, predict, saved
from tests import family

REPOSITORY = Path(__file__).resolve().parents[1]
VARIANT = "deit_micro_distilled_patch8_32"


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory):
    return family.checkpoint(tmp_path_factory.mktemp("two") / "ckpt", VARIANT, ema=True)


@pytest.fixture(scope="module")
def exported(ckpt, tmp_path_factory):
    out = tmp_path_factory.mktemp("export") / "new" / "out"
    return out, export.export(ckpt, out, formats=["saved_model", "keras"])


def run(*arguments):
    command = [sys.executable, "tools/export.py", *map(str, arguments)]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120)


def alone(code, directory):
    """Run Python that finds nothing of this package, in `directory`."""
    code = f"import sys; sys.modules['deit'] = None\n{code}"
    done = subprocess.run([sys.executable, "-c", code], cwd=directory, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def logits_alone(opened_and_asked, images, directory):
    """Return what Python code makes of the array `x`, a dict of arrays, in a process without this package."""
    np.save(directory / "x.npy", images)
    alone(f"import numpy as np\nx = np.load('x.npy')\n{opened_and_asked}\nnp.savez('y.npz', **y)\n", directory)
    return np.load(directory / "y.npz", allow_pickle=False)


def own_logits(ckpt, images, weights="raw"):
    network = saved.open_network(ckpt, weights=weights).network
    return {name: value.numpy() for name, value in network.logits(images.astype("f4")).items()}


def test_plain_tensorflow_answers_files_and_pictures_of_any_size_as_predict_does(ckpt, exported, tmp_path):
    out, _ = exported
    random = np.random.default_rng(0)
    files = []
    for name, shape in (("a.png", [40, 50, 3]), ("b.jpg", [64, 33, 3])):
        smooth = np.asarray(Image.fromarray(random.integers(0, 256, [6, 6, 3], np.uint8)).resize(shape[1::-1]))
        Image.fromarray(smooth).save(tmp_path / name)
        files.append(str(tmp_path / name))
    code = (
        "import json, tensorflow as tf\n"
        f"answers = tf.saved_model.load({str(out / 'saved_model')!r}).signatures\n"
        f"data = [tf.io.read_file(f) for f in {files!r}]\n"
        "found = answers['encoded'](encoded=tf.stack(data))\n"
        "picture = tf.io.decode_png(data[0])[None]\n"
        "whole = answers['serving_default'](images=tf.concat([picture, picture], 0))\n"
        "print(json.dumps([{k: v.numpy().tolist() for k, v in found.items() if k != 'class_names'}, "
        "[c.decode() for c in found['class_names'].numpy()], whole['probabilities'].numpy().tolist()]))\n"
    )
    found, names, whole = json.loads(alone(code, tmp_path).splitlines()[-1])
    want = predict.pictures(predict.open_network(str(ckpt)), files, top=3)
    assert names == list("abc") and found.keys() == {"probabilities", "logits_cls", "logits_dist"}
    for answer, shares in zip(want, found["probabilities"]):
        np.testing.assert_allclose(
            [shares[names.index(name)] for name, _ in answer.classes], [p for _, p in answer.classes], atol=1e-5
        )
    np.testing.assert_allclose(whole, [found["probabilities"][0]] * 2, atol=1e-6)


def test_tf_keras_alone_opens_the_keras_file_with_equal_logits(ckpt, exported, tmp_path):
    out, _ = exported
    images = np.random.default_rng(3).uniform(0, 255, [2, 32, 32, 3]).astype("f4")
    path = str(out / "model.keras")
    found = logits_alone(
        f"import tf_keras; y = tf_keras.models.load_model({path!r}).predict(x, verbose=0)", images, tmp_path
    )
    for name, want in own_logits(ckpt, images).items():
        np.testing.assert_allclose(found[name], want, atol=1e-5 * max(1.0, np.abs(want).max()))


def test_what_was_written_is_told_with_sizes_and_distances(exported):
    out, written = exported
    facts = json.loads((out / "export.json").read_text())
    assert [each.name for each in written] == ["saved_model", "model.keras"]
    assert facts["classes"] == list("abc") and facts["image_size"] == 32 and facts["weights"] == "raw"
    assert (out / "model.keras").stat().st_size == facts["files"][1]["bytes"]
    assert all(0 <= each["difference"] <= 1e-4 * max(1, each["largest"]) for each in facts["files"])
    assert sorted(path.name for path in out.iterdir()) == ["export.json", "model.keras", "saved_model"]


def test_averages_are_exported_when_asked_for(ckpt, tmp_path):
    export.export(ckpt, tmp_path / "out", formats=["keras"], weights="ema")
    images = np.random.default_rng(3).uniform(0, 255, [2, 32, 32, 3]).astype("f4")
    found = export.keras.models.load_model(tmp_path / "out" / "model.keras")(images)
    ema, raw = (own_logits(ckpt, images, weights)["cls"] for weights in ("ema", "raw"))
    np.testing.assert_allclose(found["cls"], ema, atol=1e-4)
    assert np.abs(raw - ema).max() > 1e-2


def test_an_export_that_answers_otherwise_is_refused_and_leaves_nothing(ckpt, tmp_path, monkeypatch):
    portable = export.portable

    def wrong(opened, weights):
        model = portable(opened, weights)
        model.get_layer("head").bias.assign_add([0.0, 0.1, 0.0])
        return model

    monkeypatch.setattr(export, "portable", wrong)
    with pytest.raises(errors.UserError, match=r"model\.keras gives other logits than the checkpoint: 0\.1 apart"):
        export.export(ckpt, tmp_path / "out", formats=["keras"])
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_an_export_that_exists_is_kept_without_force_and_replaced_whole_with_it(ckpt, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("kept")
    done = run(f"--ckpt={ckpt}", f"--out={out}", "--formats=keras")
    assert (done.returncode, (out / "mine").read_text()) == (1, "kept")
    assert done.stderr.strip() == f"error: --out ({out}) exists: --force replaces it, once the new export is whole"
    done = run(f"--ckpt={ckpt}", f"--out={out}", "--formats=keras", "--force")
    assert done.returncode == 0, done.stderr
    assert "model.keras  " in done.stdout and "from the checkpoint's" in done.stdout
    assert sorted(path.name for path in out.iterdir()) == ["export.json", "model.keras"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        (["--ckpt=nowhere", "--out=x"], "nowhere is no run"),
        (["--ckpt=.", "--out=x", "--formats=keras,h5"], "--formats (h5) must be of saved_model, keras, tflite"),
    ],
)
def test_a_bad_flag_is_one_line(flags, why):
    done = run(*flags)
    assert done.returncode == 1 and done.stderr.startswith("error: ") and why in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1 and not os.path.exists(REPOSITORY / "x")


@pytest.mark.slow
def test_a_cnn_is_exported_but_to_tflite_which_is_told_in_one_line(tmp_path):
    where = family.checkpoint(tmp_path / "ckpt", "groupnorm_resnet", crop_ratio=0.0)
    with pytest.raises(errors.UserError, match=r"^--formats \(tflite\): groupnorm_resnet does not convert: "):
        export.export(where, tmp_path / "out", formats=["keras", "tflite"])
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt"]
    export.export(where, tmp_path / "out", formats=["saved_model", "keras"])
    path = str(tmp_path / "out" / "model.keras")
    code = f"import deit.models.cnn, tf_keras; tf_keras.models.load_model({path!r})"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_tflite_files_answer_in_a_process_of_their_own_and_a_quantised_one_is_smaller(tmp_path):
    def digits(config):
        config.data.name, config.data.train_split, config.data.eval_split = "digits", "train", "test"

    classes = [str(i) for i in range(10)]
    where = family.checkpoint(tmp_path / "ckpt", VARIANT, classes=classes, change=digits)
    written = {each.name: each for each in export.export(where, tmp_path / "out", formats=["tflite"])}
    exact, half, eighth = (written[f"model-{kind}.tflite"] for kind in ("float32", "float16", "int8"))
    assert exact.difference <= 1e-4 * max(1.0, exact.largest) < half.difference + 1e-4
    assert exact.bytes > 1.6 * half.bytes and half.bytes > 1.3 * eighth.bytes
    assert half.difference < 0.02 * exact.largest and eighth.difference < 0.2 * exact.largest
    _, report = evaluate.checkpointed(where)
    assert exact.top1 == pytest.approx(report.metrics["eval/top1"], abs=1e-9)
    assert all(each.milliseconds > 0 for each in written.values())
    images = np.random.default_rng(3).integers(0, 256, [3, 32, 32, 3]).astype("f4")
    path = str(tmp_path / "out/model-float32.tflite")
    found = logits_alone(
        f"import tensorflow as tf; y = tf.lite.Interpreter({path!r}).get_signature_runner()(image=x)", images, tmp_path
    )
    for name, want in own_logits(where, images).items():
        np.testing.assert_allclose(found[name], want, atol=1e-4 * max(1.0, np.abs(want).max()))


def test_a_quantised_file_that_loses_more_than_a_point_is_told():
    code = (
        "from pathlib import Path; from deit import export; from tools import export as tool\n"
        "made = [export.Written(f'model-{k}.tflite', 10**6, 0.0, 1.0, t, 5.0) "
        "for k, t in (('float32', 0.7), ('float16', 0.695), ('int8', 0.6), ('none', None))]\n"
        "print('\\n'.join(tool.lines(Path('o'), made)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=100)
    found = done.stdout.splitlines()
    assert found[1].endswith("5.0 ms a picture, top-1 0.6950")
    assert found[2].endswith("top-1 0.6000, LOSES 10.0 POINTS")
    assert found[3].endswith("accuracy not measured: the data is absent")


def test_a_file_that_is_no_picture_is_an_error_of_the_request(exported):
    answers = export.tf.saved_model.load(str(exported[0] / "saved_model")).signatures
    content = io.BytesIO()
    Image.new("RGB", (8, 8)).save(content, "PNG")
    with pytest.raises(export.tf.errors.InvalidArgumentError):
        answers["encoded"](encoded=export.tf.constant([content.getvalue(), b"no picture"]))
