"""Data sets: what is opened, in which order, and the one line for what cannot be."""

import os
import shutil

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds
from sklearn import datasets

from configs import base
from deit import errors
from deit.data import sources


def data_config(name: str, **fields):
    config = base.get_config().data
    config.name = name
    config.update(fields)
    return config


def everything(source) -> tuple[list[bytes], list[int]]:
    encoded, labels = source.read(np.arange(len(source)))
    assert labels.dtype == np.int32
    return encoded, labels.tolist()


# --- folder:PATH ----------------------------------------------------------------------------------


def fill(root, classes=("b", "a"), count=10) -> None:
    """Write `count` files a class; a file's content is its own path, which is all that a source looks at."""
    for name in classes:
        (root / name).mkdir(parents=True)
        for k in range(count):
            (root / name / f"{k:02d}.{('jpg', 'PNG', 'bmp', 'gif')[k % 4]}").write_text(f"{name}/{k}")
        (root / name / "notes.txt").write_text("no image")


def test_folder_has_a_class_per_folder_in_sorted_order(tmp_path):
    fill(tmp_path)
    source = sources.open_source(data_config(f"folder:{tmp_path}"), "all")
    encoded, labels = everything(source)
    assert source.classes == ("a", "b") and len(source) == 20
    assert [data.decode()[0] for data in encoded] == ["ab"[label] for label in labels]
    assert len(set(encoded)) == 20


def test_folder_slices_are_disjoint_complete_and_mixed(tmp_path):
    fill(tmp_path)
    config = data_config(f"folder:{tmp_path}")
    train, held_out = (everything(sources.open_source(config, s)) for s in ("all[:75%]", "all[75%:]"))
    assert (len(train[0]), len(held_out[0])) == (15, 5)
    assert len(set(train[0]) | set(held_out[0])) == 20
    assert set(train[1]) == set(held_out[1]) == {0, 1}  # without the permutation the tail would be one class


def test_folder_split_is_a_sub_folder_where_there_is_one(tmp_path):
    fill(tmp_path / "train")
    fill(tmp_path / "val", count=3)
    config = data_config(f"folder:{tmp_path}", train_split="train", eval_split="val")
    assert len(sources.open_source(config, "train")) == 20
    assert len(sources.open_source(config, "train[50%:]")) == 10
    assert sources.sizes(config) == (20, 6, 2)
    with pytest.raises(errors.UserError, match=r"'trian'.*train, val"):
        sources.open_source(config, "trian")


def test_file_that_vanishes_is_read_as_no_bytes(tmp_path):
    fill(tmp_path)
    source = sources.open_source(data_config(f"folder:{tmp_path}"), "all")
    before, labels = everything(source)
    (tmp_path / "a" / "00.jpg").unlink()
    after, labels_after = everything(source)
    assert labels_after == labels
    assert after == [b"" if data == b"a/0" else data for data in before]


@pytest.mark.parametrize(
    "make", [lambda path: None, lambda path: path.mkdir(), lambda path: (path / "a").mkdir(parents=True)]
)
def test_folder_without_images_is_one_clear_line(tmp_path, make):
    make(tmp_path / "data")
    with pytest.raises(errors.UserError, match="data") as error:
        sources.open_source(data_config(f"folder:{tmp_path / 'data'}"), "train")
    assert "\n" not in str(error.value)


def test_folder_that_may_not_be_read_is_one_line_with_its_path(tmp_path, monkeypatch):
    fill(tmp_path)
    real = os.scandir

    def scandir(path):  # chmod does not stop root
        if os.path.basename(path) == "b":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    config = data_config(f"folder:{tmp_path}")
    for call in (lambda: sources.open_source(config, "all"), lambda: sources.sizes(config)):
        with pytest.raises(errors.UserError, match=rf"^data.name .*{tmp_path}/b can't be read: Permission denied$"):
            call()
    config = data_config(f"folder:{tmp_path / ('x' * 300)}")
    for call in (lambda: sources.open_source(config, "all"), lambda: sources.sizes(config)):
        with pytest.raises(errors.UserError, match=r"^data.name .*x can't be read: File name too long$"):
            call()


def test_sizes_of_an_absent_folder_are_unknown(tmp_path):
    assert sources.sizes(data_config(f"folder:{tmp_path / 'absent'}")) is None


@pytest.mark.parametrize("split", ["", "all[", "all[90%:10%]", "all[:101%]", "all[5]", "all[0%:1%]"])
def test_wrong_or_empty_slices_are_refused_by_name(tmp_path, split):
    fill(tmp_path)
    with pytest.raises(errors.UserError, match="split"):
        sources.open_source(data_config(f"folder:{tmp_path}"), split)


def test_splits_with_other_classes_are_refused(tmp_path):
    fill(tmp_path / "train", classes=("a", "b", "c"))
    fill(tmp_path / "val", classes=("a", "b", "d"))
    config = data_config(f"folder:{tmp_path}")
    train, held_out = (sources.open_source(config, split) for split in ("train", "val"))
    sources.check_classes(train, train)
    with pytest.raises(errors.UserError, match="only in training c, only in evaluation d"):
        sources.check_classes(train, held_out)


# --- digits ---------------------------------------------------------------------------------------


def test_digits_are_scikit_learns_split_in_three_quarters_and_one():
    config = data_config("digits", train_split="train", eval_split="test")
    assert sources.sizes(config) == (1347, 450, 10)
    original = datasets.load_digits()
    expected = sorted(
        (label, np.rint(image * 255 / 16).astype(np.uint8).tobytes())
        for image, label in zip(original.images, original.target)
    )
    found = []
    for split in ("train", "test"):
        source = sources.open_source(config, split)
        assert source.classes == tuple("0123456789")
        for data, label in zip(*everything(source)):
            pixels = tf.io.decode_png(data).numpy()
            assert pixels.shape == (8, 8, 3)
            found.append((label, pixels[..., 1].tobytes()))
    assert sorted(found) == expected


def test_unknown_digits_split_names_those_that_exist():
    with pytest.raises(errors.UserError, match=r"'validation'.*test, train"):
        sources.open_source(data_config("digits"), "validation")


def test_unknown_kind_of_data_names_the_kinds():
    with pytest.raises(errors.UserError, match=r"tfds:NAME, folder:PATH, digits"):
        sources.open_source(data_config("cifar"), "train")


# --- tfds:NAME ------------------------------------------------------------------------------------


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


def test_tfrecord_data_above_the_memory_limit_names_the_command_that_prepares_it_otherwise(prepared, monkeypatch):
    monkeypatch.setattr(sources, "MEMORY_LIMIT", 100)
    with pytest.raises(errors.UserError, match=r"tiny_pictures.*file_format='array_record'.*download_and_prepare"):
        sources.open_source(data_config("tfds:tiny_pictures", data_dir=str(prepared["tfrecord"])), "train")
    assert (
        len(sources.open_source(data_config("tfds:tiny_pictures", data_dir=str(prepared["array_record"])), "train"))
        == 8
    )


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
