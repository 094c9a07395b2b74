"""One update: accumulation, replicas, the guard, the averages; on a small DeiT with drop-path on."""

import devices
import numpy as np
import pytest
import tensorflow as tf

from configs import base
from deit import config as configuration
from deit import ema, errors, keras, optim, train_step
from deit.data import mixing
from deit.models import factory
from deit.teachers import labels

BATCH, CLASSES = 32, 10


class LinearTeacher:
    """Answers by a fixed projection of the mean colour of each quarter of the picture."""

    num_classes = CLASSES

    def __init__(self):
        self.weights = np.random.default_rng(5).normal(size=[12, CLASSES]).astype("f4")

    def logits(self, images):
        quarters = tf.nn.avg_pool2d(images, 16, 16, "VALID")
        return (tf.reshape(quarters, [-1, 12]) - 127.5) @ self.weights / 10.0  # around 0: no class wins always


def make_config(*, micro=BATCH, replicas=1, **changes):
    c = base.get_config()
    c.model.variant, c.model.drop_path = "deit_micro_distilled_patch8_32", 0.2
    c.data.image_size, c.global_batch, c.micro_batch, c.total_updates = 32, BATCH, micro, 20
    c.optim.ema_decay = 0.3  # low: the ramp of the averages reaches it within a few updates
    c.distill.kind, c.teacher.kind, c.teacher.path, c.teacher.batch = "hard", "run", "unused", 16
    c.augment.mix_group = 8
    c.update_from_flattened_dict(changes)
    classes = tuple("0123456789")
    return configuration.resolve(c, train_size=640, eval_size=64, classes=classes, replicas=replicas)


def make_batch(seed=0, drop_rates=()):
    rng = np.random.default_rng(seed)
    kept = rng.random([BATCH, len(drop_rates)]) >= np.array(drop_rates)
    return {
        "image": rng.integers(0, 256, [BATCH, 32, 32, 3]).astype(np.uint8),
        "label": rng.integers(0, CLASSES, [BATCH]).astype(np.int32),
        "weight": np.ones([BATCH], np.float32),
        "position": seed * BATCH + np.arange(BATCH, dtype=np.int64),
        "drop": kept.astype(np.float32),
    }


class Run:
    """A state and its update on one device, or on as many logical CPUs as the configuration has replicas."""

    def __init__(self, config):
        self.config = config
        self.strategy = devices.two_cpus() if config.resolved.replicas == 2 else devices.one_device()
        with self.strategy.scope():
            self.network = factory.build(config.model, num_classes=CLASSES, image_size=32, precision=config.precision)
            self.state = train_step.create_state(config, self.network)
        self.teacher = LinearTeacher()
        self.step = train_step.make(config, self.strategy, self.state)
        self.gradient = tf.function(train_step.gradient_function(config, self.state))
        self.label = tf.function(labels.function(config, self.teacher))
        self.initial = self.tensors()

    def batch(self, seed=0):
        batch = make_batch(seed, self.network.drop_rates)
        if configuration.mixes(self.config.augment):
            drawn = mixing.fields(
                tf.constant(batch["position"]),
                tf.constant(batch["weight"]),
                seed=0,
                augment_config=self.config.augment,
                size=32,
            )
            batch |= {name: value.numpy() for name, value in drawn.items()}
        return batch

    def update(self, batch):
        batch = devices.spread(self.strategy, batch)
        return dict(zip(train_step.METRICS, self.step(batch, self.answers(batch)).numpy().tolist()))

    def answers(self, batch):
        return self.strategy.run(self.label, args=(batch,))

    def gradients(self, batch):
        batch = devices.spread(self.strategy, batch)
        per_replica, _ = self.strategy.run(self.gradient, args=(batch, self.answers(batch)))
        return [self.strategy.experimental_local_results(g)[0].numpy() for g in per_replica]

    def losses(self, batch):
        """Return the metrics of a batch without an update, on one device."""
        batch = devices.spread(self.strategy, batch)
        _, sums = self.strategy.run(self.gradient, args=(batch, self.answers(batch)))
        return dict(zip(train_step.METRICS, sums.numpy().tolist()))

    def tensors(self):
        return train_step.snapshot(self.state)


