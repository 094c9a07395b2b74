"""Data sets: what is opened, in which order, and the one line for what cannot be."""

import os

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds
from sklearn import datasets

from configs import base
from deit import errors
from deit.data import sources, splits


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


@pytest.mark.parametrize("names", [("train", "val"), ("train", "validation"), ("train", "test")])
def test_any_name_of_a_split_folder_will_do(tmp_path, names):
    for name, count in zip(names, (6, 4)):
        fill(tmp_path / name, count=count)
    config = data_config(f"folder:{tmp_path}", train_split=names[0], eval_split=names[1])
    assert sources.sizes(config) == (12, 8, 2) and sources.split_names(config) == tuple(sorted(names))


def test_a_folder_without_splits_has_no_test_split_to_evaluate_training_images_on(tmp_path):
    fill(tmp_path)
    for split in ("test", "val[:10%]"):
        with pytest.raises(errors.UserError, match=r"unknown split.*there are train, all, .*train\[:90%\]"):
            sources.open_source(data_config(f"folder:{tmp_path}"), split)


def test_a_class_may_be_called_train(tmp_path):
    fill(tmp_path, classes=("bus", "train"))
    source = sources.open_source(data_config(f"folder:{tmp_path}"), "train[:90%]")
    assert source.classes == ("bus", "train") and len(source) == 18


def test_a_name_is_the_path_below_the_folder(tmp_path):
    fill(tmp_path / "train")
    source = sources.open_source(data_config(f"folder:{tmp_path}"), "train[20%:80%]")
    encoded, _ = everything(source)
    for index, data in enumerate(encoded):
        kind, number = data.decode().split("/")
        assert source.name(index).startswith(f"train/{kind}/0{number}.")


def test_a_file_name_that_is_no_text_can_be_printed(tmp_path):
    fill(tmp_path, classes=("a",), count=0)
    (tmp_path / "a" / os.fsdecode(b"ros\xe9.jpg")).write_bytes(b"x")
    source = sources.open_source(data_config(f"folder:{tmp_path}"), "all")
    assert source.name(0) == r"a/ros\xe9.jpg" and everything(source) == ([b"x"], [0])


def test_images_below_a_class_folder_count_and_the_order_is_by_parts_of_the_path(tmp_path):
    for name in ("a/b/2.jpg", "a/b.c/1.jpg", "a/a.jpg", "a/.hidden.jpg", "z/1.JPEG", ".cache/1.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    source = sources.open_source(data_config(f"folder:{tmp_path}"), "all")
    order = np.random.RandomState(0).permutation(4)
    expected = ["a/a.jpg", "a/b/2.jpg", "a/b.c/1.jpg", "z/1.JPEG"]  # by parts: "b" before "b.c"
    assert everything(source)[0] == [expected[i].encode() for i in order]


def test_another_split_seed_draws_another_slice_and_seed_0_the_same_as_ever(tmp_path):
    fill(tmp_path)
    listed = [f"{name}/{k}".encode() for name in "ab" for k in range(10)]
    found = {}
    for seed in (0, 1):
        config = data_config(f"folder:{tmp_path}", split_seed=seed)
        found[seed] = everything(sources.open_source(config, "all[:75%]"))[0]
        assert found[seed] == [listed[i] for i in np.random.RandomState(seed).permutation(20)[:15]]
    assert set(found[0]) != set(found[1])
    digits = [sources.open_source(data_config("digits", split_seed=s), "test[:50%]") for s in (0, 0, 1)]
    drawn = [{source.name(i) for i in range(len(source))} for source in digits]
    assert drawn[0] == drawn[1] != drawn[2]


def test_a_folder_is_listed_once(tmp_path, monkeypatch):
    fill(tmp_path, classes=tuple("abcdef"))
    listed, real = [], os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: listed.append(os.fspath(path)) or real(path))
    sources.open_source(data_config(f"folder:{tmp_path}"), "all")
    classes = [path for path in listed if path.rstrip(os.sep) != str(tmp_path)]
    assert sorted(classes) == [str(tmp_path / name) for name in "abcdef"]


