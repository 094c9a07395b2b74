"""The stream: positions, epochs, slices, starts, unreadable images, drop draws, evaluation padding."""

import numpy as np
import pytest
import tensorflow as tf
from tensorflow.python.framework import op_def_registry

from configs import base, deit_tiny_flowers
from deit.data import augment, decode, sources, stream, views

N, BATCH, SIZE = 12, 8, 16


def small_config():
    c = base.get_config()
    c.global_batch, c.data.image_size, c.augment.resize_margin, c.seed = BATCH, SIZE, 4, 5
    return c


def small_source(bad=()) -> sources.InMemory:
    """Return 12 pictures whose label is their index; those in `bad` are damaged, each in another way."""
    rng = np.random.RandomState(0)
    encoded = [
        tf.io.encode_jpeg(np.kron(rng.randint(0, 256, [5, 6, 3]), np.ones([8, 8, 1])).astype(np.uint8)).numpy()
        for _ in range(N)
    ]
    damage = [
        lambda data: b"",
        lambda data: data[: len(data) // 2],
        lambda data: b"text",
        lambda data: data[:2],
    ]
    for k, index in enumerate(bad):
        encoded[index] = damage[k % len(damage)](encoded[index])
    return sources.InMemory(encoded, np.arange(N), classes=[str(i) for i in range(N)])


def collect(count, source=None, config=None, *, start=0, first=0, size=BATCH, rates=(0.0, 0.3)):
    dataset = stream.training(
        source or small_source(),
        config or small_config(),
        start_update=start,
        slice_start=first,
        slice_size=size,
        drop_rates=rates,
    )
    return list(dataset.take(count).as_numpy_iterator())


def joined(batches, name):
    return np.concatenate([batch[name] for batch in batches])


def assert_equal(got, expected):
    assert got.keys() == expected.keys()
    for name in got:
        np.testing.assert_array_equal(got[name], expected[name], err_msg=name)


def test_batches_have_the_contracts_shapes_and_types():
    batch = collect(1)[0]
    described = {name: (value.shape, value.dtype) for name, value in batch.items()}
    assert described == {
        "image": ((BATCH, SIZE, SIZE, 3), np.uint8),
        "label": ((BATCH,), np.int32),
        "weight": ((BATCH,), np.float32),
        "position": ((BATCH,), np.int64),
        "drop": ((BATCH, 2), np.float32),
    }


def test_every_epoch_is_a_permutation_of_its_own():
    batches = collect(6)  # 48 positions: four epochs of 12, whose borders lie inside batches
    np.testing.assert_array_equal(joined(batches, "position"), np.arange(48))
    epochs = joined(batches, "label").reshape(4, N)
    np.testing.assert_array_equal(np.sort(epochs, 1), np.tile(np.arange(N), [4, 1]))
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_index_of_a_position_is_tensorflows_index_shuffle():
    for n, seed, first in ((12, 5, 0), (3303, 2**31 - 1, 3300), (1, 0, 0), (1_281_167, 9, 2**40)):
        positions = np.arange(first, first + 6)
        got = stream.positions_to_indices(tf.constant(positions, tf.int64), n=n, seed=seed).numpy()
        shuffled = tf.random.experimental.index_shuffle
        expected = [int(shuffled(p % n, tf.constant([seed, p // n], tf.int64), np.int64(n - 1))) for p in positions]
        assert got.tolist() == expected


@pytest.mark.parametrize("crop", ["resize_crop", "random_resized"])
def test_start_at_any_update_is_the_tail_of_the_whole(crop):
    config = small_config()
    config.augment.crop = crop
    whole = collect(3, config=config)  # two epochs
    for start in (1, 2) if crop == "resize_crop" else (1,):
        for got, expected in zip(collect(3 - start, config=config, start=start), whole[start:]):
            assert_equal(got, expected)


def test_slices_put_side_by_side_are_the_whole():
    whole = collect(2, start=1)
    parts = [collect(2, start=1, first=first, size=4) for first in (0, 4)]
    for k, expected in enumerate(whole):
        assert_equal({name: np.concatenate([part[k][name] for part in parts]) for name in expected}, expected)


def everything_on(**fields):
    """Return a configuration with every augmentation: three views an example, RandAugment, erasing, mixing by twos."""
    config = deit_tiny_flowers.get_config("full")
    config.global_batch, config.data.image_size, config.seed, config.augment.mix_group = 24, SIZE, 5, 2
    config.update_from_flattened_dict(fields)
    return config


DEIT_III = {"augment.randaugment": "", "augment.three_augment": True, "augment.jitter": 0.3, "augment.crop": "simple"}


@pytest.mark.slow
@pytest.mark.parametrize("fields", [{}, DEIT_III], ids=["deit", "deit-iii"])
def test_start_at_any_update_is_the_tail_of_the_whole_with_every_augmentation_on(fields):
    config, source = everything_on(global_batch=4, **fields), small_source(bad=[3])
    whole = collect(6, source, config, size=4)  # two epochs of 12
    assert {"mix_lambda", "mix_partner", "mix_box"} < whole[0].keys()
    for start in range(6):
        for got, expected in zip(collect(6 - start, source, config, start=start, size=4), whole[start:]):
            assert_equal(got, expected)


@pytest.mark.parametrize("workers", [2, 3, 4])
def test_the_slices_of_workers_in_order_are_the_single_workers_batch_with_every_augmentation_on(workers):
    config, source = everything_on(), small_source(bad=[3])
    whole = collect(2, source, config, start=1, size=24)
    size = 24 // workers
    parts = [collect(2, source, config, start=1, first=i * size, size=size) for i in range(workers)]
    for k, expected in enumerate(whole):
        assert_equal({name: np.concatenate([part[k][name] for part in parts]) for name in expected}, expected)


def test_thread_counts_change_no_byte():
    source, whole = small_source(), collect(3, config=everything_on(), size=24)
    for threads in (1, 2, 7):
        for got, expected in zip(collect(3, source, everything_on(**{"data.threads": threads}), size=24), whole):
            assert_equal(got, expected)


@pytest.mark.parametrize(("repeats", "n"), [(3, 12), (3, 11), (5, 12), (2, 7)])
def test_repeats_show_n_over_r_examples_r_times_an_epoch_and_one_the_rest(repeats, n):
    positions = tf.range(4 * n, dtype=tf.int64)
    indices = stream.positions_to_indices(positions, n=n, seed=5, repeats=repeats).numpy().reshape(4, n)
    chosen = set()
    for epoch in indices:
        counts = np.bincount(epoch, minlength=n)
        rest = [n % repeats] if n % repeats else []
        assert sorted(counts[counts > 0].tolist()) == sorted([repeats] * (n // repeats) + rest)
        chosen.add(tuple(np.flatnonzero(counts)))
    assert len(chosen) > 1  # another part of the data in each epoch


def test_views_of_a_repeated_example_differ():
    batch = collect(1, config=everything_on(**{"augment.mixup": 0.0, "augment.cutmix": 0.0}), size=24)[0]
    np.testing.assert_array_equal(batch["label"][0:12:3], batch["label"][2:12:3])
    for first in range(0, 24, 3):
        assert len({image.tobytes() for image in batch["image"][first : first + 3]}) == 3


def test_examples_at_any_positions_are_those_of_the_stream():
    config = everything_on()
    whole = collect(2, config=config, size=24)
    got = stream.at(small_source(), config, [30, 3, 3, 47])
    for name in ("image", "label", "weight", "position"):
        np.testing.assert_array_equal(got[name], joined(whole, name)[[30, 3, 3, 47]])


def test_an_image_above_the_pixel_limit_gets_weight_zero():
    config = small_config()  # the pictures are 40 x 48 px
    for limit, weight in ((1920, 1.0), (1919, 0.0)):
        config.data.max_pixels = limit
        assert (collect(1, config=config)[0]["weight"] == weight).all()
        evaluated = next(stream.evaluation(small_source(), config, batch=N).as_numpy_iterator())
        assert (evaluated["weight"] == weight).all()


def test_image_of_a_position_is_the_augmentation_with_its_seed():
    source, config = small_source(), small_config()
    batch = collect(1, source, config)[0]
    for row, position in enumerate(batch["position"]):
        seed = augment.seed_of(config.seed, 1, position)
        image = decode.decode(source.read(np.array([batch["label"][row]]))[0][0])
        image = augment.resize_crop(image, seed, size=SIZE, margin=4)
        np.testing.assert_array_equal(batch["image"][row], augment.flip(image, seed, probability=0.5))


def test_the_same_example_looks_different_in_each_epoch():
    batches = collect(15)  # ten epochs
    images, labels = joined(batches, "image"), joined(batches, "label")
    assert len({image.tobytes() for image in images[labels == 3]}) >= 8


def test_another_seed_is_another_stream_and_another_model_seed_only_other_drops():
    first, config = collect(2), small_config()
    config.model.seed = 1
    got = collect(2, config=config)
    assert (joined(got, "drop") != joined(first, "drop")).any()
    np.testing.assert_array_equal(joined(got, "image"), joined(first, "image"))
    config.seed = 6
    assert (joined(collect(2, config=config), "label") != joined(first, "label")).any()


@pytest.mark.parametrize(
    ("bad", "crop"),
    [
        ((0,), "resize_crop"),
        (tuple(range(N)), "resize_crop"),
        ((1, 4, 7, 11), "resize_crop"),
        ((1, 4, 7, 11), "random_resized"),
    ],
)
def test_unreadable_images_keep_their_position_and_get_weight_zero(bad, crop):
    config = small_config()
    config.augment.crop = crop
    config.augment.scale = (1.0, 1.0)  # so that a crop reaches the rows that a truncated file lacks
    whole, batches = collect(3, config=config), collect(3, small_source(bad), config)
    labels = joined(batches, "label")
    lost = np.isin(labels, bad)
    for name in ("label", "position", "drop"):
        np.testing.assert_array_equal(joined(batches, name), joined(whole, name))
    np.testing.assert_array_equal(joined(batches, "weight"), (~lost).astype(np.float32))
    assert not joined(batches, "image")[lost].any()
    np.testing.assert_array_equal(joined(batches, "image")[~lost], joined(whole, "image")[~lost])


def test_branches_are_dropped_at_their_rates_and_independently():
    source = small_source(bad=range(N))  # no decoding: only the draws matter
    drop = joined(collect(250, source, rates=(0.0, 0.1, 0.1, 0.5)), "drop")
    assert drop.shape == (2000, 4) and set(np.unique(drop)) == {0.0, 1.0}
    kept = drop.mean(0)
    for got, expected in zip(kept, (1.0, 0.9, 0.9, 0.5)):
        assert abs(got - expected) <= 4 * (expected * (1 - expected) / 2000) ** 0.5
    assert abs(np.corrcoef(drop[:, 1], drop[:, 2])[0, 1]) < 0.09  # 4 / sqrt(2000)


def test_network_without_branches_gets_an_empty_drop():
    assert collect(1, rates=())[0]["drop"].shape == (BATCH, 0)


def test_stream_is_deterministic_and_not_sharded_by_tensorflow():
    dataset = stream.training(
        small_source(), small_config(), start_update=0, slice_start=0, slice_size=BATCH, drop_rates=()
    )
    assert dataset.options().experimental_distribute.auto_shard_policy == tf.data.experimental.AutoShardPolicy.OFF
    assert dataset.options().deterministic


def test_last_evaluation_batch_is_padded_with_weight_zero():
    batches = list(stream.evaluation(small_source(bad=[2]), small_config(), batch=5).as_numpy_iterator())
    assert [batch["image"].shape for batch in batches] == [(5, SIZE, SIZE, 3)] * 3
    np.testing.assert_array_equal(joined(batches, "position"), [*range(N), -1, -1, -1])
    np.testing.assert_array_equal(joined(batches, "label"), [*range(N), 0, 0, 0])
    np.testing.assert_array_equal(joined(batches, "weight"), [1, 1, 0] + [1] * 9 + [0] * 3)
    assert not joined(batches, "image")[[2, 12, 13, 14]].any()
    assert all(image.any() for image in joined(batches, "image")[3:12])


def test_evaluation_in_any_batch_size_gives_the_same_images():
    whole = next(stream.evaluation(small_source(), small_config(), batch=N).as_numpy_iterator())
    parts = list(stream.evaluation(small_source(), small_config(), batch=4).as_numpy_iterator())
    assert len(parts) == 3
    assert_equal({name: joined(parts, name) for name in whole}, whole)


def test_real_flowers_stream_and_resume(flowers_dir):
    config = base.get_config()
    config.data.data_dir, config.global_batch = str(flowers_dir), 64
    train = sources.open_source(config.data, "train[:90%]")
    held_out = sources.open_source(config.data, "train[90%:]")
    assert (len(train), len(held_out)) == (3303, 367)
    assert train.classes == ("dandelion", "daisy", "tulips", "sunflowers", "roses")
    whole = collect(2, train, config, size=64)
    assert_equal(collect(1, train, config, start=1, size=64)[0], whole[1])
    assert joined(whole, "weight").all()
    weights = joined(stream.evaluation(held_out, config, batch=64).as_numpy_iterator(), "weight")
    assert weights.sum() == 367 and len(weights) == 384


@pytest.mark.parametrize("fields", [{}, DEIT_III], ids=["deit", "deit-iii"])
def test_no_view_has_a_stateful_op_which_deterministic_tensorflow_would_run_one_at_a_time(fields):
    view = tf.function(views.training(everything_on(**fields)))
    graph = view.get_concrete_function(tf.TensorSpec([], tf.string), tf.TensorSpec([2], tf.int64)).graph
    functions = graph.as_graph_def().library.function
    ops = {op.type for op in graph.get_operations()} | {node.op for each in functions for node in each.node_def}
    assert "DecodeAndCropJpeg" in ops or "DecodeJpeg" in ops  # the search has found the branches
    assert not {name for name in ops if (known := op_def_registry.get(name)) and known.is_stateful}
