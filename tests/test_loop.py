"""The loop's parts and the loop itself, in this process: slices of replicas, guards, what a run shows."""

import functools
import json
import logging
import types

import devices
import numpy as np
import pytest
import tensorflow as tf
from tensorboard.backend.event_processing import event_accumulator

from configs import base
from deit import checkpoint, errors, feed, job, loop, recorder, rules, summaries
from deit import config as configuration
from deit.data import mixing, sources, stream

BATCH, TRAIN_SIZE = 32, 1347  # three quarters of the 1797 digits


def make_config(**changes):
    c = base.get_config()
    c.model.variant, c.model.drop_path = "deit_micro_patch8_32", 0.2
    c.data.name, c.data.train_split, c.data.eval_split, c.data.image_size = "digits", "train", "test", 32
    c.augment.resize_margin, c.global_batch, c.micro_batch, c.total_updates = 4, BATCH, 8, 2
    c.eval.batch = 150  # a third of the 450 that are held out
    c.update_from_flattened_dict(changes)
    rules.validate(c)
    return c


def collect(strategy, *, start, count, **changes):
    """Return the first batches of the distributed stream, each as a list of its replicas' parts in NumPy."""
    config = make_config(**changes)
    source = sources.open_source(config.data, "train")
    resolved = configuration.resolve(
        config,
        train_size=len(source),
        eval_size=450,
        classes=source.classes,
        replicas=strategy.num_replicas_in_sync,
    )
    network = types.SimpleNamespace(drop_rates=(0.0, 0.3))
    iterator = iter(feed.batches(resolved, strategy, source, start_update=start, drop_rates=network.drop_rates))
    batches = []
    for _ in range(count):
        parts = {name: strategy.experimental_local_results(value) for name, value in next(iterator).items()}
        batches.append([{name: parts[name][r].numpy() for name in parts} for r in range(strategy.num_replicas_in_sync)])
    return batches


EVERYTHING = {
    "augment.crop": "random_resized",
    "augment.randaugment": "rand-m9-mstd0.5-inc1",
    "augment.erasing": 0.25,
    "augment.mixup": 0.8,
    "augment.cutmix": 1.0,
    "augment.mix_group": 8,  # two groups a replica
    "augment.repeats": 3,
}


@functools.cache
def collected(everything):
    """Return updates 3 to 5, with every augmentation on or none but crop and flip: one device's, two replicas'."""
    changes = EVERYTHING if everything else {}
    return [collect(strategy, start=3, count=3, **changes) for strategy in (devices.one_device(), devices.two_cpus())]


