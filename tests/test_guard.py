"""What a skipped update says and writes: which examples it was, on one device and on two replicas."""

import json
import logging
import math
import os
import socket
import subprocess
import sys
import types
from pathlib import Path

import devices
import numpy as np
import pytest
import tensorflow as tf

from configs import base
from deit import config as configuration
from deit import guard, losses, train_step
from deit.data import sources, stream
from deit.models import factory

BATCH, TRAIN_SIZE = 32, 1347  # three quarters of the 1797 digits
STEP = 50  # its positions, 1568 to 1599, are of the second epoch
FIRST = (STEP - 1) * BATCH


def make_config(*, replicas=1, **changes):
    c = base.get_config()
    c.model.variant, c.model.drop_path, c.seed, c.model.seed = "deit_micro_patch8_32", 0.2, 3, 4
    c.data.name, c.data.train_split, c.data.eval_split, c.data.image_size = "digits", "train", "test", 32
    c.augment.resize_margin, c.augment.mix_group, c.global_batch, c.micro_batch = 4, 8, BATCH, 8 // replicas
    c.total_updates, c.max_skipped = 100, 3
    c.update_from_flattened_dict(changes)
    classes = tuple("0123456789")
    return configuration.resolve(c, train_size=TRAIN_SIZE, eval_size=450, classes=classes, replicas=replicas)


MIXED = {"augment.mixup": 0.8}
SOFT = {"distill.kind": "soft", "teacher.kind": "run", "teacher.path": "unused"}
HARD = SOFT | {"distill.kind": "hard"}
LAYOUTS = {"one device": 1, "two replicas": 2}


def metrics(**values):
    """Return what an update returns."""
    usual = dict.fromkeys(train_step.METRICS, 0.5) | {"finite": 0.0, "data/weight": 32.0, "skipped_in_row": 1.0}
    return np.array([{**usual, **values}[name] for name in train_step.METRICS], np.float32)


OF_TEACHER = {"train/loss": math.nan, "train/loss_cls": 1.0}  # what the update of a teacher without an answer says


class Run:
    """A state, its update and the batches of the stream on one device or two logical CPUs."""

    def __init__(self, replicas, changes, strategy=None):
        self.config = config = make_config(replicas=replicas, **changes)
        self.source = sources.open_source(config.data, "train")
        self.strategy = strategy or (devices.two_cpus() if replicas == 2 else devices.one_device())
        with self.strategy.scope():
            network = factory.build(config.model, num_classes=10, image_size=32, precision=config.precision)
            self.state = train_step.create_state(config, network)
        self.step = train_step.make(config, self.strategy, self.state)
        self.initial = train_step.snapshot(self.state)

    def back(self):
        train_step.restore(self.state, self.initial)
        self.state.step.assign(STEP - 1)
        return self

    def guard(self, workdir):
        return guard.Guard(self.config, self.source, self.strategy, self.state, workdir)

    def batch(self):
        """Return the batch of update STEP as the stream makes it."""
        batches = stream.training(
            self.source,
            self.config,
            start_update=STEP - 1,
            slice_start=0,
            slice_size=BATCH,
            drop_rates=self.state.network.drop_rates,
        )
        return {name: value.copy() for name, value in next(batches.as_numpy_iterator()).items()}

    def skip(self, watch, batch, answers=None, step=STEP):
        """Update on a batch that is skipped, have the guard look at it, return what the update returned."""
        batch = devices.spread(self.strategy, batch)
        answers = None if answers is None else devices.spread(self.strategy, answers)
        vector = self.step(batch, answers).numpy()
        watch(vector, step, batch, answers, 0.25)
        return dict(zip(train_step.METRICS, vector.tolist()))

    def look(self, watch, batch, answers=None, **values):
        """Have the guard look at a batch as if an update had returned `values`: half of the tracing."""
        answers = None if answers is None else devices.spread(self.strategy, answers)
        watch(metrics(**values), STEP, devices.spread(self.strategy, batch), answers, 0.25)


