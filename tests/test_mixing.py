"""Mixup and cutmix: the law of the draws against NumPy and SciPy, what is done with them against a NumPy twin."""

import draws
import numpy as np
import pytest
import tensorflow as tf
from scipy import stats

from configs import base
from deit import config as configuration
from deit.data import mixing
from deit.losses import base as losses

SIZE, CLASSES, GROUP, BATCH = 6, 5, 4, 16


def augment_config(**changes):
    c = base.get_config().augment
    c.update(dict(mix_group=GROUP) | changes)
    return c


def drawn(size=224, **changes):
    """Return lambda [10,000] and box [10,000, 4] of as many groups."""
    c = augment_config(**changes)
    return draws.sample(lambda seed: mixing.draw(seed[1], seed=7, augment_config=c, size=size))


def cutmix_twin(alpha, size, count=draws.COUNT):
    """Return boxes [count, 4] of timm's law, in NumPy."""
    rng = np.random.default_rng(11)
    side = (size * np.sqrt(1 - rng.beta(alpha, alpha, count))).astype(int)
    centre = rng.integers(0, size, [count, 2])
    low = np.clip(centre - side[:, None] // 2, 0, size)
    high = np.clip(centre + side[:, None] // 2, 0, size)
    return np.concatenate([low, high - low], 1)


def assert_cutmix_law(lambdas, boxes, alpha, size):
    twin = cutmix_twin(alpha, size)
    for column in range(4):
        draws.assert_same_law(boxes[:, column], twin[:, column])
    draws.assert_same_law(boxes[:, 2] * boxes[:, 3], twin[:, 2] * twin[:, 3])
    draws.assert_same_law(boxes[:, 0] * boxes[:, 1], twin[:, 0] * twin[:, 1])
    free = (boxes[:, :2] > 0).all(1) & (boxes[:, :2] + boxes[:, 2:] < size).all(1)
    draws.assert_same_share(free, (twin[:, :2] > 0).all(1) & (twin[:, :2] + twin[:, 2:] < size).all(1))
    assert (boxes[free, 2] == boxes[free, 3]).all() and (boxes[free, 2] % 2 == 0).all()
    assert boxes.min() >= 0 and (boxes[:, :2] + boxes[:, 2:]).max() <= size
    np.testing.assert_allclose(lambdas, 1 - boxes[:, 2] * boxes[:, 3] / size**2, rtol=0, atol=1e-7)


@pytest.mark.parametrize("alpha", [0.8, 0.2, 1.0, 2.0])
def test_lambda_of_mixup_is_beta_distributed_and_its_box_is_the_whole_image(alpha):
    lambdas, boxes = drawn(mixup=alpha)
    law = stats.beta(alpha, alpha)
    draws.assert_law(lambdas, law)
    for quantile in (0.05, 0.25, 0.5, 0.75, 0.95):
        draws.assert_probability(lambdas < law.ppf(quantile), quantile)
    assert (boxes == [0, 0, 224, 224]).all()


@pytest.mark.parametrize("alpha", [1e-2, 1e-4])
def test_lambda_of_a_tiny_alpha_is_all_or_nothing_with_the_right_odds(alpha):
    lambdas, _ = drawn(mixup=alpha)
    law = stats.beta(alpha, alpha)
    for edge in (1e-3, 0.5, 0.999):
        draws.assert_probability(lambdas < edge, law.cdf(edge))


@pytest.mark.parametrize(("alpha", "size"), [(1.0, 224), (0.5, 33)])
def test_box_of_cutmix_follows_timms_law_and_lambda_is_what_it_leaves(alpha, size):
    assert_cutmix_law(*drawn(cutmix=alpha, size=size), alpha, size)


def test_where_both_are_on_cutmix_has_the_probability_of_the_switch_and_each_keeps_its_law():
    lambdas, boxes = drawn(mixup=0.8, cutmix=1.0, mix_switch=0.3)
    cut = (boxes[:, 2:] < 224).any(1)
    draws.assert_probability(cut, 0.3)
    draws.assert_law(lambdas[~cut], stats.beta(0.8, 0.8))
    assert_cutmix_law(lambdas[cut], boxes[cut], 1.0, 224)


def test_a_group_is_mixed_with_the_probability_asked_for_and_otherwise_left_alone():
    lambdas, boxes = drawn(mixup=0.8, mix_prob=0.4)
    mixed = boxes.any(1)
    draws.assert_probability(mixed, 0.4)
    draws.assert_law(lambdas[mixed], stats.beta(0.8, 0.8))
    assert (lambdas[~mixed] == 1).all()


def test_draws_of_a_group_are_independent_of_each_other_and_of_the_next_groups():
    lambdas, boxes = drawn(mixup=1.0, cutmix=1.0, mix_prob=0.7)
    mixed = boxes.any(1)
    cut = mixed & (boxes[:, 2:] < 224).any(1)
    rows, columns = (boxes[:, i] + boxes[:, i + 2] / 2 for i in range(2))
    draws.assert_unrelated([lambdas[cut], rows[cut], columns[cut]], ["lambda", "middle row", "middle column"])
    for name, each in dict(a_lambda=lambdas, mixed=mixed, cut=cut, rows=rows, columns=columns).items():
        draws.assert_unrelated([each[:-1], each[1:]], [name, f"{name} of the next group"])
    # Were the draw of the switch that of `mix_prob`, 5 of 7 mixed groups would be below 0.5.
    draws.assert_probability(cut[mixed], 0.5)
    draws.assert_law(lambdas[mixed & ~cut], stats.beta(1.0, 1.0))


def test_a_draw_is_a_function_of_seed_and_group():
    def one(group, seed):
        c = augment_config(mixup=0.8)
        return float(mixing.draw(tf.constant(group, tf.int64), seed=seed, augment_config=c, size=SIZE)[0])

    assert one(3, 7) == one(3, 7)
    assert len({one(group, seed) for group in (0, 3, 2**33) for seed in (0, 7, 2**31 - 1)}) == 9


def make_batch(first=0, count=BATCH, size=SIZE, unreadable=(), **changes):
    """Return positions first .. first + count of a stream whose pictures depend on the position alone."""
    position = first + np.arange(count)
    pictures = np.random.default_rng(2).integers(0, 256, [64, size, size, 3])
    weight = np.where(np.isin(position, unreadable), 0, 1).astype("f4")
    batch = {
        "image": tf.constant(pictures[position % 64], tf.uint8),
        "label": tf.constant(position * 7 % CLASSES, tf.int32),
        "weight": tf.constant(weight),
        "position": tf.constant(position, tf.int64),
    }
    c = augment_config(**changes)
    if configuration.mixes(c):
        batch |= mixing.fields(batch["position"], batch["weight"], seed=7, augment_config=c, size=size)
    return batch


def numpy_of(batch):
    return {name: value.numpy() for name, value in batch.items()}


def mixed_twin(batch):
    """Return images [B, S, S, 3] and targets [B, C] by the definition, one pixel box at a time."""
    b = numpy_of(batch)
    own, first = b["image"].astype("f8"), b["position"][0]
    pictures, labels = own.copy(), np.zeros([len(own), CLASSES])
    for i, (share, partner, box) in enumerate(zip(b["mix_lambda"], b["mix_partner"] - first, b["mix_box"])):
        top, left, height, width = box
        if height == width == own.shape[1]:
            pictures[i] = float(share) * own[i] + (1 - float(share)) * own[partner]
        else:
            area = np.s_[top : top + height, left : left + width]
            pictures[i][area] = own[partner][area]
        labels[i, b["label"][i]] += share
        labels[i, b["label"][partner]] += 1 - share
    return pictures, labels


BOTH = dict(mixup=0.8, cutmix=1.0)


def test_fields_give_a_group_one_draw_and_every_example_the_mirrored_one():
    batch = numpy_of(make_batch(first=32, **BOTH))
    assert batch["mix_partner"].tolist() == [35, 34, 33, 32, 39, 38, 37, 36, 43, 42, 41, 40, 47, 46, 45, 44]
    c = augment_config(**BOTH)
    for i in range(BATCH):
        group = tf.constant((32 + i) // GROUP, tf.int64)
        share, box = mixing.draw(group, seed=7, augment_config=c, size=SIZE)
        assert batch["mix_lambda"][i] == share.numpy()
        assert batch["mix_box"][i].tolist() == box.numpy().tolist()
    assert len(set(batch["mix_lambda"].tolist())) == BATCH // GROUP
    kinds = {name: (value.dtype, value.shape) for name, value in batch.items() if name.startswith("mix")}
    assert kinds == {"mix_lambda": ("f4", (16,)), "mix_partner": ("i8", (16,)), "mix_box": ("i4", (16, 4))}


def test_an_unreadable_example_and_its_partner_stay_unmixed():
    batch = numpy_of(make_batch(unreadable=(1, 12, 15), mixup=0.8))
    whole = numpy_of(make_batch(mixup=0.8))
    apart = np.isin(np.arange(BATCH), [1, 2, 12, 15])  # 2 is the partner of 1; 12 and 15 are each other's
    assert (batch["mix_lambda"][apart] == 1).all() and (batch["mix_box"][apart] == 0).all()
    for name in ("mix_lambda", "mix_box"):
        np.testing.assert_array_equal(batch[name][~apart], whole[name][~apart])
    assert (whole["mix_lambda"] < 1).all()


@pytest.mark.parametrize("size", [6, 7], ids=["words of four bytes", "an odd number of bytes"])
@pytest.mark.parametrize("changes", [dict(mixup=0.8), dict(cutmix=1.0), BOTH | dict(mix_prob=0.5)], ids=str)
def test_mixed_pictures_and_targets_equal_those_of_the_numpy_twin(changes, size):
    batch = make_batch(count=64, size=size, **changes)
    pictures, labels = mixed_twin(batch)
    mixed = mixing.images(batch, 0, 64)
    assert mixed.dtype == tf.float32
    np.testing.assert_allclose(mixed, pictures, rtol=0, atol=0 if "mixup" not in changes else 1e-4)
    assert (pictures != batch["image"].numpy()).any(axis=(1, 2, 3)).mean() > 0.3, "something was mixed"
    np.testing.assert_allclose(mixing.targets(batch, 0, 64, CLASSES), labels, rtol=0, atol=1e-7)


def test_a_box_in_numbers():
    batch = make_batch(count=4)
    batch["image"] = tf.repeat(tf.reshape(tf.constant([10, 20, 30, 40], tf.uint8), [4, 1, 1, 1]), 3, 3)
    batch["image"] = tf.tile(batch["image"], [1, 3, 3, 1])
    batch["mix_partner"] = tf.constant([3, 2, 1, 0], tf.int64)
    batch["mix_box"] = tf.constant([[0, 1, 2, 1], [0, 0, 3, 3], [0, 0, 0, 0], [2, 0, 1, 3]])
    batch["mix_lambda"] = tf.constant([7 / 9, 0.25, 1.0, 6 / 9])
    red = mixing.images(batch, 0, 4)[..., 0].numpy()
    assert red[0].tolist() == [[10, 40, 10], [10, 40, 10], [10, 10, 10]]
    assert (red[1] == 27.5).all()  # 0.25 * 20 + 0.75 * 30
    assert (red[2] == 30).all()
    assert red[3].tolist() == [[40] * 3, [40] * 3, [10] * 3]


@pytest.mark.parametrize("changes", [{}, BOTH], ids=["not mixed", "mixed"])
def test_micro_batches_are_the_rows_of_the_whole(changes):
    batch = make_batch(first=16, **changes)
    pictures, labels = mixing.images(batch, 0, BATCH), mixing.targets(batch, 0, BATCH, CLASSES)
    for count in (1, 2, 8):

        @tf.function(reduce_retracing=True)
        def part(start, count=count):
            return mixing.images(batch, start, count), mixing.targets(batch, start, count, CLASSES)

        for start in range(0, BATCH, count):
            some, of_them = part(tf.constant(start))
            np.testing.assert_array_equal(some, pictures[start : start + count])
            np.testing.assert_array_equal(of_them, labels[start : start + count])


@pytest.mark.parametrize("owners", [2, 4])
def test_the_slices_of_several_owners_side_by_side_are_the_whole(owners):
    whole, share = make_batch(first=48, **BOTH), BATCH // owners
    slices = [make_batch(first=48 + k * share, count=share, **BOTH) for k in range(owners)]
    for name in whole:
        np.testing.assert_array_equal(np.concatenate([part[name] for part in slices]), whole[name])
    for apply in (mixing.images, lambda *rows: mixing.targets(*rows, CLASSES)):
        np.testing.assert_array_equal(
            np.concatenate([apply(part, 0, share) for part in slices]), apply(whole, 0, BATCH)
        )


def test_without_mixing_a_batch_gives_its_own_pictures_and_integer_labels():
    batch = make_batch()
    assert not any(name.startswith("mix") for name in batch)
    pictures, labels = mixing.images(batch, 4, 3), mixing.targets(batch, 4, 3, CLASSES)
    assert (pictures.dtype, labels.dtype) == (tf.float32, tf.int32)
    np.testing.assert_array_equal(pictures, batch["image"].numpy()[4:7])
    np.testing.assert_array_equal(labels, batch["label"].numpy()[4:7])


def test_a_micro_batch_holds_no_more_floats_than_its_own_pictures():
    batch = make_batch(count=64, **BOTH)
    specs = {name: tf.TensorSpec(value.shape, value.dtype) for name, value in batch.items()}
    traced = tf.function(lambda batch, start: mixing.images(batch, start, 2)).get_concrete_function(
        specs, tf.TensorSpec([], tf.int32)
    )
    outputs = [output for op in traced.graph.get_operations() for output in op.outputs]
    sizes = [output.shape.num_elements() for output in outputs if output.dtype.is_floating]
    assert max(size for size in sizes if size) == 2 * SIZE * SIZE * 3
    drawing = [op.type for op in traced.graph.get_operations() if "Random" in op.type]
    assert not drawing
    # What TensorFlow has no GPU kernel for would carry the batch to the host and back.
    gathered = [op.inputs[0].dtype for op in traced.graph.get_operations() if op.type == "GatherV2"]
    assert gathered == [tf.int32]


def test_compiled_by_xla_the_pictures_are_the_same():
    batch = make_batch(**BOTH)
    compiled = tf.function(lambda start: mixing.images(batch, start, 4), jit_compile=True)
    np.testing.assert_allclose(compiled(tf.constant(8)), mixing.images(batch, 8, 4), rtol=0, atol=1e-4)


def classes_and_shares():
    """Return a batch of one pair: class 1 with share 0.7 and class 3; logits [2, 5]."""
    batch = make_batch(count=2)
    batch |= {
        "label": tf.constant([1, 3]),
        "mix_lambda": tf.constant([0.7, 0.7]),
        "mix_partner": tf.constant([1, 0], tf.int64),
        "mix_box": tf.constant([[0, 0, SIZE, SIZE]] * 2),
    }
    return batch, np.array([[0.5, -1.0, 2.0, 0.0, 1.0], [1.5, 0.3, -0.2, -2.0, 0.0]], "f4")


def test_label_smoothing_spreads_its_share_of_a_mixed_label_over_all_classes():
    batch, logits = classes_and_shares()
    targets = mixing.targets(batch, 0, 2, CLASSES)
    # 0.9 * 0.7 + 0.1 / 5 = 0.65; 0.9 * 0.3 + 0.02 = 0.29
    by_hand = np.array([[0.02, 0.65, 0.02, 0.29, 0.02], [0.02, 0.29, 0.02, 0.65, 0.02]])
    np.testing.assert_allclose(losses.smooth(targets, 0.1), by_hand, atol=1e-6)
    log = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    result = losses.classification(tf.constant(logits), targets, kind="ce", smoothing=0.1)
    np.testing.assert_allclose(result, -(by_hand * log).sum(-1), rtol=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_with_binary_cross_entropy_both_classes_of_a_mixture_are_fully_positive(smoothing):
    batch, logits = classes_and_shares()
    positive = np.array([[0, 1, 0, 1, 0]] * 2)
    chance = 1 / (1 + np.exp(-logits.astype("f8")))
    by_hand = -(positive * np.log(chance) + (1 - positive) * np.log(1 - chance)).mean(-1)
    targets = mixing.targets(batch, 0, 2, CLASSES)
    result = losses.classification(tf.constant(logits), targets, kind="bce", smoothing=smoothing)
    np.testing.assert_allclose(result, by_hand, rtol=1e-6)


def test_with_binary_cross_entropy_an_unmixed_example_has_one_positive_class():
    batch, _ = classes_and_shares()
    batch["mix_lambda"] = tf.constant([1.0, 0.0])
    positive = losses.binary_targets(mixing.targets(batch, 0, 2, CLASSES)).numpy()
    assert positive.tolist() == [[0, 1, 0, 0, 0], [0, 1, 0, 0, 0]]
