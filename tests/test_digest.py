"""The content digest: worked out by hand, the same in every form of the data, stored only as long as it is true."""

import hashlib
import json
import os
import re
import shlex
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds

from configs import base
from deit import errors
from deit.data import digest, folder_source, records, sources

ROOT = Path(__file__).resolve().parents[1]
SPLITS = ("train[:75%]", "train[75%:]")


def data_config(name: str, **fields):
    config = base.get_config().data
    config.name, config.train_split, config.eval_split = name, *SPLITS
    config.update(fields)
    return config


def content(number: int) -> bytes:
    """Return bytes that no decoder has to like: a digest looks at none of them."""
    return np.random.RandomState(number).bytes(50 + 40 * number)


@pytest.fixture
def folder(tmp_path) -> Path:
    """Twelve files in two classes, `a` with 7 and `b` with 5."""
    root = tmp_path / "pictures"
    for number in range(12):
        path = root / ("a" if number < 7 else "b") / f"{number:02d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content(number))
    return root


@pytest.fixture
def config(folder):
    return data_config(f"folder:{folder}")


def computed(config, split: str = SPLITS[0]) -> str:
    return digest.of(sources.open_source(config, split), config, split)


def taken(config, split: str = SPLITS[0]) -> str:
    return digest.of_split(sources.open_source(config, split), config, split)


def by_hand(examples, classes) -> str:
    """The rule of digest.of once more: `examples` are (bytes, label)."""
    each = [hashlib.sha256(struct.pack("<i", label) + data).digest() for data, label in examples]
    return hashlib.sha256(json.dumps([len(each), list(classes)]).encode() + b"".join(each)).hexdigest()


# --- what it is -------------------------------------------------------------------------------------


def test_it_is_the_sha256_of_number_classes_and_the_sha256_of_every_label_and_file(config):
    order = np.random.RandomState(0).permutation(12)  # of the sorted files; the first nine are train[:75%]
    examples = [(content(i), int(i >= 7)) for i in order]
    assert computed(config) == by_hand(examples[:9], "ab")
    assert computed(config, SPLITS[1]) == by_hand(examples[9:], "ab")


def test_the_digest_of_one_example_is_what_sha256sum_gives():
    # printf '[1, ["a"]]' > x; printf '\5\0\0\0\377' | sha256sum | xxd -r -p >> x; sha256sum x
    source = sources.InMemory([b"\xff"], [5], classes=["a"])
    expected = "9271de2a4f75b879eca6af4172753ff08bf49aa51f8c2941e892d86764fac5ce"
    assert digest.of(source, None, "", advance=lambda _: None) == expected


class Stored(tfds.core.GeneratorBasedBuilder):
    """The bytes of a source as they are, in its order."""

    VERSION = tfds.core.Version("1.0.0")
    source = None

    def _info(self):
        features = {"image": tfds.features.Image(), "label": tfds.features.ClassLabel(names=list("ab"))}
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(features), disable_shuffling=True
        )

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for index, (data, label) in enumerate(self.source.scan()):
            yield index, {"image": data, "label": label}


@pytest.fixture
def prepared(config, tmp_path, monkeypatch) -> dict:
    """The folder's split `train` as both kinds of TFDS files: their data configurations."""
    source = sources.open_scan(config, "train")
    records.write({"train": source}, out=str(tmp_path / "arrays"), name="stored", skip={}, advance=lambda: None)
    monkeypatch.setattr(Stored, "source", source)
    Stored(data_dir=tmp_path / "tfrecords", file_format="tfrecord").download_and_prepare()
    return {kind: data_config("tfds:stored", data_dir=str(tmp_path / kind)) for kind in ("arrays", "tfrecords")}


def test_the_same_examples_have_the_same_digest_as_folder_tfrecord_and_array_record(config, prepared):
    for split in SPLITS:
        expected = computed(config, split)
        for other in prepared.values():
            assert computed(other, split) == expected
            assert digest.of(sources.open_scan(other, split), other, split) == expected