@pytest.fixture(scope="module")
def run_of():
    """Return `run_of(replicas, **changes)`: one Run a configuration, traced once, back at update STEP at each call."""
    made = {}

    def get(replicas=1, **changes):
        key = (replicas, *sorted(changes.items()))
        if key not in made:
            made[key] = Run(replicas, changes)
        return made[key].back()

    return get


def read(workdir, step=STEP):
    return json.loads((workdir / "skipped" / f"update-{step:08d}.json").read_text())


def poisoned(batch, row, value=np.nan):
    """Make the student's answer to one row not finite: its residual branches are scaled by `value`."""
    batch["drop"][row] = value
    return batch


def entry(run, batch, row, **values):
    """Return what the file must say of a row of update STEP's batch."""
    index = stream.indices_at(run.source, run.config, [FIRST + row])[0]
    usual = {
        "position": FIRST + row,
        "epoch": 1,
        "image": run.source.name(int(index)),
        "label": int(batch["label"][row]),
        "loss": None,
        "not_finite": "its loss",
    }
    return usual | values


@pytest.mark.parametrize("replicas", [1, pytest.param(2, marks=pytest.mark.slow)], ids=LAYOUTS)
@pytest.mark.parametrize("value", [np.nan, pytest.param(np.inf, marks=pytest.mark.slow)], ids=["nan", "inf"])
def test_the_one_example_whose_loss_is_not_finite_is_named_wherever_it_is(run_of, tmp_path, caplog, replicas, value):
    run = run_of(replicas)
    row = BATCH - 3  # of the last replica only
    batch = poisoned(run.batch(), row, value)
    before = train_step.snapshot(run.state)
    with caplog.at_level(logging.WARNING):
        named = run.skip(run.guard(tmp_path), batch)
    assert named["finite"] == 0 and named["skipped_in_row"] == 1
    after = train_step.snapshot(run.state)
    changed = {name for name in before if before[name].tobytes() != after[name].tobytes()}
    assert changed == {"step", "skipped", "skipped_in_row"}
    record = read(tmp_path)
    expected = entry(run, batch, row)
    assert record.pop("offending") == [expected]
    assert record == {
        "update": STEP,
        "why": "non-finite gradients",
        "learning_rate": 0.25,
        "precision": "float32",
        "global_batch": BATCH,
        "first_position": 1568,
        "last_position": 1599,
        "seed": 3,
        "model.seed": 4,
        "offending_count": 1,
    }
    warned = [each.getMessage() for each in caplog.records]
    assert warned == [
        "update 50 skipped: non-finite gradients (positions 1568 to 1599)",
        f"update 50: of position 1597 ({expected['image']}) its loss is not finite",
    ]


@pytest.mark.parametrize("replicas", LAYOUTS.values(), ids=LAYOUTS)
def test_of_a_mixed_example_its_partner_is_named_as_such(run_of, tmp_path, replicas):
    run = run_of(replicas, **MIXED)
    row = 18
    partner = 16 + 7 - 2  # its group of 8 reversed
    batch = poisoned(run.batch(), row)
    assert 0 < batch["mix_lambda"][row] < 1
    run.look(run.guard(tmp_path), batch)
    other = entry(run, batch, partner)
    mixed = {name: other[name] for name in ("position", "image", "label")}
    mixed["lambda"] = pytest.approx(float(batch["mix_lambda"][row]))
    assert read(tmp_path)["offending"] == [entry(run, batch, row, mixed_with=mixed)]


def test_a_teachers_logits_that_are_not_finite_are_told_from_the_students(run_of, tmp_path, caplog):
    run = run_of(**SOFT)
    logits = np.random.default_rng(0).normal(size=[BATCH, 10]).astype(np.float32)
    logits[5, 7] = np.nan
    batch = run.batch()
    with caplog.at_level(logging.WARNING):
        run.skip(run.guard(tmp_path), batch, {"logits": logits})
    record = read(tmp_path)
    assert record["why"] == "the teacher's answers are not finite"
    assert record["offending"] == [entry(run, batch, 5, not_finite="its teacher's answer")]
    assert "the teacher's answers are not finite" in caplog.text


