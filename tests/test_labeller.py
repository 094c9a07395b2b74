"""The teacher of a run at work: what the cache has is not computed, what it lacks is, and the bits are the same."""

import errno
import hashlib
import json
import os
import shutil
import types
from pathlib import Path

import devices
import numpy as np
import pytest
import tensorflow as tf

from configs import base
from deit import checkpoint, errors, feed, job, loop, rules, teachers
from deit.teachers import cache, fingerprint, labeller, report

BATCH, UPDATES = 16, 3
EVERYTHING = {
    "augment.crop": "random_resized",
    "augment.erasing": 0.25,
    "augment.mixup": 0.8,
    "augment.cutmix": 1.0,
    "augment.mix_group": 8,
    "augment.repeats": 3,
}


class Linear(tf.Module):
    """A teacher that looks at the mean colours of 64 squares: mixing, crops and erased boxes change its answers."""

    def __init__(self, classes=10):
        super().__init__()
        kernel = np.random.default_rng(0).normal(size=[4 * 4 * 3, classes]) / 20
        self.kernel = tf.Variable(kernel, dtype=tf.float32)

    @tf.function(input_signature=[tf.TensorSpec([None, 32, 32, 3], tf.float32, name="image")])
    def serve(self, image):
        squares = tf.nn.avg_pool2d(image - 127.0, 8, 8, "VALID")
        return {"logits": tf.reshape(squares, [-1, 4 * 4 * 3]) @ self.kernel}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    directory = tmp_path_factory.mktemp("teacher") / "linear"
    module = Linear()
    tf.saved_model.save(module, str(directory), signatures={"serving_default": module.serve})
    return directory


def make_config(teacher, **changes):
    c = base.get_config()
    c.model.variant = "deit_micro_distilled_patch8_32"
    c.data.name, c.data.train_split, c.data.eval_split = "digits", "train", "test"
    c.data.image_size, c.global_batch, c.micro_batch, c.total_updates = 32, BATCH, 8, UPDATES
    c.augment.resize_margin, c.eval.every_updates, c.eval.batch = 4, 0, 225
    c.distill.kind, c.teacher.kind, c.teacher.path, c.teacher.batch = "hard", "saved_model", str(teacher), 6
    c.update_from_flattened_dict({**EVERYTHING, **changes})
    rules.validate(c)
    return c


def opened(config, *, replicas=1, keeps_on=True):
    """Return (resolved configuration, strategy, source, labeller)."""
    strategy = devices.two_cpus() if replicas == 2 else devices.one_device()
    resolved, train_source, eval_source = job.open_data(config, replicas=replicas)
    found = labeller.open_labeller(
        resolved, strategy, workdir=".", train_source=train_source, eval_source=eval_source, keeps_on=keeps_on
    )
    return resolved, strategy, train_source, found


def answers(config, updates=range(UPDATES), **settings):
    """Return (what is told of each update, as NumPy arrays; the labeller)."""
    resolved, strategy, source, found = opened(config, **settings)
    batches = iter(feed.batches(resolved, strategy, source, start_update=updates[0]))
    told = []
    for update in updates:
        given = found(next(batches), update)
        told.append({name: feed.local(strategy, value) for name, value in given.items()})
    return told, found


def assert_same(ours, theirs):
    assert [a.keys() for a in ours] == [b.keys() for b in theirs]
    assert all(a[name].tobytes() == b[name].tobytes() for a, b in zip(ours, theirs, strict=True) for name in a)


KINDS = {
    "hard": {},
    "soft": {"distill.kind": "soft"},
    "soft, three largest": {"distill.kind": "soft", "teacher.top_k": 3, "teacher.logits_dtype": "float16"},
}


