"""Prepared TFDS sets: which records in which order, what they are called, and the one line for what cannot be."""

import shutil

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds

from configs import base
from deit import errors
from deit.data import sources


def data_config(name: str, **fields):
    config = base.get_config().data
    config.name = name
    config.update(fields)
    return config


class TinyPictures(tfds.core.GeneratorBasedBuilder):
    """Eight PNG pictures of 2 x 3 px; the label is the picture's colour modulo 2."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {
            "image": tfds.features.Image(shape=(2, 3, 3)),
            "label": tfds.features.ClassLabel(names=["even", "odd"]),
        }
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(features), supervised_keys=("image", "label")
        )

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(range(8))}

    def _generate_examples(self, colours):
        for colour in colours:
            yield colour, {"image": np.full([2, 3, 3], colour, np.uint8), "label": colour % 2}


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


@pytest.mark.parametrize("lost", ["dataset_info.json", "tiny_pictures-train*"])
def test_incomplete_preparation_is_one_clear_line(prepared, tmp_path, lost):
    shutil.copytree(prepared["tfrecord"], tmp_path / "data")
    (path,) = (tmp_path / "data").rglob(lost)
    path.unlink()
    with pytest.raises(errors.UserError, match=r"tfds:tiny_pictures.*incomplete or damaged") as error:
        sources.open_source(data_config("tfds:tiny_pictures", data_dir=str(tmp_path / "data")), "train")
    assert "\n" not in str(error.value)
