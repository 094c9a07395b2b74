"""Prepared TFDS sets: which records in which order, what they are called, and the one line for what cannot be."""

import logging
import os
import resource

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds

from configs import base
from deit import errors
from deit.data import records, sources, stream, unreadable


def data_config(name: str, **fields):
    config = base.get_config().data
    config.name = name
    config.update(fields)
    return config


class TinyPictures(tfds.core.GeneratorBasedBuilder):
    """Eight PNG pictures of 2 x 3 px; the label is the picture's colour modulo 2."""

    VERSION = tfds.core.Version("1.0.0")
    FILE = None  # a feature for the name of the file, such as 5é.png

    def _info(self):
        features = {
            "image": tfds.features.Image(shape=(2, 3, 3)),
            "label": tfds.features.ClassLabel(names=["even", "odd"]),
        }
        if self.FILE:
            features[self.FILE] = tfds.features.Text()
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(features), supervised_keys=("image", "label")
        )

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(range(8))}

    def _generate_examples(self, colours):
        for colour in colours:
            named = {self.FILE: f"{colour}é.png"} if self.FILE else {}
            yield colour, {"image": np.full([2, 3, 3], colour, np.uint8), "label": colour % 2, **named}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folders = {}
    for kind in ("tfrecord", "array_record"):
        folders[kind] = tmp_path_factory.mktemp(kind)
        TinyPictures(data_dir=folders[kind], file_format=kind).download_and_prepare()
    return folders


def colours(source, indices) -> list[tuple[int, int]]:
    encoded, labels = source.read(np.asarray(indices))
    return [(int(tf.io.decode_png(data)[0, 0, 0]), int(label)) for data, label in zip(encoded, labels)]


@pytest.mark.parametrize("kind", ["tfrecord", "array_record"])
def test_prepared_data_is_read_by_index_in_tfds_own_order(prepared, kind):
    config = data_config(
        "tfds:tiny_pictures",
        data_dir=str(prepared[kind]),
        train_split="train[:75%]",
        eval_split="train[75%:]",
    )
    assert sources.sizes(config) == (6, 2, 2)
    builder = tfds.builder("tiny_pictures", data_dir=str(prepared["tfrecord"]))
    expected = [
        (int(record["image"][0, 0, 0]), int(record["label"]))
        for record in builder.as_dataset("train", shuffle_files=False).as_numpy_iterator()
    ]
    train, held_out = (sources.open_source(config, s) for s in (config.train_split, config.eval_split))
    assert train.classes == ("even", "odd")
    assert colours(train, range(6)) + colours(held_out, range(2)) == expected
    assert colours(train, [4, 0, 4]) == [expected[4], expected[0], expected[4]]


@pytest.mark.parametrize("split", ["test", "train[5%", "train[:0%]"])
def test_unknown_tfds_split_is_refused_with_the_splits_that_exist(prepared, split):
    config = data_config("tfds:tiny_pictures", data_dir=str(prepared["tfrecord"]))
    with pytest.raises(errors.UserError, match="train"):
        sources.open_source(config, split)


def test_tfrecord_data_above_the_memory_limit_names_size_field_and_the_command_that_converts_it(prepared):
    config = data_config("tfds:tiny_pictures", data_dir=str(prepared["tfrecord"]), max_ram_bytes=200)
    whole = tfds.builder("tiny_pictures", data_dir=str(prepared["tfrecord"])).info.splits["train"].num_bytes
    with pytest.raises(errors.UserError) as error:
        sources.open_source(config, "train[:50%]")
    line = str(error.value)
    assert f"{round(whole / 2):,} bytes" in line and "data.max_ram_bytes (200)" in line and "\n" not in line
    assert "python tools/prepare_data.py convert --config.data.name=tfds:tiny_pictures --out=DIR" in line
    assert f"--config.data.data_dir={prepared['tfrecord']}" in line
    with config.unlocked():
        config.max_ram_bytes = round(whole / 2)  # at the limit it is read
    assert len(sources.open_source(config, "train[:50%]")) == 4


def test_array_record_data_has_no_memory_limit(prepared):
    config = data_config("tfds:tiny_pictures", data_dir=str(prepared["array_record"]), max_ram_bytes=1)
    assert len(sources.open_source(config, "train")) == 8


@pytest.mark.parametrize("kind", ["tfrecord", "array_record"])
def test_a_record_is_named_by_its_number_in_the_split_that_was_asked_for(prepared, kind):
    config = data_config("tfds:tiny_pictures", data_dir=str(prepared[kind]))
    source = sources.open_source(config, "train[25%:]")
    assert source.name(3) == "tiny_pictures train[25%:] record 3"
    assert sources.split_names(config) == ("train",)