def test_what_is_the_students_fault_in_the_distillation_term_is_not_put_down_to_the_teacher(run_of, tmp_path):
    run = run_of(**SOFT)
    batch = poisoned(run.batch(), 5)
    run.look(run.guard(tmp_path), batch, {"logits": np.zeros([BATCH, 10], np.float32)}, **OF_TEACHER)
    assert read(tmp_path)["why"] == "non-finite gradients"
    assert read(tmp_path)["offending"] == [entry(run, batch, 5)]


@pytest.mark.parametrize("replicas", LAYOUTS.values(), ids=LAYOUTS)
def test_a_class_that_the_teacher_could_not_give_is_found_and_the_loss_beside_it_is_finite(run_of, tmp_path, replicas):
    run = run_of(replicas, **HARD)
    classes = np.arange(BATCH, dtype=np.int32) % 10
    classes[[4, 30]] = -1
    batch = run.batch()
    run.look(run.guard(tmp_path), batch, {"class": classes}, **OF_TEACHER)
    record = read(tmp_path)
    assert record["why"] == "the teacher's answers are not finite"
    assert [each["position"] - FIRST for each in record["offending"]] == [4, 30]
    assert {each["not_finite"] for each in record["offending"]} == {"its teacher's answer"}
    assert all(0 < each["loss"] < 10 for each in record["offending"])


@pytest.mark.slow
def test_where_only_a_gradient_is_not_finite_the_examples_of_its_micro_batch_are_named(tmp_path, monkeypatch):
    whole = losses.objective

    def with_a_cusp(outputs, labels, teacher, **configs):
        total, *parts = whole(outputs, labels, teacher, **configs)
        flat = tf.where(labels == wanted, 0.0, 1.0)
        # 0 everywhere; its slope is 0.5, and at the digit `wanted` infinity.
        logit = outputs["cls"][:, 0]
        return total + tf.sqrt(logit - tf.stop_gradient(logit) + flat) - flat, *parts

    run = Run(1, {}).back()  # of its own, because the objective is traced into it
    batch = run.batch()
    holds = {digit: (batch["label"].reshape(4, 8) == digit).any(1) for digit in range(10)}  # [micro-batches]
    wanted = next(digit for digit in range(10) if 0 < holds[digit].sum() < 4)
    monkeypatch.setattr(losses, "objective", with_a_cusp)
    named = run.skip(run.guard(tmp_path), batch)
    assert named["finite"] == 0 and math.isfinite(named["train/loss"])
    offending = read(tmp_path)["offending"]
    assert [each["position"] - FIRST for each in offending] == np.flatnonzero(np.repeat(holds[wanted], 8)).tolist()
    assert {each["not_finite"] for each in offending} == {"only the gradient of its micro-batch"}
    assert all(0 < each["loss"] < 10 for each in offending)


def worker(index, workdir):
    """Be one of two processes that skip update STEP: what its own half of the batch holds, both must find."""
    strategy = tf.distribute.MultiWorkerMirroredStrategy()
    run = Run(2, {**MIXED, **SOFT}, strategy).back()
    batch = poisoned(run.batch(), 29)
    logits = np.zeros([BATCH, 10], np.float32)
    logits[2] = np.inf
    mine = {name: tf.constant(np.split(value, 2)[index]) for name, value in batch.items()}
    answers = {"logits": tf.constant(np.split(logits, 2)[index])}
    watch = run.guard(Path(workdir) if index == 0 else None)
    watch(metrics(), STEP, mine, answers, 0.25)