def test_a_linked_class_folder_counts_and_a_linked_folder_inside_a_class_is_not_entered(tmp_path):
    fill(tmp_path / "elsewhere", classes=("b",), count=2)
    fill(tmp_path / "data", classes=("a",), count=3)
    (tmp_path / "data" / "b").symlink_to(tmp_path / "elsewhere" / "b")
    (tmp_path / "data" / "a" / "round").symlink_to(tmp_path / "data")
    source = sources.open_source(data_config(f"folder:{tmp_path / 'data'}"), "all")
    assert source.classes == ("a", "b") and sorted(everything(source)[1]) == [0, 0, 0, 1, 1]


def test_a_sum_of_splits_is_named_by_its_parts():
    assert splits.names("train[:90%]+test") == ["train", "test"]


def test_a_slice_ends_where_the_same_slice_of_a_tfds_set_does():
    for count, text in [(150, "7"), (3670, "90"), (1347, "10"), (450, "50"), (50, "29"), (199, "0.5"), (1000, "33.25")]:
        instruction = tfds.core.ReadInstruction.from_spec(f"train[:{text}%]")
        info = tfds.core.SplitInfo(name="train", shard_lengths=[count], num_bytes=0)
        (theirs,) = instruction.to_absolute({"train": info})
        _, keep = splits.parse(f"train[:{text}%]")
        assert len(splits.rows(count, keep, "train", seed=0)) == theirs.to, (count, text)
    _, keep = splits.parse("train[:7%]")
    assert len(splits.rows(150, keep, "train[:7%]", seed=0)) == 10  # round(150 * 0.07) is 11
    assert len(splits.rows(3670, (0.0, 90.0), "train[:90%]", seed=0)) == 3303


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


def test_a_digit_is_named_by_its_row_in_scikit_learns_set():
    source = sources.open_source(data_config("digits"), "test[10%:]")
    original = datasets.load_digits()
    encoded, labels = everything(source)
    for index in (0, 7, 100):
        row = int(source.name(index).removeprefix("digit "))
        expected = np.rint(original.images[row] * 255 / 16).astype(np.uint8)
        np.testing.assert_array_equal(tf.io.decode_png(encoded[index])[..., 0], expected)
        assert original.target[row] == labels[index]


def test_some_of_the_digits_are_those_examples_labelled_in_the_order_they_are_named():
    every = sources.open_source(data_config("digits"), "test")
    some = sources.open_source(data_config("digits:95"), "test")
    assert some.classes == ("9", "5")
    encoded, labels = every.read(np.arange(len(every)))
    wanted = [(every.name(i), encoded[i], {9: 0, 5: 1}[labels[i]]) for i in range(len(every)) if labels[i] in (9, 5)]
    encoded, labels = some.read(np.arange(len(some)))
    assert [(some.name(i), encoded[i], labels[i]) for i in range(len(some))] == wanted and len(wanted) > 60


def test_unknown_digits_split_names_those_that_exist():
    with pytest.raises(errors.UserError, match=r"'validation'.*test, train"):
        sources.open_source(data_config("digits"), "validation")


def test_unknown_kind_of_data_names_the_kinds():
    with pytest.raises(errors.UserError, match=r"data.name \('cifar'\) must be tfds:NAME, folder:PATH, .*digits:01234"):
        sources.open_source(data_config("cifar"), "train")


def test_the_names_of_the_classes_are_known_where_the_data_is_there_and_no_picture_is_listed_for_them(
    tmp_path, monkeypatch
):
    fill(tmp_path / "here")
    monkeypatch.setattr("os.walk", lambda *_, **__: pytest.fail("listed"))
    assert sources.classes(data_config("digits:95")) == ("9", "5")
    assert sources.classes(data_config(f"folder:{tmp_path / 'here'}", train_split="all")) == ("a", "b")
    assert sources.classes(data_config(f"folder:{tmp_path / 'absent'}")) is None
    assert sources.classes(data_config("tfds:tf_flowers", data_dir=str(tmp_path))) is None