def test_every_byte_label_class_name_and_the_order_count():
    def of(encoded=(b"ab", b"c"), labels=(0, 1), classes=("x", "y")):
        return digest.of(sources.InMemory(list(encoded), labels, classes=classes), None, "", advance=lambda _: None)

    others = [
        of(encoded=(b"ab", b"d")), of(encoded=(b"a", b"bc")), of(encoded=(b"c", b"ab")), of(encoded=(b"abc", b"")),
        of(labels=(1, 0)), of(labels=(0, 0)), of(labels=(0, 257)), of(classes=("y", "x")), of(classes=("xy",)),
        of(classes=("x", "y", "")), of(encoded=(b"ab",), labels=(0,)), of(encoded=(b"ab", b"c", b""), labels=(0, 1, 0)),
    ]  # fmt: skip
    assert of() == of() and len({of(), *others}) == 1 + len(others)


def test_it_does_not_depend_on_how_many_are_read_at_once(monkeypatch):
    rng = np.random.RandomState(0)
    examples = [(rng.bytes(rng.randint(200)), int(rng.randint(9))) for _ in range(1000)]
    source = sources.InMemory([data for data, _ in examples], [k for _, k in examples], classes="abcdefghi")
    for chunk in (1, 7, 256, 5000):
        monkeypatch.setattr(digest, "_CHUNK", chunk)
        ticks = []
        assert digest.of(source, None, "", advance=ticks.append) == by_hand(examples, "abcdefghi")
        assert sum(ticks) == 1000


def test_what_is_transcoded_for_tensorflow_counts_as_it_is_stored():
    webp = b"RIFF\x1a\x00\x00\x00WEBPVP8L" + bytes(14)  # no picture: read() makes b"" of it
    source = sources.InMemory([webp], [0], classes=["a"], max_pixels=100)
    assert source.read(np.arange(1))[0] != [webp]
    assert digest.of(source, None, "", advance=lambda _: None) == by_hand([(webp, 0)], "a")


def test_a_file_that_has_gone_counts_as_no_bytes_and_keeps_its_label(config, folder):
    source = sources.open_source(config, "train")
    before = digest.of(source, config, "train")
    (folder / "b" / "08.jpg").unlink()
    order = np.random.RandomState(0).permutation(12)
    expected = by_hand([(b"" if i == 8 else content(i), int(i >= 7)) for i in order], "ab")
    assert digest.of(source, config, "train") == expected != before


# --- the stored one -----------------------------------------------------------------------------------


def unread(config, monkeypatch, split: str = SPLITS[0]):
    """Return a source whose files may not be opened."""
    source = sources.open_source(config, split)
    monkeypatch.setattr(type(source), "raw", lambda *_: pytest.fail("the data was read"))
    return source


def test_a_stored_digest_is_taken_without_reading_the_data(config, folder, monkeypatch):
    expected = computed(config)
    value, path = digest.store(config, SPLITS[0])
    assert (value, path) == (expected, folder / ".deit-digest.json")
    assert digest.of_split(unread(config, monkeypatch), config, SPLITS[0]) == expected


def test_one_of_prepared_data_lies_in_its_directory_and_the_data_opens_as_before(prepared, tmp_path, monkeypatch):
    for kind, other in prepared.items():
        expected = computed(other)
        value, path = digest.store(other, SPLITS[0])
        assert (value, path) == (expected, tmp_path / kind / "stored" / "1.0.0" / "deit-digest.json")
        assert sources.sizes(other) == (9, 3, 2) and taken(other) == expected
    with monkeypatch.context() as patch:
        source = unread(prepared["arrays"], patch)
        assert digest.of_split(source, prepared["arrays"], SPLITS[0]) == expected