@pytest.mark.parametrize("kind", ["tfrecord", "array_record"])
@pytest.mark.parametrize("feature", ["file_name", "image/filename"])
def test_a_record_is_called_by_the_file_it_was_where_the_set_keeps_that(tmp_path, monkeypatch, kind, feature):
    monkeypatch.setattr(TinyPictures, "FILE", feature)
    TinyPictures(data_dir=tmp_path, file_format=kind).download_and_prepare()
    config = data_config("tfds:tiny_pictures", data_dir=str(tmp_path))
    scan, source = sources.open_scan(config, "train[25%:]"), sources.open_source(config, "train[25%:]")
    numbers = [f"tiny_pictures train[25%:] record {i}" for i in range(6)]
    for one in (scan, source):
        of_scan = list(scan.scan())  # what a tfrecord file holds is known once it has passed
        files = [f"{int(tf.io.decode_png(image)[0, 0, 0])}é.png" for image, _ in of_scan]
        assert len(set(files)) == 6
        assert [one.name(i) for i in range(6)] == [f"{number} ({file})" for number, file in zip(numbers, files)]
    assert [scan.file_name(i) for i in range(6)] == files  # what a copy keeps


@pytest.mark.parametrize("kind", ["tfrecord", "array_record"])
def test_one_pass_in_order_needs_no_memory_for_the_split(prepared, kind):
    config = data_config("tfds:tiny_pictures", data_dir=str(prepared[kind]), max_ram_bytes=1)
    scan = sources.open_scan(config, "train[25%:]")
    with config.unlocked():
        config.max_ram_bytes = 10**9
    encoded, labels = sources.open_source(config, "train[25%:]").read(np.arange(6))
    assert list(scan.scan()) == list(zip(encoded, labels.tolist()))
    assert len(scan) == 6 and scan.classes == ("even", "odd")


def test_a_split_without_labels_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(
        TinyPictures,
        "_generate_examples",
        lambda self, colours: ((c, {"image": np.zeros([2, 3, 3], np.uint8), "label": -1}) for c in colours),
    )
    for kind in ("tfrecord", "array_record"):
        TinyPictures(data_dir=tmp_path / kind, file_format=kind).download_and_prepare()
        with pytest.raises(errors.UserError, match=r"tfds:tiny_pictures.*split train has examples without a label"):
            sources.open_source(data_config("tfds:tiny_pictures", data_dir=str(tmp_path / kind)), "train")


def test_what_is_not_prepared_yet_is_prepared_for_random_access(tmp_path):
    config = data_config("tfds:tiny_pictures", data_dir=str(tmp_path), max_ram_bytes=1)
    assert sources.sizes(config) is None
    assert len(sources.open_source(config, "train")) == 8
    assert list((tmp_path / "tiny_pictures" / "1.0.0").glob("*.array_record-*"))


def test_files_that_must_be_fetched_by_hand_are_answered_with_the_command_that_takes_them(tmp_path):
    config = data_config("tfds:imagenet2012", data_dir=str(tmp_path))
    with pytest.raises(errors.UserError, match=r"prepare_data.py prepare --config.data.name=tfds:imagenet2012 --man"):
        sources.open_source(config, "train")


def test_a_misspelt_name_with_manual_in_it_is_not_told_to_fetch_files_by_hand(tmp_path):
    with pytest.raises(errors.UserError, match="manual_flowrs not found") as error:
        sources.open_source(data_config("tfds:manual_flowrs", data_dir=str(tmp_path)), "train")
    assert "--manual_dir" not in str(error.value)


def test_what_is_only_looked_at_is_never_downloaded_and_the_command_that_does_is_named(tmp_path):
    config = data_config("tfds:tiny_pictures", data_dir=str(tmp_path))
    with pytest.raises(errors.UserError, match="not prepared in") as error:
        sources.open_scan(config, "train")
    command = f"prepare_data.py prepare --config.data.name=tfds:tiny_pictures --config.data.data_dir={tmp_path}"
    assert command in str(error.value) and not list(tmp_path.iterdir())


def test_absent_tfds_data_names_the_three_ways_on(tmp_path, monkeypatch):
    def no_network(*_, **__):
        raise ConnectionError("Failed to resolve the server\nTraceback and more")

    monkeypatch.setattr(tfds.core.DatasetBuilder, "download_and_prepare", no_network)
    config = data_config("tfds:tf_flowers", data_dir=str(tmp_path))
    assert sources.sizes(config) is None
    with pytest.raises(errors.UserError) as error:
        sources.open_source(config, "train[:90%]")
    line = str(error.value)
    assert "\n" not in line and "Failed to resolve the server" in line
    assert all(way in line for way in ("--config.data.data_dir=", "folder:PATH", "make quickstart"))


def cut(path) -> None:
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize("kind", ["tfrecord", "array_record"])
@pytest.mark.parametrize("damage", [os.remove, cut])
@pytest.mark.parametrize("lost", ["dataset_info.json", "tiny_pictures-train*-00001-of-00002"])
def test_incomplete_preparation_is_one_clear_line(tmp_path, kind, damage, lost):
    two_files = tfds.download.DownloadConfig(num_shards=2)
    TinyPictures(data_dir=tmp_path, file_format=kind).download_and_prepare(download_config=two_files)
    (path,) = tmp_path.rglob(lost)
    damage(path)
    config = data_config("tfds:tiny_pictures", data_dir=str(tmp_path))
    with pytest.raises(errors.UserError, match=r"tfds:tiny_pictures.*incomplete or damaged") as error:
        sources.open_source(config, "train")
    line = str(error.value)
    assert "\n" not in line and f"in {tmp_path} is" in line
    if lost.startswith("tiny"):
        assert kind == "tfrecord" or path.name in line
        assert len(sources.open_source(config, "train[:50%]")) == 4  # which lies in the other file