@pytest.mark.parametrize("replicas", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", KINDS)
def test_cached_answers_are_those_of_the_teacher_bit_by_bit_and_it_is_not_built_for_them(
    teacher, tmp_path, monkeypatch, kind, replicas
):
    online, _ = answers(make_config(teacher, **KINDS[kind]), replicas=replicas)
    if kind == "hard":
        assert len(np.unique([told["class"] for told in online])) > 3
    cached = {"teacher.cache": "readwrite", "teacher.cache_dir": str(tmp_path / "c")}
    written, first = answers(make_config(teacher, **KINDS[kind], **cached), replicas=replicas)
    assert (first.computed, first.from_cache) == (UPDATES, 0)
    monkeypatch.setattr(teachers, "build", None)
    read, second = answers(make_config(teacher, **KINDS[kind], **cached, **{"model.seed": 5}), replicas=replicas)
    assert (second.computed, second.from_cache) == (0, UPDATES)
    assert_same(online, written)
    assert_same(online, read)


@pytest.fixture(scope="module")
def full(teacher, tmp_path_factory):
    """A configuration whose cache holds all updates, and the answers; not to be written to."""
    directory = tmp_path_factory.mktemp("full") / "c"
    config = make_config(teacher, **{"teacher.cache": "readwrite", "teacher.cache_dir": str(directory)})
    told, _ = answers(config)
    return config, told


@pytest.fixture
def filled(full, tmp_path):
    """The same with a copy of the cache."""
    config, told = full
    directory = shutil.copytree(config.teacher.cache_dir, tmp_path / "c")
    return changed(config, **{"teacher.cache_dir": str(directory)}), told


def changed(config, **changes):
    copy = config.copy_and_resolve_references()
    copy.update_from_flattened_dict(changes)
    return copy


def the_file(config):
    (path,) = Path(config.teacher.cache_dir).rglob("*.npy")
    return path


@pytest.mark.parametrize("mode, mended", [("read", False), ("readwrite", True)])
def test_a_damaged_chunk_is_computed_anew_and_written_only_where_writing_is_on(filled, mode, mended):
    config, expected = filled
    data = bytearray(the_file(config).read_bytes())
    data[-31 * (BATCH + 2 + 16) - 5] ^= 255  # in the first of 32 chunks
    the_file(config).write_bytes(data)
    told, found = answers(changed(config, **{"teacher.cache": mode}))
    assert_same(told, expected)
    assert (found.computed, found.from_cache) == (1, UPDATES - 1)
    again, later = answers(changed(config, **{"teacher.cache": mode}))
    assert_same(again, expected)
    assert later.computed == (0 if mended else 1)


def test_write_computes_everything_even_what_is_there(filled):
    config, expected = filled
    told, found = answers(changed(config, **{"teacher.cache": "write"}))
    assert_same(told, expected)
    assert (found.computed, found.from_cache) == (UPDATES, 0)


@pytest.mark.parametrize(
    "changes, field",
    [
        ({"seed": 1}, "seed: 0 -> 1"),
        ({"augment.erasing": 0.5}, "augment.erasing: 0.25 -> 0.5"),
        ({"augment.mix_group": 16}, "augment.mix_group: 8 -> 16"),
        ({"augment.repeats": 1}, "augment.repeats: 3 -> 1"),
        ({"data.train_split": "train[:50%]"}, "data: "),
        ({"data.image_size": 40}, "data.image_size: 32 -> 40"),
        ({"model.mean": (0.5, 0.5, 0.5)}, "model.mean: "),
        ({"distill.kind": "soft"}, "distill.kind: hard -> soft"),
        ({"teacher.range": (0.0, 1.0)}, "teacher.range: [0, 255] -> [0, 1]"),
    ],
)
def test_a_run_that_would_show_its_teacher_another_picture_or_ask_otherwise_is_refused(full, changes, field):
    with pytest.raises(errors.UserError) as caught:
        opened(changed(full[0], **changes))
    assert field in str(caught.value) and "another stream or teacher" in str(caught.value)


def test_another_teacher_is_refused(full, teacher, tmp_path):
    other = shutil.copytree(teacher, tmp_path / "other")
    (other / "assets" / "note.txt").write_text("x")
    with pytest.raises(errors.UserError, match=r"teacher: \w+"):
        opened(changed(full[0], **{"teacher.path": str(other)}))


def test_a_teacher_that_changed_after_the_start_answers_nothing(filled, teacher, tmp_path):
    moving = Path(shutil.copytree(teacher, tmp_path / "moving"))
    config = changed(filled[0], **{"teacher.path": str(moving), "teacher.cache_dir": str(tmp_path / "new")})
    resolved, strategy, source, found = opened(config)
    (moving / "assets" / "note.txt").write_text("trained on")
    with pytest.raises(errors.UserError, match=r"has changed since this run began"):
        found(next(iter(feed.batches(resolved, strategy, source, start_update=0))), 0)
    assert not list((tmp_path / "new").rglob("*.npy"))


def test_class_names_that_are_not_the_data_s_are_refused_though_all_is_cached(full, tmp_path):
    names = tmp_path / "names.txt"
    names.write_text("\n".join("9876543210"))
    with pytest.raises(errors.UserError, match=r"class 0 of the teacher .* is '9', it must be the data's '0'"):
        opened(changed(full[0], **{"teacher.class_names": str(names)}))


def test_an_absent_teacher_whose_answers_are_all_there_is_not_missed(teacher, tmp_path, caplog):
    archive = Path(shutil.make_archive(str(tmp_path / "t"), "zip", teacher.parent, teacher.name))
    pin = hashlib.sha256(archive.read_bytes()).hexdigest()
    config = make_config(
        archive, **{"teacher.sha256": pin, "teacher.cache": "readwrite", "teacher.cache_dir": str(tmp_path / "c")}
    )
    expected, _ = answers(config)
    archive.unlink()
    told, found = answers(changed(config, **{"teacher.cache": "read"}))
    assert_same(told, expected)
    assert found.computed == 0
    tied = {"teacher.cache": "read", "teacher.batch": 4, "teacher.allow_ties": True}
    assert_same(answers(changed(config, **tied))[0], expected)
    assert "is not measured" in caplog.text
    with pytest.raises(errors.UserError, match=r"is not there, and .* has the answers to 3 of 9 updates"):
        opened(changed(config, **{"total_updates": 9}))


def test_without_a_cache_the_teacher_is_there_and_described_from_the_start(full, monkeypatch):
    _, _, _, found = opened(changed(full[0], **{"teacher.cache": "off", "teacher.cache_dir": ""}))
    monkeypatch.setattr(teachers, "build", None)
    assert "32 px" in found.describe() and found.cache is None
    assert found.flops() == 2 * (4 * 4 * 3) * 10  # the matrix, once
    assert found.measure(_evaluation(full[0]), tuple("0123456789")).metrics["teacher/images"] == 450


def test_the_machine_and_its_software_are_conditions(full):
    resolved, strategy, _, found = opened(full[0])
    (path,) = Path(found.cache.directory).glob("*/conditions.json")
    conditions = json.loads(path.read_text())
    assert f"{len(os.sched_getaffinity(0))} cores" in conditions["device"]
    assert f"tensorflow {tf.__version__}" in conditions["software"] and "pillow" in conditions["software"]
    assert (conditions["global_batch"], conditions["replicas"], conditions["teacher.batch"]) == (BATCH, 1, 6)


def test_a_cache_directory_that_is_not_used_is_warned_of(full, caplog):
    opened(changed(full[0], **{"teacher.cache": "off"}))
    assert "is not used: teacher.cache is 'off'" in caplog.text


def test_what_only_changes_the_student_reads_the_same_cache(full, monkeypatch):
    config, expected = full
    monkeypatch.setattr(teachers, "build", None)
    student = {
        "model.variant": "deit_micro_patch4_32", "model.seed": 3, "model.drop_path": 0.3, "optim.peak_lr": 1.0,
        "loss.kind": "bce", "distill.alpha": 0.9, "micro_batch": 4, "total_updates": 30, "checkpoint.keep": 1,
    }  # fmt: skip
    assert_same(answers(changed(config, **student))[0], expected)


def test_answers_of_pictures_that_were_unreadable_then_are_computed_anew(filled, monkeypatch):
    config, expected = filled
    read = cache.Cache.read

    def doubtful(self, first, count):
        found = read(self, first, count)
        found.readable[3] = first != BATCH
        return found

    monkeypatch.setattr(cache.Cache, "read", doubtful)
    told, found = answers(changed(config, **{"teacher.cache": "read"}))
    assert_same(told, expected)
    assert (found.computed, found.from_cache) == (1, UPDATES - 1)


def test_a_disk_that_fills_up_ends_the_writing_and_not_the_training(full, tmp_path, monkeypatch, caplog):
    config = changed(full[0], **{"teacher.cache_dir": str(tmp_path / "full")})
    pwrite, calls = os.pwrite, []

    def filling(*arguments):
        calls.append(1)
        if len(calls) > 2:  # a header and a chunk
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return pwrite(*arguments)

    monkeypatch.setattr(os, "pwrite", filling)
    told, found = answers(config)
    assert_same(told, full[1])
    assert found.computed == UPDATES
    (line,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "full) can't be written: No space left on device; training goes on" in line
    with pytest.raises(errors.UserError, match=r"can't be written: No space left on device$"):
        answers(changed(config, **{"teacher.cache_dir": str(tmp_path / "more")}), keeps_on=False)


def test_tf32_is_a_condition_whatever_the_teacher_s_own_precision():
    def precision(**changes):
        config = types.SimpleNamespace(
            global_batch=8, precision=changes.get("precision", "float32"),
            resolved=types.SimpleNamespace(replicas=1),
            teacher=types.SimpleNamespace(batch=8, kind=changes["kind"], precision=changes.get("own", "")),
        )  # fmt: skip
        return fingerprint.conditions(config, device="x")["teacher.precision"]

    assert precision(kind="run") == "float32"
    assert precision(kind="run", precision="mixed_bfloat16") == "mixed_bfloat16"
    assert precision(kind="run", precision="mixed_bfloat16", own="float32") == "float32"
    assert precision(kind="run", precision="tf32", own="mixed_float16") == "mixed_float16, tf32"
    assert precision(kind="saved_model", precision="mixed_bfloat16") == "as saved"
    assert precision(kind="saved_model", own="float32") == "as saved"
    assert precision(kind="saved_model", own="mixed_bfloat16", precision="tf32") == "mixed_bfloat16, tf32"


def test_other_conditions_are_refused_and_with_allow_ties_their_agreement_is_measured(filled):
    config, expected = filled
    with pytest.raises(errors.UserError, match=r"\(teacher.batch: 6 -> 4\).*teacher.allow_ties=True"):
        opened(changed(config, **{"teacher.batch": 4}))
    told, found = answers(changed(config, **{"teacher.batch": 4, "teacher.allow_ties": True}))
    assert_same(told, expected)
    assert found.news() == {"teacher/cache_agreement": 1.0} and found.news() == {}


def test_a_report_on_images_of_which_one_could_not_be_read_is_not_kept(filled):
    config, _ = filled
    resolved, _, _, found = opened(config)
    batch = next(iter(_evaluation(config)))
    found.measure([batch], resolved.resolved.classes)  # half of the split
    assert not list(Path(config.teacher.cache_dir).rglob("report.npz"))


def test_the_report_is_measured_once(filled, monkeypatch):
    config, _ = filled
    resolved, _, _, found = opened(config)
    eval_batches = _evaluation(config)
    measured = found.measure(eval_batches, resolved.resolved.classes)
    monkeypatch.setattr(report, "measure", None)
    again = opened(config)[3].measure(eval_batches, resolved.resolved.classes)
    assert again.metrics == measured.metrics
    np.testing.assert_array_equal(again.labels, measured.labels)


def train(workdir, config):
    """Train in this process; return state_sha256 of the last checkpoint."""
    workdir.mkdir()
    run = job.prepare(config, workdir, replicas=1)
    loop.train(run, strategy=devices.one_device())
    return checkpoint.manifest(checkpoint.newest(workdir, set_aside=False))["state_sha256"]


@pytest.mark.slow
def test_a_run_ends_with_the_same_bits_online_and_cached(filled, tmp_path, monkeypatch):
    config, _ = filled
    online = train(tmp_path / "online", changed(config, **{"teacher.cache": "off", "teacher.cache_dir": ""}))
    opened(config)[3].measure(_evaluation(config), tuple("0123456789"))
    monkeypatch.setattr(teachers, "build", None)
    assert train(tmp_path / "cached", changed(config, **{"teacher.cache": "read"})) == online
    lines = [
        [json.loads(line) for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()]
        for run in ("online", "cached")
    ]
    clock = ("perf/images_per_sec", "eval/images_per_sec")
    plain = [[{k: v for k, v in line.items() if k not in clock} for line in run] for run in lines]
    assert plain[0] == plain[1]
    assert {"teacher/top1", "teacher/ece", "teacher/recall/3"} <= plain[0][0].keys()


@pytest.mark.slow
def test_twenty_updates_on_real_flowers_end_with_the_same_bits_online_and_cached(teacher, tmp_path, flowers_dir):
    flowers = {
        "data.name": "tfds:tf_flowers", "data.data_dir": str(flowers_dir), "data.train_split": "train[:90%]",
        "data.eval_split": "train[90%:]", "total_updates": 20, "global_batch": 32, "augment.mix_group": 16,
        "augment.randaugment": "rand-m9-mstd0.5-inc1", "teacher.batch": 12, "checkpoint.every_updates": 0,
    }  # fmt: skip
    module = Linear(classes=5)
    tf.saved_model.save(module, str(tmp_path / "m"), signatures={"serving_default": module.serve})
    config = make_config(tmp_path / "m", **flowers)
    online = train(tmp_path / "online", config)
    cached = {"teacher.cache": "readwrite", "teacher.cache_dir": str(tmp_path / "c")}
    answers(changed(config, **cached), range(20))
    assert train(tmp_path / "cached", changed(config, **{**cached, "teacher.cache": "read"})) == online


def _evaluation(config):
    from deit.data import stream

    resolved, _, eval_source = job.open_data(config, replicas=1)
    return stream.evaluation(eval_source, resolved, batch=resolved.eval.batch)