@pytest.mark.parametrize("everything", [False, True], ids=["crop and flip", "every augmentation on"])
def test_each_replica_gets_its_contiguous_slice_of_every_batch(everything):
    names = {"image", "label", "weight", "position", "drop"}
    names |= {"mix_lambda", "mix_partner", "mix_box"} if everything else set()
    for k, ([batch], replicas) in enumerate(zip(*collected(everything), strict=True)):
        first = (3 + k) * BATCH
        np.testing.assert_array_equal(batch["position"], np.arange(first, first + BATCH))
        for r, part in enumerate(replicas):
            np.testing.assert_array_equal(part["position"], first + r * BATCH // 2 + np.arange(BATCH // 2))
            assert part.keys() == batch.keys() == names
        for name in names:
            np.testing.assert_array_equal(np.concatenate([part[name] for part in replicas]), batch[name], name)


def test_replicas_mix_their_slices_into_the_pictures_and_labels_of_one_device():
    for [batch], replicas in zip(*collected(True), strict=True):
        pictures, targets = mixed(batch, BATCH)
        assert (pictures != batch["image"]).any((1, 2, 3)).sum() >= BATCH / 2, "most groups are mixed"
        parts = [mixed(part, 4) for part in replicas]
        np.testing.assert_array_equal(np.concatenate([part for part, _ in parts]), pictures)
        np.testing.assert_array_equal(np.concatenate([part for _, part in parts]), targets)


def mixed(batch, micro):
    """Return a replica's pictures and labels as its step sees them, in micro-batches."""
    tensors = {name: tf.constant(value) for name, value in batch.items()}
    starts = range(0, len(batch["label"]), micro)
    pictures = [mixing.images(tensors, start, micro) for start in starts]
    return np.concatenate(pictures), np.concatenate([mixing.targets(tensors, start, micro, 10) for start in starts])


@pytest.mark.parametrize(
    ("step", "every", "due"),
    [
        (1, 1, True),
        (1, 2, False),
        (4, 2, True),
        (5, 2, False),
        (9, 0, False),
        (10, 0, True),  # the last one, whatever the interval
        (10, 3, True),
        (10, 50, True),
    ],
)
def test_something_is_due_at_its_interval_and_at_the_end(step, every, due):
    assert recorder.due_at(step, 10)(every) is due


def train(config, workdir, strategy):
    workdir.mkdir()
    return loop.train(job.prepare(config, workdir, replicas=strategy.num_replicas_in_sync), strategy=strategy)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The same two updates under both strategies: name -> (workdir, result)."""
    root = tmp_path_factory.mktemp("runs")
    return {
        name: (root / name, train(make_config(), root / name, strategy()))
        for name, strategy in (("one_device", devices.one_device), ("two_cpus", devices.two_cpus))
    }


def lines_of(workdir):
    return summaries.read_metrics(workdir / "metrics.jsonl")


def test_two_replicas_log_the_losses_of_one_device(finished):
    one, two = (lines_of(workdir) for workdir, _ in finished.values())
    assert [line["step"] for line in one] == [line["step"] for line in two] == [1, 2]
    assert one[0]["train/loss"] != one[1]["train/loss"]
    for name in ("train/loss", "train/loss_cls", "optim/lr"):
        np.testing.assert_allclose([line[name] for line in two], [line[name] for line in one], rtol=1e-5)


def test_the_result_of_a_run_is_its_last_logged_evaluation(finished):
    for workdir, result in finished.values():
        last = lines_of(workdir)[-1]
        assert result.step == 2
        assert "eval/top1" in result.metrics and result.metrics["eval/images"] == 450
        assert result.metrics == {name: last[name] for name in result.metrics}


@pytest.mark.parametrize("name", ["one_device", "two_cpus"])
def test_the_event_file_shows_curves_pictures_and_the_configuration(finished, name):
    workdir, _ = finished[name]
    events = event_accumulator.EventAccumulator(str(workdir), size_guidance={"scalars": 0, "images": 0, "tensors": 0})
    events.Reload()
    curve = {event.step: event.value for event in events.Scalars("train/loss")}
    assert curve == {line["step"]: np.float32(line["train/loss"]) for line in lines_of(workdir)}
    assert [event.step for event in events.Images("train/views")] == [0]
    assert [event.step for event in events.Images("eval/confusion")] == [2]
    for tag in ("train/views", "eval/confusion"):
        picture = tf.io.decode_png(events.Images(tag)[0].encoded_image_string).numpy()
        assert min(picture.shape[:2]) > 64 and picture.std() > 1, tag
    (text,) = events.Tensors("config")
    shown = text.tensor_proto.string_val[0].decode().removeprefix("```json\n").removesuffix("\n```")
    assert json.loads(shown) == json.loads((workdir / "config.json").read_text())


def test_a_teacher_below_its_least_accuracy_leaves_no_trace_of_the_run(finished, tmp_path):
    teacher, result = finished["one_device"]
    assert result.metrics["eval/top1"] < 1
    config = make_config(
        **{
            "model.variant": "deit_micro_distilled_patch8_32",
            "distill.kind": "hard",
            "teacher.kind": "run",
            "teacher.path": str(teacher),
            "teacher.min_accuracy": 1.0,
        }
    )
    with pytest.raises(errors.UserError, match=r"teacher\.min_accuracy \(1\).*of 450 images"):
        train(config, tmp_path / "student", devices.one_device())
    assert list((tmp_path / "student").iterdir()) == []


@pytest.mark.slow
def test_unreadable_pictures_are_named_once_counted_and_too_many_end_the_run(tmp_path, caplog):
    flowers = tmp_path / "pictures"
    rng = np.random.RandomState(0)
    for split, count in (("train", 10), ("val", 4)):
        for name in ("daisy", "rose"):
            (flowers / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.randint(0, 256, [40, 40, 3]).astype(np.uint8)
                tf.io.write_file(str(flowers / split / name / f"{i}.png"), tf.io.encode_png(pixels))
    for bad in ("train/daisy/3.png", "train/rose/7.png", "val/rose/1.png"):
        (flowers / bad).write_bytes(b"this is no picture")
    fields = {
        "data.name": f"folder:{flowers}",
        "data.train_split": "train",
        "data.eval_split": "val",
        "global_batch": 20,
        "micro_batch": 20,
        "total_updates": 3,  # three epochs
        "eval.every_updates": 0,
    }
    with caplog.at_level(logging.WARNING):
        train(make_config(**fields, **{"data.max_bad_fraction": 0.1}), tmp_path / "enough", devices.one_device())
    assert [line["data/bad_images"] for line in lines_of(tmp_path / "enough")] == [2, 4, 6]
    named = [record.getMessage() for record in caplog.records if "can't be read" in record.getMessage()]
    assert sorted(line.split()[1] for line in named) == ["train/daisy/3.png", "train/rose/7.png"]
    assert "7 of 8 images were read and evaluated, not: val/rose/1.png" in caplog.text
    assert lines_of(tmp_path / "enough")[-1]["eval/images"] == 7
    with pytest.raises(
        errors.UserError, match=r"data\.max_bad_fraction \(0\.09\) .* by update 1, there were 2"
    ) as caught:
        train(make_config(**fields, **{"data.max_bad_fraction": 0.09}), tmp_path / "less", devices.one_device())
    assert "train/daisy/3.png" in str(caught.value) and "train/rose/7.png" in str(caught.value)


def test_a_run_begun_with_other_draws_is_not_continued():
    now = {"stream": "2", "teacher": "", "deit": "0.2.0"}
    job.check_versions(now, now, "runs/a")
    with pytest.raises(errors.UserError, match=r"runs/a was begun with other random draws .* deit 0\.1\.0"):
        job.check_versions({"teacher": "", "deit": "0.1.0"}, now, "runs/a")


def test_every_checkpoint_says_of_which_stream_it_is(finished):
    for workdir, _ in finished.values():
        written = checkpoint.manifest(checkpoint.newest(workdir, set_aside=False))["versions"]
        assert written["stream"] == str(stream.VERSION)