@pytest.fixture
def noisy(tmp_path):
    """Write 60 noisy PNG pictures as array_record and zero 3,000 bytes of records 20 to 22; return config and bytes."""
    noise = np.random.RandomState(0)
    pngs = [tf.io.encode_png(noise.randint(0, 256, [24, 24, 3], np.uint8)).numpy() for _ in range(60)]
    source = sources.InMemory(pngs, np.arange(60) % 2, classes=["a", "b"], name="{}.png".format)
    records.write({"train": source}, out=str(tmp_path), name="noisy", skip={}, advance=lambda: None)
    (path,) = tmp_path.rglob("noisy-train*")
    data = path.read_bytes()
    first, last = data.index(pngs[20]) + 1000, data.index(pngs[22])
    assert last - first < 3000 < last + len(pngs[22]) - first  # from within record 20 to within record 22
    path.write_bytes(data[:first] + bytes(3000) + data[first + 3000 :])
    return data_config("tfds:noisy", data_dir=str(tmp_path)), pngs


def test_damaged_records_have_no_bytes_and_label_0_and_all_others_are_read(noisy):
    config, pngs = noisy
    expected = [(b"", 0) if i in (20, 21, 22) else (pngs[i], i % 2) for i in range(60)]
    source = sources.open_source(config, "train")
    for rows in (np.arange(60), np.array([21, 3, 59, 22, 3]), np.array([21]), np.array([], np.int64)):
        encoded, labels = source.raw(rows)
        assert list(zip(encoded, labels.tolist())) == [expected[i] for i in rows] and labels.dtype == np.int32
    assert list(sources.open_scan(config, "train").scan()) == expected
    assert source.name(19) == "noisy train record 19 (19.png)" and source.name(21) == "noisy train record 21"


def test_a_split_may_begin_with_a_damaged_record(noisy):
    assert sources.open_source(noisy[0], "train[21:30]").raw(np.arange(3))[0] == [b"", b"", noisy[1][23]]


def test_training_goes_on_over_damaged_records_with_weight_0_and_names_them(noisy, caplog):
    config = base.get_config()
    config.data, config.global_batch, config.data.image_size = noisy[0], 12, 16
    source = sources.open_source(noisy[0], "train")
    dataset = stream.training(source, config, start_update=0, slice_start=0, slice_size=12, drop_rates=[0.1])
    batches = list(dataset.take(10).as_numpy_iterator())  # two epochs
    positions, weights, labels = (np.concatenate([b[k] for b in batches]) for k in ("position", "weight", "label"))
    rows = stream.indices_at(source, config, positions)
    bad = np.isin(rows, [20, 21, 22])
    assert positions.tolist() == list(range(120)) and bad.sum() == 6
    np.testing.assert_array_equal(weights, np.where(bad, 0, 1))
    np.testing.assert_array_equal(labels, np.where(bad, 0, rows % 2))
    assert not np.concatenate([batch["image"] for batch in batches])[bad].any()
    with caplog.at_level(logging.WARNING):
        unreadable.Unreadable(source, config).note([positions], [weights])
    met = sorted(record.getMessage() for record in caplog.records)
    assert [line.split(":")[0] for line in met] == [
        f"image noisy train record {i} gets weight 0" for i in (20, 21, 22)
    ] and all("it can't be read" in line for line in met)


def test_a_file_that_is_cut_short_while_it_is_read_costs_its_records(noisy):
    config, pngs = noisy
    source = sources.open_source(config, "train")
    assert source.raw(np.array([40]))[0] == [pngs[40]]
    (path,) = (p for p in os.scandir(f"{config.data_dir}/noisy/1.0.0") if "array_record" in p.name)
    os.truncate(path, 5000)
    encoded, labels = source.raw(np.array([40, 41]))
    assert encoded == [b"", b""] and labels.tolist() == [0, 0] and source.name(41) == "noisy train record 41"


def test_a_set_of_more_files_than_may_be_open_is_read_all_the_same(tmp_path):
    eight_files = tfds.download.DownloadConfig(num_shards=8)
    TinyPictures(data_dir=tmp_path, file_format="array_record").download_and_prepare(download_config=eight_files)
    config = data_config("tfds:tiny_pictures", data_dir=str(tmp_path))
    sources.open_source(config, "train[:1]")  # whatever this opens for the first time is open then
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken = set(map(int, os.listdir("/proc/self/fd")))
    four_more = [number for number in range(soft) if number not in taken][4]
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (four_more, hard))
        assert len(colours(sources.open_source(config, "train"), range(8))) == 8
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