def test_splits_and_seeds_are_kept_side_by_side(config, folder):
    other_seed = data_config(config.name, split_seed=3)
    expected = [computed(config), computed(config, SPLITS[1]), computed(other_seed)]
    for each, split in ((config, SPLITS[0]), (config, SPLITS[1]), (other_seed, SPLITS[0])):
        digest.store(each, split)
    entries = json.loads((folder / ".deit-digest.json").read_text())["splits"]
    assert list(entries) == [f"{SPLITS[0]} split_seed=0", f"{SPLITS[1]} split_seed=0", f"{SPLITS[0]} split_seed=3"]
    assert [entry["digest"] for entry in entries.values()] == expected
    assert [entry["examples"] for entry in entries.values()] == [9, 3, 9]


def rewrite(folder):
    (folder / "a" / "00.jpg").write_bytes(content(0)[:-1] + b"!")  # as long as before


def rename(folder):
    (folder / "a").rename(folder / "c")  # now behind b


def add(folder):
    (folder / "a" / "more.jpg").write_bytes(b"more")


def empty_class(folder):
    (folder / "none").mkdir()


def other_time(folder):
    os.utime(folder / "a" / "00.jpg", ns=(1, 1))


@pytest.mark.parametrize("change", [rewrite, rename, add, empty_class, other_time])
def test_data_that_has_changed_since_is_read_again_and_above_the_limit_refused(change, config, folder, monkeypatch):
    before, _ = digest.store(config, "train")
    change(folder)
    assert taken(config, "train") == computed(config, "train")
    assert (computed(config, "train") == before) == (change is other_time)
    monkeypatch.setattr(digest, "LIMIT", 11)
    with pytest.raises(
        errors.UserError, match=r"has changed since .*prepare_data.py digest --config.data.name=folder:"
    ):
        taken(config, "train")
    digest.store(config, "train")
    assert taken(config, "train") == computed(config, "train")


def test_prepared_files_that_have_changed_since_are_noticed(prepared, monkeypatch):
    monkeypatch.setattr(digest, "LIMIT", 8)
    for other in prepared.values():
        expected, path = digest.store(other, SPLITS[0])
        for name in sorted(os.listdir(path.parent)):
            assert taken(other) == expected
            if "label" not in name and name != path.name:
                before = os.stat(path.parent / name)
                os.utime(path.parent / name, ns=(1, 1))
                with pytest.raises(errors.UserError, match="has changed since"):
                    taken(other)
                os.utime(path.parent / name, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_without_a_stored_one_a_small_split_is_read_and_a_large_one_names_the_command(config, folder, monkeypatch):
    monkeypatch.setattr(digest, "LIMIT", 9)
    assert taken(config) == computed(config)
    assert not (folder / ".deit-digest.json").exists()  # training writes nothing beside the data
    monkeypatch.setattr(digest, "LIMIT", 8)
    with pytest.raises(errors.UserError) as error:
        taken(config)
    line = str(error.value)
    assert line.startswith(f"data.name (folder:{folder}) split {SPLITS[0]} has 9 examples, more than 8")
    assert f"python tools/prepare_data.py digest --config.data.name=folder:{folder}" in line and "\n" not in line


def test_the_command_that_is_named_is_the_one_that_helps(tmp_path, folder, monkeypatch):
    folder.rename(tmp_path / "my pictures")
    config = data_config(f"folder:{tmp_path / 'my pictures'}", split_seed=2, eval_split="train[50%:]")
    monkeypatch.setattr(digest, "LIMIT", 1)
    with pytest.raises(errors.UserError) as error:
        taken(config)
    words = shlex.split(re.search(r"python tools/prepare_data.py .*", str(error.value))[0])
    out, _ = run(*words[2:])
    assert taken(config) == computed(config) and taken(config, "train[50%:]") == computed(config, "train[50%:]")
    assert f"{SPLITS[0]}: {computed(config)}" in out and f"train[50%:]: {computed(config, 'train[50%:]')}" in out
    assert str(tmp_path / "my pictures" / ".deit-digest.json") in out


def test_the_command_for_prepared_data_names_its_directory(prepared, monkeypatch):
    monkeypatch.setattr(digest, "LIMIT", 1)
    for other in prepared.values():
        with pytest.raises(errors.UserError, match=f"--config.data.name=tfds:stored .*data_dir={other.data_dir}"):
            taken(other)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        '{"version": 1}',
        '{"version": 2, "splits": {"KEY": ENTRY}}',
        '{"version": 1, "splits": []}',
        '{"version": 1, "splits": {"KEY": 3}}',
        '{"version": 1, "splits": {"KEY": {"digest": "12", "files": "FILES"}}}',
    ],
)
def test_a_damaged_file_of_digests_counts_as_none_and_is_replaced(text, config, folder):
    _, path = digest.store(config, SPLITS[0])
    ((key, entry),) = json.loads(path.read_text())["splits"].items()
    wrong = json.dumps({**entry, "digest": "0" * 64})
    path.write_text(text.replace("KEY", key).replace("FILES", entry["files"]).replace("ENTRY", wrong))
    assert taken(config) == computed(config)
    digest.store(config, SPLITS[0])
    assert json.loads(path.read_text())["splits"] == {key: entry}