LAYOUTS = {
    "sixteen micro-batches of 2": dict(micro=2),
    "two replicas with four micro-batches of 4": dict(micro=4, replicas=2),
}
# Groups of 8, so a partner is seldom in the same micro-batch.
MIXED = {"augment.mixup": 0.8, "augment.cutmix": 1.0}


@pytest.fixture(scope="module")
def run_of():
    """Return `run_of(**settings)`: one Run for each configuration, traced once, back at update 0 at each call."""
    made = {}

    def get(**settings):
        key = tuple(sorted(settings.items()))
        if key not in made:
            made[key] = Run(make_config(**settings))
        train_step.restore(made[key].state, made[key].initial)
        return made[key]

    return get


@pytest.mark.parametrize("changes", [{}, MIXED], ids=["not mixed", "mixed"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_of_micro_batches_equal_those_of_one_batch(run_of, layout, changes):
    whole, split = run_of(**changes), run_of(**LAYOUTS[layout], **changes)
    batch = whole.batch()
    for one, many in zip(whole.gradients(batch), split.gradients(batch), strict=True):
        assert np.abs(one).max() > 0
        np.testing.assert_allclose(many, one, rtol=0, atol=1e-5 * np.abs(one).max())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_after_one_sgd_update_agree_to_a_millionth(run_of, monkeypatch, layout):
    def apply(optimizer, grads_and_vars, *, decayed, scales=()):
        optimizer.apply_gradients(grads_and_vars, experimental_aggregate_gradients=False)

    whole = run_of()
    batch = whole.batch()
    expected = [v.numpy() - 0.1 * g for (_, v), g in zip(whole.state.trainable, whole.gradients(batch), strict=True)]
    monkeypatch.setattr(optim, "build", lambda config, step: keras.optimizers.legacy.SGD(0.1))
    monkeypatch.setattr(optim, "create_slots", lambda optimizer, variables: optimizer._create_all_weights(variables))
    monkeypatch.setattr(optim, "slots", lambda optimizer, named: [("optimizer/iterations", optimizer.iterations)])
    monkeypatch.setattr(optim, "apply", apply)
    run = Run(make_config(**LAYOUTS[layout]))
    assert run.update(batch)["finite"] == 1
    for (path, variable), weights in zip(run.state.trainable, expected, strict=True):
        assert np.abs(weights - run.initial[f"student/{path}"]).max() > 1e-6, path
        for copy in run.strategy.experimental_local_results(variable):
            np.testing.assert_allclose(copy.numpy(), weights, rtol=0, atol=1e-6, err_msg=path)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_losses_over_twenty_adamw_updates_agree_to_1e_5_relative(run_of, layout):
    curves = []
    for run in (run_of(), run_of(**LAYOUTS[layout])):
        curves.append([run.update(run.batch(seed))["train/loss"] for seed in range(20)])
        assert int(run.state.optimizer.iterations.numpy()) == 20
        assert int(run.state.step.numpy()) == 20
    assert curves[0][-1] != curves[0][0]
    np.testing.assert_allclose(curves[1], curves[0], rtol=1e-5)


def test_the_loss_is_the_formula_of_the_paper_on_the_models_own_logits(run_of):
    run = run_of(micro=16)
    batch = run.batch()
    outputs = run.network.logits(tf.cast(batch["image"], tf.float32), tf.constant(batch["drop"]))
    said = run.teacher.logits(tf.cast(batch["image"], tf.float32)).numpy().argmax(-1)
    assert len(set(said.tolist())) > 5, "the order of the teacher's labels matters"

    def log_softmax(z):
        z = z - z.max(-1, keepdims=True)
        return z - np.log(np.exp(z).sum(-1, keepdims=True))

    rows = np.arange(BATCH)
    smooth = np.full([BATCH, CLASSES], 0.1 / CLASSES)
    smooth[rows, batch["label"]] += 0.9
    of_cls = -(smooth * log_softmax(outputs["cls"].numpy().astype("f8"))).sum(-1).mean()
    of_dist = -log_softmax(outputs["dist"].numpy().astype("f8"))[rows, said].mean()
    logged = run.update(batch)
    np.testing.assert_allclose(logged["train/loss"], (of_cls + of_dist) / 2, rtol=1e-5)
    np.testing.assert_allclose(logged["train/loss_cls"], of_cls, rtol=1e-5)
    np.testing.assert_allclose(logged["train/loss_distill"], of_dist, rtol=1e-5)


def mixed_by_hand(batch):
    """Return the pictures [B, 32, 32, 3] and the shares of the classes [B, C] that a mixed batch stands for."""
    own = batch["image"].astype("f4")
    pictures, shares, rows = own.copy(), np.zeros([BATCH, CLASSES]), np.arange(BATCH)
    partners = batch["mix_partner"] - batch["position"][0]
    for i, (partner, (top, left, height, width)) in enumerate(zip(partners, batch["mix_box"])):
        share = batch["mix_lambda"][i] if height == width == 32 else 0.0
        area = np.s_[top : top + height, left : left + width]
        pictures[i][area] = share * own[i][area] + (1 - share) * own[partner][area]
    shares[rows, batch["label"]] += batch["mix_lambda"]
    shares[rows, batch["label"][partners]] += 1 - batch["mix_lambda"]
    return pictures, shares


# 32 pictures by a teacher that takes 12 at once: two full chunks and a rest.
@pytest.mark.parametrize("kind", ["ce", "bce"])
def test_student_and_teacher_see_the_mixed_picture_and_only_the_label_of_the_data_is_mixed(run_of, kind):
    run = run_of(micro=4, **MIXED, **{"loss.kind": kind, "teacher.batch": 12})
    batch = run.batch()
    pictures, shares = mixed_by_hand(batch)
    outputs = run.network.logits(tf.constant(pictures), tf.constant(batch["drop"]))
    said = run.teacher.logits(tf.constant(pictures)).numpy().argmax(-1)
    unmixed = run.teacher.logits(tf.cast(batch["image"], tf.float32)).numpy().argmax(-1)
    assert (said != unmixed).mean() > 0.2, "a teacher of unmixed pictures would be noticed"
    cls, dist = (outputs[head].numpy().astype("f8") for head in ("cls", "dist"))
    log_dist = dist - np.log(np.exp(dist).sum(-1, keepdims=True))
    if kind == "ce":
        log_cls = cls - np.log(np.exp(cls).sum(-1, keepdims=True))
        of_cls = -((0.9 * shares + 0.1 / CLASSES) * log_cls).sum(-1).mean()
    else:
        of_cls = np.log1p(np.exp(np.where(shares > 0, -cls, cls))).mean()
    logged = run.losses(batch)
    np.testing.assert_allclose(logged["train/loss_cls"], of_cls, rtol=1e-5)
    np.testing.assert_allclose(logged["train/loss_distill"], -log_dist[np.arange(BATCH), said].mean(), rtol=1e-5)


def test_no_float_copy_of_a_whole_mixed_slice_is_ever_held(run_of):
    def float_pictures(run):
        batch = {name: tf.TensorSpec(value.shape, value.dtype) for name, value in run.batch().items()}
        answers = labels.layout(run.config).specs(BATCH)
        graphs = [run.gradient.get_concrete_function(batch, answers), run.label.get_concrete_function(batch)]
        nodes = []
        for graph in (function.graph.as_graph_def(add_shapes=True) for function in graphs):
            nodes += [*graph.node, *(node for function in graph.library.function for node in function.node_def)]
        shapes = [
            [size.size for size in shape.dim]
            for node in nodes
            if any(node.attr[name].type == tf.float32.as_datatype_enum for name in ("T", "DstT", "dtype"))
            for shape in node.attr["_output_shapes"].list.shape
        ]
        return {shape[0] for shape in shapes if shape[1:] == [32, 32, 3]}

    split = run_of(micro=4, **MIXED, **{"loss.kind": "ce", "teacher.batch": 12})
    assert float_pictures(split) == {4, 8, 12}  # micro-batches; the teacher's chunks and their rest
    assert BATCH in float_pictures(run_of(**MIXED))


@pytest.mark.parametrize("settings", [dict(micro=16), dict(micro=4, replicas=2)], ids=["one device", "two replicas"])
def test_a_non_finite_gradient_leaves_everything_but_the_counters_untouched(run_of, settings):
    run = run_of(**settings)
    run.update(run.batch(0))
    before = run.tensors()
    poisoned = run.batch(1)
    poisoned["weight"][BATCH - 1] = np.nan  # in the last replica only
    logged = run.update(poisoned)
    after = run.tensors()
    assert logged["finite"] == 0 and logged["skipped_in_row"] == 1
    changed = {name for name in before if before[name].tobytes() != after[name].tobytes()}
    assert changed - {"bad_images"} == {"step", "skipped", "skipped_in_row"}
    assert int(after["step"]) == 2 and int(after["optimizer/iterations"]) == 1
    assert run.update(run.batch(2))["skipped_in_row"] == 0


@pytest.mark.parametrize("settings", [dict(micro=16), dict(micro=4, replicas=2)], ids=["one device", "two replicas"])
def test_an_update_in_which_the_teacher_has_no_finite_answer_is_skipped(run_of, settings):
    run = run_of(**settings)
    silent = LinearTeacher()
    silent.weights[:] = np.nan
    label = tf.function(labels.function(run.config, silent))
    before, batch = run.tensors(), devices.spread(run.strategy, run.batch(1))
    answers = run.strategy.run(label, args=(batch,))
    logged = dict(zip(train_step.METRICS, run.step(batch, answers).numpy().tolist()))
    assert logged["finite"] == 0 and logged["skipped_in_row"] == 1
    assert run.tensors()["student/head/kernel"].tobytes() == before["student/head/kernel"].tobytes()


def test_the_loss_with_unreadable_images_is_the_mean_over_the_readable_ones(run_of):
    run = run_of(micro=16)
    batch = run.batch()
    batch["weight"][[0, 7, 31]] = 0.0
    batch["image"][[0, 7, 31]] = 0
    good = batch["weight"] > 0
    outputs = run.network.logits(tf.cast(batch["image"], tf.float32), tf.constant(batch["drop"]))
    said = run.teacher.logits(tf.cast(batch["image"], tf.float32)).numpy().argmax(-1)
    losses = tf.nn.sparse_softmax_cross_entropy_with_logits(said, outputs["dist"]).numpy()
    logged = run.update(batch)
    np.testing.assert_allclose(logged["train/loss_distill"], losses[good].mean(), rtol=1e-5)
    assert int(run.tensors()["bad_images"]) == 3


def test_a_batch_without_one_readable_image_is_skipped(run_of):
    run = run_of(micro=16)
    batch = run.batch()
    batch["weight"][:] = 0.0
    before = run.tensors()
    assert run.update(batch)["finite"] == 0
    assert run.tensors()["student/head/kernel"].tobytes() == before["student/head/kernel"].tobytes()


def test_averages_follow_the_published_ramp_recomputed_in_numpy(run_of):
    run = run_of(micro=16)
    expected = run.tensors()["student/head/kernel"].astype("f8")
    for update in range(6):
        run.update(run.batch(update))
        decay = min(0.3, (1 + update) / (10 + update))
        expected = decay * expected + (1 - decay) * run.tensors()["student/head/kernel"]
    np.testing.assert_allclose(run.tensors()["ema/head/kernel"], expected, rtol=0, atol=1e-6)
    assert float(ema.decay_at(tf.constant(5, tf.int64), 0.5)) == pytest.approx(6 / 15)


def test_mixed_float16_halves_its_loss_scale_on_overflow_and_keeps_training(run_of):
    run = run_of(micro=16, precision="mixed_float16")
    run.state.loss_scale.assign(2.0**40)
    assert run.update(run.batch(0))["finite"] == 0
    after = run.tensors()
    assert float(after["loss_scale"]) == 2.0**39
    assert int(after["skipped_in_row"]) == 0, "an overflow above scale 1 is no sign of divergence"
    run.state.loss_scale.assign(2.0**15)
    first = run.tensors()["student/head/kernel"]
    run.update(run.batch(1))
    assert run.update(run.batch(2))["finite"] == 1
    assert np.abs(run.tensors()["student/head/kernel"] - first).max() > 0


def test_mixed_bfloat16_follows_the_float32_loss(run_of):
    exact, rounded = (run_of(micro=16), run_of(micro=16, precision="mixed_bfloat16"))
    for seed in range(3):
        a, b = exact.update(exact.batch(seed)), rounded.update(rounded.batch(seed))
        np.testing.assert_allclose(b["train/loss"], a["train/loss"], rtol=0.02)
        assert b["train/loss"] != a["train/loss"], "computed in float32"


@pytest.mark.slow  # XLA compiles for ten seconds and more
@pytest.mark.parametrize("layout", [dict(micro=8), dict(micro=8, replicas=2)], ids=["one device", "two replicas"])
def test_with_xla_the_gradients_are_those_without_and_a_poisoned_batch_is_skipped(run_of, layout):
    plain, compiled = run_of(**layout), run_of(**layout, xla=True)
    batch = plain.batch()
    for one, other in zip(plain.gradients(batch), compiled.gradients(batch), strict=True):
        np.testing.assert_allclose(other, one, rtol=0, atol=1e-5 * np.abs(one).max())
    poisoned = compiled.batch()
    poisoned["weight"][BATCH - 1] = np.nan  # in the last replica only
    before = compiled.tensors()
    assert compiled.update(poisoned)["finite"] == 0
    after = compiled.tensors()
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    assert changed - {"bad_images"} == {"step", "skipped", "skipped_in_row"}
    assert compiled.update(batch)["finite"] == 1


def test_the_update_says_how_many_replicas_were_asked_to_stop(run_of):
    for layout, replicas in (({}, 1), (LAYOUTS["two replicas with four micro-batches of 4"], 2)):
        run = run_of(**layout)
        batch = devices.spread(run.strategy, run.batch())
        for asked in (0.0, 1.0):
            told = run.step(batch, run.answers(batch), tf.constant(asked)).numpy()
            assert told[train_step.METRICS.index("stop")] == asked * replicas


def test_clipping_bounds_the_step_but_reports_the_norm_before_it(run_of):
    free, clipped = run_of(micro=16), run_of(micro=16, **{"optim.clip_norm": 0.01})
    batch = free.batch()
    norm = np.sqrt(sum((g.astype("f8") ** 2).sum() for g in free.gradients(batch)))
    clipped_norm = np.sqrt(sum((g.astype("f8") ** 2).sum() for g in clipped.gradients(batch)))
    assert norm > 0.01
    assert clipped_norm == pytest.approx(0.01, rel=1e-4)
    assert clipped.update(batch)["optim/grad_norm"] == pytest.approx(norm, rel=1e-4)


def test_a_restored_state_continues_bit_for_bit(run_of):
    first = run_of(micro=16)
    for seed in range(2):
        first.update(first.batch(seed))
    saved = first.tensors()
    second = Run(make_config(micro=16))
    train_step.restore(second.state, saved)
    for run in (first, second):
        run.update(run.batch(2))
    ours, theirs = first.tensors(), second.tensors()
    assert all(ours[name].tobytes() == theirs[name].tobytes() for name in ours)


def test_a_checkpoint_that_does_not_fit_is_refused_by_name(run_of):
    run = run_of(micro=16)
    tensors = run.tensors()
    tensors["student/stranger"] = tensors.pop("student/head/bias")
    tensors["student/head/kernel"] = tensors["student/head/kernel"][:, :5]
    with pytest.raises(errors.UserError) as caught:
        train_step.restore(run.state, tensors)
    for name in ("missing student/head/bias", "left over student/stranger", "student/head/kernel"):
        assert name in str(caught.value)


def test_soft_targets_reach_the_loss_as_logits(run_of):
    run = run_of(micro=8, **{"distill.kind": "soft", "distill.tau": 3.0})
    batch = run.batch()
    outputs = run.network.logits(tf.cast(batch["image"], tf.float32), tf.constant(batch["drop"]))
    teacher = run.teacher.logits(tf.cast(batch["image"], tf.float32)).numpy().astype("f8") / 3.0
    student = outputs["dist"].numpy().astype("f8") / 3.0

    def log_softmax(z):
        z = z - z.max(-1, keepdims=True)
        return z - np.log(np.exp(z).sum(-1, keepdims=True))

    t, s = log_softmax(teacher), log_softmax(student)
    expected = 9.0 * (np.exp(t) * (t - s)).sum(-1).mean()
    np.testing.assert_allclose(run.update(batch)["train/loss_distill"], expected, rtol=1e-4)