@pytest.mark.slow
def test_two_processes_find_the_offenders_of_both_and_one_writes_them(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as other:
        workers = [f"127.0.0.1:{each.getsockname()[1]}" for each in (one, other)]
    cluster = [{"cluster": {"worker": workers}, "task": {"type": "worker", "index": index}} for index in (0, 1)]
    root = Path(__file__).resolve().parents[1]
    started = [
        subprocess.Popen(
            [sys.executable, __file__, str(index), str(tmp_path)],
            env=os.environ | {"TF_CONFIG": json.dumps(cluster[index]), "PYTHONPATH": str(root)},
            cwd=tmp_path, stderr=subprocess.PIPE, text=True,
        )
        for index in (0, 1)
    ]  # fmt: skip
    try:
        said = [process.communicate(timeout=500)[1] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0, 0], "\n".join(said)
    offending = read(tmp_path)["offending"]
    assert [each["position"] - FIRST for each in offending] == [2, 29]
    assert [each["not_finite"] for each in offending] == ["its teacher's answer", "its loss"]
    assert [each["mixed_with"]["position"] - FIRST for each in offending] == [5, 26]
    assert all("of position 1570 (digit " in text and "and 1 more" in text for text in said)


def test_three_skips_in_a_row_end_the_run_and_say_where_to_look_and_what_to_try(run_of, tmp_path):
    run = run_of()
    watch = run.guard(tmp_path)
    batch = poisoned(run.batch(), 0)
    for step in (STEP, STEP + 1):
        run.skip(watch, batch, step=step)
    with pytest.raises(guard.Diverged) as caught:
        run.skip(watch, batch, step=STEP + 2)
    text = str(caught.value)
    assert text.startswith("update 52: 3 updates in a row were skipped (max_skipped), the last: non-finite gradients")
    for part in (str(tmp_path / "skipped"), "--config.optim.peak_lr", "--config.optim.clip_norm=", "precision=float32"):
        assert part in text
    assert "\n" not in text
    assert sorted(path.name for path in (tmp_path / "skipped").iterdir()) == [
        f"update-{step:08d}.json" for step in (50, 51, 52)
    ]


def test_of_a_batch_without_a_readable_image_the_reason_is_written_and_no_losses(run_of, tmp_path, caplog):
    run = run_of()
    batch = run.batch()
    batch["weight"][:] = 0.0
    watch = run.guard(tmp_path)
    with caplog.at_level(logging.WARNING):
        run.skip(watch, batch)
    assert [each.getMessage() for each in caplog.records] == [
        "update 50 skipped: every image was unreadable (positions 1568 to 1599)"
    ]
    record = read(tmp_path)
    assert record["why"] == "every image was unreadable" and record["offending"] == []
    assert watch._find is None, "nothing was computed"


def test_an_overflow_of_the_loss_scale_is_no_warning_and_leaves_no_file(run_of, tmp_path, caplog):
    run = run_of(precision="mixed_float16")
    run.state.loss_scale.assign(2.0**40)
    with caplog.at_level(logging.INFO, logger="absl"):
        named = run.skip(run.guard(tmp_path), run.batch())
    assert named["finite"] == 0
    (record,) = [each for each in caplog.records if each.name == "absl"]
    assert record.levelno == logging.INFO and "update 50 skipped: the loss scale was too high" in record.getMessage()
    assert list(tmp_path.iterdir()) == []


def test_a_loss_that_is_not_finite_is_looked_into_at_every_loss_scale(run_of, tmp_path):
    run = run_of(precision="mixed_float16")
    batch = poisoned(run.batch(), 9)
    run.skip(run.guard(tmp_path), batch)
    assert float(run.state.loss_scale.numpy()) == train_step.FIRST_LOSS_SCALE / 2
    assert read(tmp_path)["offending"] == [entry(run, batch, 9)]
    run.state.loss_scale.assign(1.0)
    run.skip(run.guard(tmp_path), batch, step=STEP + 1)
    assert [each["position"] for each in read(tmp_path, STEP + 1)["offending"]] == [FIRST + 9]


def test_a_process_without_a_run_directory_looks_and_logs_but_writes_nothing(run_of, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    run = run_of()
    with caplog.at_level(logging.WARNING):
        run.skip(run.guard(None), poisoned(run.batch(), 3))
    assert "of position 1571 (digit " in caplog.text
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_cannot_be_written_ends_nothing(run_of, tmp_path, caplog):
    (tmp_path / "skipped").write_text("a file is in the way")
    run = run_of()
    with caplog.at_level(logging.WARNING):
        run.skip(run.guard(tmp_path), poisoned(run.batch(), 3))
    (last,) = [each.getMessage() for each in caplog.records if "can't be written" in each.getMessage()]
    assert last.startswith("update 50: ") and str(tmp_path / "skipped") in last
    assert (tmp_path / "skipped").read_text() == "a file is in the way"


def test_a_run_directory_holds_at_most_a_hundred_files(run_of, tmp_path, caplog):
    folder = tmp_path / "skipped"
    folder.mkdir()
    for step in range(1000, 1100):
        (folder / f"update-{step:08d}.json").write_text("{}")
    run = run_of()
    batch = poisoned(run.batch(), 3)
    watch = run.guard(tmp_path)
    with caplog.at_level(logging.WARNING):
        run.skip(watch, batch)
    assert len(list(folder.iterdir())) == 100 and "holds 100 files" in caplog.text
    (folder / "update-00001000.json").rename(folder / "update-00000050.json")
    run.skip(watch, batch)  # an update that is made again after a restart replaces its file
    assert len(list(folder.iterdir())) == 100 and read(tmp_path)["update"] == STEP


def test_without_memory_to_look_the_skip_is_still_written(run_of, tmp_path, monkeypatch, caplog):
    def find(*_):
        raise tf.errors.ResourceExhaustedError(None, None, "OOM")

    run = run_of()
    watch = run.guard(tmp_path)
    monkeypatch.setattr(watch, "_find", find)
    with caplog.at_level(logging.WARNING):
        run.skip(watch, poisoned(run.batch(), 3))
    assert "no memory to find which examples" in caplog.text
    assert read(tmp_path)["offending"] == []


def test_an_applied_update_passes_in_silence_and_its_batch_is_not_looked_at(tmp_path, caplog):
    config = types.SimpleNamespace(global_batch=BATCH, max_skipped=1)
    watch = guard.Guard(config, None, None, None, tmp_path)
    with caplog.at_level(logging.DEBUG):
        watch(metrics(finite=1.0, skipped_in_row=0.0), 1, None, None, 0.1)
    assert caplog.records == [] and list(tmp_path.iterdir()) == []


def test_a_batch_misses_images_where_it_weighs_less_than_all():
    config = types.SimpleNamespace(global_batch=BATCH)
    assert not guard.missing(config, metrics())
    assert guard.missing(config, metrics(**{"data/weight": 31.0}))
    assert guard.missing(config, metrics(**{"data/weight": 0.0}))


def test_the_reason_is_the_data_the_teacher_or_the_gradients():
    for values, why in (
        ({"data/weight": 0.0, "train/loss": math.nan}, "every image was unreadable"),
        ({"train/loss": math.nan, "train/loss_cls": 1.0}, "the teacher's answers are not finite"),
        ({"train/loss": math.nan, "train/loss_cls": math.nan}, "non-finite gradients"),
        ({"optim/grad_norm": math.inf}, "non-finite gradients"),
        ({"data/weight": math.nan, "train/loss": math.nan, "train/loss_cls": math.nan}, "non-finite gradients"),
    ):
        assert guard.reason(dict(zip(train_step.METRICS, metrics(**values).tolist()))) == why


def test_offenders_come_by_position_from_whatever_order_the_replicas_had():
    rows = {
        "position": np.array([4, 5, 6, 7, 0, 1, 2, 3]),
        "label": np.arange(8),
        "answered": np.array([1, 1, 1, 1, 1, 0, 1, 1]),
        "loss": np.array([1, 1, np.inf, 1, 1, 1, 1, 1], np.float32),
        "norm": np.array([1.0, np.nan, np.nan, np.inf]),  # micro-batches of positions 4 5, 6 7, 0 1, 2 3
    }
    found = [(each.position, each.label, each.what) for each in guard.offenders(rows, micro=2)]
    assert found == [
        (1, 5, "its teacher's answer"),
        (2, 6, "only the gradient of its micro-batch"),
        (3, 7, "only the gradient of its micro-batch"),
        (6, 2, "its loss"),
    ]


if __name__ == "__main__":
    worker(int(sys.argv[1]), sys.argv[2])