def test_a_write_that_fails_leaves_the_file_as_it_was_and_nothing_beside_it(config, folder, monkeypatch):
    _, path = digest.store(config, SPLITS[0])
    before = path.read_text()
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(errors.UserError, match=r"deit-digest.json can't be written: No space left on device"):
        digest.store(config, SPLITS[1])
    assert path.read_text() == before and sorted(p.name for p in folder.iterdir()) == [path.name, "a", "b"]


def test_a_directory_that_may_not_be_written_to_is_refused_before_anything_is_read(config, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)  # chmod does not stop root
    unread(config, monkeypatch)
    with pytest.raises(errors.UserError, match=rf"^data.name \({config.name}\): .*may not be written to"):
        digest.store(config, SPLITS[0])


def test_what_cannot_be_read_right_now_is_not_stored_as_if_it_were_the_data(config, folder, monkeypatch):
    (folder / "a" / "00.jpg").write_bytes(b"")  # an empty file is what it is
    digest.store(config, "train")
    real = folder_source._bytes_or_nothing
    monkeypatch.setattr(folder_source, "_bytes_or_nothing", lambda path: b"" if "03.jpg" in path else real(path))
    for take in (digest.store, taken):
        with pytest.raises(errors.UserError, match=r"a/03.jpg can't be read"):
            take(config, "all")
    assert len(json.loads((folder / ".deit-digest.json").read_text())["splits"]) == 1


def test_data_that_changes_while_it_is_read_is_not_stored(config, folder, monkeypatch):
    def meanwhile(chunk, real=digest._digests):
        rewrite(folder)
        return real(chunk)

    monkeypatch.setattr(digest, "_digests", meanwhile)
    with pytest.raises(errors.UserError, match="changed while it was read"):
        digest.store(config, "train")
    assert not (folder / ".deit-digest.json").exists()


def test_digits_are_computed_and_need_no_file():
    config = data_config("digits", train_split="train", eval_split="test")
    assert digest.store(config, "test") == (taken(config, "test"), None)
    source = sources.open_source(config, "test")
    assert taken(config, "test") == by_hand(source.scan(), map(str, range(10)))


# --- tools/prepare_data.py digest -----------------------------------------------------------------------


def run(*arguments, code=0):
    """Run the tool; return (stdout, stderr) once its exit code is right."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "prepare_data.py"), *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": ""}, capture_output=True, text=True, timeout=240, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout, done.stderr


def test_the_tool_stores_a_split_that_is_both_once(config, folder):
    out, _ = run("digest", f"--config.data.name=folder:{folder}", "--config.data.train_split=train",
                 "--config.data.eval_split=train")  # fmt: skip
    assert out.splitlines() == [f"train: {computed(config, 'train')}", f"in {folder / '.deit-digest.json'}"]


def test_the_tool_says_in_one_line_where_it_cannot_write(folder):
    (folder / ".deit-digest.json").mkdir()
    _, err = run("digest", f"--config.data.name=folder:{folder}", "--config.data.eval_split=train", code=1)
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert f"data.name (folder:{folder}): {folder / '.deit-digest.json'} can't be written: " in line
