"""tools/prepare_data.py: what it says about a data set, and copies that train as the original does."""

import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image, PngImagePlugin
from tensorflow_datasets.core import shuffle

from configs import base
from deit import errors
from deit.data import records, sources, survey

ROOT = Path(__file__).resolve().parents[1]


def run(*arguments, code=0):
    """Run the tool; return (stdout, stderr) once its exit code is right."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "prepare_data.py"), *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": ""}, capture_output=True, text=True, timeout=240, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout, done.stderr


def one_line(stderr: str) -> str:
    (line,) = [line for line in stderr.splitlines() if line.startswith("error: ")]
    return line


def picture(number: int, width=9, height=7, mode="RGB") -> Image.Image:
    values = np.random.RandomState(number).randint(0, 256, [height, width, 3], np.uint8)
    return Image.fromarray(values).convert(mode)


def pixels(data: bytes) -> bytes:
    return np.asarray(Image.open(io.BytesIO(data))).tobytes()


def save(path: Path, image: Image.Image, kind=None, **options) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, kind, **options)


def data_config(name: str, **fields):
    config = base.get_config().data
    config.name = name
    config.update(fields)
    return config


def surveyed(config, *splits):
    return [
        survey.survey(sources.open_scan(config, s), s, max_pixels=config.max_pixels, threads=2, advance=lambda: None)
        for s in splits
    ]


@pytest.fixture
def flawed(tmp_path) -> Path:
    """A folder with one flaw of each kind: train/ has 8 images of 2 classes, val/ 3 and a broken one."""
    root = tmp_path / "pictures"
    for number in range(4):
        save(root / "train" / "daisy" / f"{number}.png", picture(number, width=9 + number))
        save(root / "train" / "rose" / f"{number}.jpg", picture(10 + number, height=300, width=250))
    exif = Image.Exif()
    exif[0x0112] = 6
    save(root / "train" / "rose" / "3.jpg", picture(20, mode="L"), exif=exif)
    (root / "train" / "rose" / "0.jpg").write_bytes((root / "train" / "daisy" / "2.png").read_bytes())
    save(root / "val" / "daisy" / "large.webp", picture(30, width=100, height=50))
    save(root / "val" / "daisy" / "same.png", picture(1, width=10))
    save(root / "val" / "rose" / "a.bmp", picture(31))
    save(root / "val" / "rose" / "broken.jpg", picture(32))
    whole = (root / "val" / "rose" / "broken.jpg").read_bytes()
    (root / "val" / "rose" / "broken.jpg").write_bytes(whole[:-40])
    return root


def test_check_finds_every_flaw_and_names_it(flawed, tmp_path):
    flags = [f"--config.data.name=folder:{flawed}", "--config.data.train_split=train", "--config.data.eval_split=val"]
    out, err = run("check", *flags, "--config.data.max_pixels=4999", f"--json={tmp_path / 'found.json'}", code=1)
    line = one_line(err)
    assert "unreadable images: 4; pictures in both splits: 1" in line
    assert "LEAK! Pictures in training AND in evaluation, whose accuracy is too high for it: 1" in out
    assert "train/daisy/1.png [daisy] = val/daisy/same.png [daisy]" in out
    assert "train/daisy/2.png [daisy] = train/rose/0.jpg [rose]" in out or (
        "train/rose/0.jpg [rose] = train/daisy/2.png [daisy]" in out
    )
    assert (
        "the same content under different labels: 1" in out
        and "val/daisy/large.webp: 100 x 50 px are more than data.max_pixels" in out
    )
    found = json.loads((tmp_path / "found.json").read_text())
    train, val = found["splits"]
    assert (train["images"], val["images"]) == (8, 4)
    assert sorted((group["leak"], group["contradiction"]) for group in found["duplicates"]) == [
        (False, True),
        (True, False),
    ]
    assert train["per_class"] == {"daisy": 4, "rose": 4} and val["per_class"] == {"daisy": 2, "rose": 2}
    bad = {each["name"]: each["problem"] for each in val["unreadable"]}
    assert bad.keys() == {"val/daisy/large.webp", "val/rose/broken.jpg"} and "truncated" in bad["val/rose/broken.jpg"]
    assert train["formats"] == {"PNG RGB": 5, "JPEG RGB": 2, "JPEG L": 1} and train["turned"] == 1
    # Widths in training: 9, 10, 11, 12 and again 11, two of 250 and one of 9.
    assert train["width"] == [9, 11, 250] and train["height"] == [7, 7, 300]
    assert (train["above_max_pixels"], val["above_max_pixels"]) == (2, 1)
    assert (train["below_image_size"], val["below_image_size"]) == (6, 4)


def test_one_split_for_both_is_a_leak_of_every_picture_and_a_class_without_any_is_told(tmp_path):
    save(tmp_path / "p" / "trains" / "1.png", picture(1))
    save(tmp_path / "p" / "rose" / "1.png", picture(2))
    (tmp_path / "p" / "rose" / "2.png").write_bytes(b"no picture")
    (tmp_path / "p" / "empty").mkdir()
    flags = [f"--config.data.name=folder:{tmp_path / 'p'}", "--config.data.train_split=train"]
    out, err = run("check", *flags, "--config.data.eval_split=train", code=1)
    line = one_line(err)
    assert "unreadable images: 1; pictures in both splits: 3; classes without training images: empty" in line
    assert "LEAK! Pictures in training AND in evaluation, whose accuracy is too high for it: 3" in out
    assert "  train trains/1.png [trains] = train trains/1.png [trains]" in out.splitlines()
    assert "files with the same content within a split: 0" in out.splitlines()
    bad = [line for line in out.splitlines() if line.startswith("  train rose/2.png: ")]
    assert len(bad) == 1 and "unreadable: 1" in out.splitlines()


def test_check_writes_to_no_file_that_exists(tmp_path):
    photo = tmp_path / "photo.jpg"
    photo.write_bytes(b"a photo")
    line = one_line(run("check", "--config.data.name=digits", f"--json={photo}", code=1)[1])
    assert f"--json ({photo}) exists; nothing is overwritten" in line and photo.read_bytes() == b"a photo"


@pytest.mark.parametrize("inside", [".", "deeper/still", "rose"])
def test_a_copy_inside_the_folder_is_refused_and_adds_nothing_to_it(tmp_path, inside):
    root = tmp_path / "p"
    save(root / "rose" / "1.png", picture(1))
    before = sorted(root.rglob("*"))
    (tmp_path / "link").symlink_to(root)
    line = one_line(
        run("convert", f"--config.data.name=folder:{root}", f"--out={tmp_path / 'link' / inside}", code=1)[1]
    )
    assert f"must lie outside {root}" in line and sorted(root.rglob("*")) == before


def test_a_place_that_cannot_be_written_to_is_refused_before_anything_is_read(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere" / "at_all")
    for out in ("file", "file/below", "dangling"):
        with pytest.raises(errors.UserError, match=rf"^--out \(.*{out}\) can't be made: .* is no directory"):
            records.check_target(str(tmp_path / out), "copy")
    assert records.check_target(str(tmp_path / "new" / "newer"), "copy") == tmp_path / "new" / "newer" / "copy"
    monkeypatch.setattr(os, "access", lambda *_: False)  # chmod does not stop root
    with pytest.raises(errors.UserError, match="may be written to"):
        records.check_target(str(tmp_path), "copy")


def test_a_clean_folder_passes_with_a_table(tmp_path):
    for number in range(12):
        save(tmp_path / "p" / "daisy" / f"{number}.png", picture(number))
        save(tmp_path / "p" / "rose" / f"{number}.png", picture(number + 50))
    out, _ = run("check", f"--config.data.name=folder:{tmp_path / 'p'}", "--config.data.train_split=train[:75%]",
                 "--config.data.eval_split=train[75%:]")  # fmt: skip
    lines = out.splitlines()
    assert "unreadable: 0" in lines and "files with the same content within a split: 0" in lines
    rows = {
        line.split()[0]: [int(word) for word in line.split()[1:]] for line in lines if line[:5] in ("daisy", "rose ")
    }
    assert [sum(column) for column in zip(*rows.values())] == [18, 6]
    assert [sum(row) for row in rows.values()] == [12, 12]


@pytest.mark.parametrize("data", [b"", b"no image at all", b"RIFF____WEBPVP8 ", b"BM"])
def test_what_is_no_picture_is_a_problem_and_not_an_exception(data):
    seen = survey.examine(data, max_pixels=10**8)
    assert seen.problem and seen.kind is None


def test_files_without_bytes_are_unreadable_but_no_duplicates_of_each_other(tmp_path):
    for split in ("train", "val"):
        (tmp_path / split / "a").mkdir(parents=True)
        for number in range(2):
            (tmp_path / split / "a" / f"{number}.png").write_bytes(b"")
    found = surveyed(data_config(f"folder:{tmp_path}"), "train", "val")
    assert [len(each.bad()) for each in found] == [2, 2]
    assert survey.duplicates(found) == []


def test_a_picture_that_only_tensorflow_refuses_is_a_problem():
    out = io.BytesIO()
    picture(0).save(out, "TIFF")
    assert survey.examine(out.getvalue(), max_pixels=10**8).problem.startswith("TensorFlow: ")


def test_huge_pictures_are_told_by_their_header_and_pillows_own_limit_comes_back(tmp_path, monkeypatch):
    limit = Image.MAX_IMAGE_PIXELS
    out = io.BytesIO()
    Image.new("1", (20000, 10000)).save(out, "PNG")  # 200 million pixels: Image.open itself refuses above 179 million
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1.png").write_bytes(out.getvalue())
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", lambda image: pytest.fail("it was decoded"))
    (found,) = surveyed(data_config(f"folder:{tmp_path}"), "all")
    assert found.bad() == {0: "20000 x 10000 px are more than data.max_pixels"}
    assert limit == Image.MAX_IMAGE_PIXELS


def test_a_folder_becomes_records_with_the_same_bytes_labels_order_and_names(flawed, tmp_path):
    (flawed / "val" / "rose" / "broken.jpg").unlink()
    flags = [f"--config.data.name=folder:{flawed}", "--config.data.train_split=train", "--config.data.eval_split=val"]
    out, _ = run("convert", *flags, f"--out={tmp_path / 'out'}")
    assert out.splitlines()[-1] == f"--config.data.name=tfds:pictures --config.data.data_dir={tmp_path / 'out'}"
    original = data_config(f"folder:{flawed}", train_split="train", eval_split="val")
    copy = data_config("tfds:pictures", data_dir=str(tmp_path / "out"), train_split="train", eval_split="val")
    assert sources.sizes(copy) == sources.sizes(original) == (8, 3, 2)
    for split in ("train", "val"):
        one, other = (sources.open_source(config, split) for config in (original, copy))
        assert isinstance(other, sources.ArrayRecords) and other.classes == one.classes
        rows = np.arange(len(one))
        for what in ("raw", "read"):  # as stored, WebP too, and as the stream gets it
            (encoded, labels), (copied, copied_labels) = (getattr(each, what)(rows) for each in (one, other))
            assert copied == encoded and copied_labels.tolist() == labels.tolist()
        assert other.name(0) == f"pictures {split} record 0 ({one.name(0)})"
    with pytest.raises(errors.UserError, match="has pictures already; nothing is overwritten"):
        records.check_target(str(tmp_path / "out"), "pictures")


def test_slices_of_the_copy_are_those_of_the_folder(tmp_path):
    for number in range(20):
        save(tmp_path / "p" / "ab"[number % 2] / f"{number}.png", picture(number))
    config = data_config(f"folder:{tmp_path / 'p'}", split_seed=3)
    source = sources.open_scan(config, "train")
    records.write({"train": source}, out=str(tmp_path / "o"), name="p", skip={}, advance=lambda: None)
    copy = data_config("tfds:p", data_dir=str(tmp_path / "o"))
    for split in ("train[:75%]", "train[75%:]"):
        one, other = (sources.open_source(each, split) for each in (config, copy))
        assert one.read(np.arange(len(one)))[0] == other.read(np.arange(len(other)))[0]


def test_unreadable_files_stop_a_conversion_by_name_or_are_left_out(flawed, tmp_path):
    flags = [f"--config.data.name=folder:{flawed}", "--config.data.train_split=train", "--config.data.eval_split=val",
             f"--out={tmp_path / 'out'}", "--name=clean"]  # fmt: skip
    line = one_line(run("convert", *flags, code=1)[1])
    assert "unreadable images (1), nothing was written: val/rose/broken.jpg" in line and "--skip_bad" in line
    assert not (tmp_path / "out").exists()
    out, _ = run("convert", *flags, "--skip_bad")
    assert "left out: val/rose/broken.jpg" in out
    config = data_config("tfds:clean", data_dir=str(tmp_path / "out"), train_split="train", eval_split="val")
    assert sources.sizes(config) == (8, 3, 2)


class Painted(tfds.core.GeneratorBasedBuilder):
    """Sixty noisy PNG pictures and the files they were."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {"image": tfds.features.Image(), "label": tfds.features.ClassLabel(names=["a", "b", "c"]),
                    "image/filename": tfds.features.Text()}  # fmt: skip
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(0, 50), "test": self._generate_examples(50, 60)}

    def _generate_examples(self, low, high):
        for k in range(low, high):
            yield k, {"image": np.asarray(picture(k)), "label": k % 3, "image/filename": f"abc/{k}.png"}


def test_tfrecords_are_copied_bucket_by_bucket_in_their_order(tmp_path, monkeypatch):
    Painted(data_dir=tmp_path / "in", file_format="tfrecord").download_and_prepare()
    config = data_config("tfds:painted", data_dir=str(tmp_path / "in"), max_ram_bytes=1)
    scans = {split: sources.open_scan(config, split) for split in ("train", "test")}
    monkeypatch.setattr(shuffle, "MAX_MEM_BUFFER_SIZE", 1000)  # bytes: a few pictures
    largest, real = [], shuffle._Bucket.read_values
    monkeypatch.setattr(shuffle._Bucket, "read_values", lambda bucket: largest.append(len(bucket)) or real(bucket))
    ticks = []
    records.write(scans, out=str(tmp_path / "out"), name="painted", skip={}, advance=lambda: ticks.append(1))
    assert len(ticks) == 60 and max(largest) == 1  # never more than one of 1000 temporary files in memory
    copy = data_config("tfds:painted", data_dir=str(tmp_path / "out"))
    for split, scan in scans.items():
        source = sources.open_source(copy, split)
        encoded, labels = source.raw(np.arange(len(source)))
        assert list(zip(encoded, labels.tolist())) == list(scan.scan())
        file = {np.asarray(picture(k)).tobytes(): f"abc/{k}.png" for k in range(60)}
        for i, data in enumerate(encoded):  # named as in the original
            assert source.name(i) == f"painted {split} record {i} ({file[pixels(data)]})"
    again = {split: sources.open_scan(copy, split) for split in scans}
    records.write(again, out=str(tmp_path / "again"), name="painted", skip={}, advance=lambda: None)
    twice = data_config("tfds:painted", data_dir=str(tmp_path / "again"))
    assert sources.open_source(twice, "train").name(7) == sources.open_source(copy, "train").name(7)


def test_damaged_records_are_named_stop_a_conversion_or_are_left_out(tmp_path):
    Painted(data_dir=tmp_path, file_format="array_record").download_and_prepare()
    (path,) = tmp_path.rglob("painted-train*")
    data = path.read_bytes()
    png = sources.open_source(data_config("tfds:painted", data_dir=str(tmp_path)), "train").raw(np.array([30]))[0][0]
    start = data.index(png)
    path.write_bytes(data[: start + 9] + bytes(9) + data[start + 18 :])
    flags = ["--config.data.name=tfds:painted", f"--config.data.data_dir={tmp_path}", "--config.data.train_split=train",
             "--config.data.eval_split=test"]  # fmt: skip
    out, err = run("check", *flags, code=1)
    assert "unreadable images: 1" in one_line(err)
    assert "  painted train record 30: the file is empty or can't be read" in out.splitlines()
    line = one_line(run("convert", *flags, f"--out={tmp_path / 'new' / 'out'}", code=1)[1])
    assert "unreadable images (1), nothing was written: painted train record 30 (the file is empty" in line
    assert not (tmp_path / "new").exists()
    out, _ = run("convert", *flags, f"--out={tmp_path / 'new' / 'out'}", "--skip_bad")
    assert "left out: painted train record 30 (the file is empty" in out and "59 images in" in out


class Failing(sources.InMemory):
    """Two examples of which the second cannot be had."""

    def __init__(self, error):
        super().__init__([b"x", b"y"], [0, 0], classes=["a"])
        self.error = error

    def scan(self):
        yield b"x", 0
        raise self.error


@pytest.mark.parametrize("out", [".", "new", "new/and/deep"])
@pytest.mark.parametrize("error", [OSError(5, "the disk is gone"), KeyboardInterrupt()])
def test_a_conversion_that_fails_leaves_nothing_behind(tmp_path, monkeypatch, out, error):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "kept").mkdir()
    for where in (out, f"{tmp_path}/{out}", f"kept/{out}"):
        with pytest.raises(type(error)):
            records.write({"train": Failing(error)}, out=where, name="half", skip={}, advance=lambda: None)
        assert sorted(tmp_path.rglob("*")) == [tmp_path / "kept"]


def test_a_conversion_that_fails_leaves_what_others_put_beside_it(tmp_path):
    note = tmp_path / "new" / "note.txt"
    with pytest.raises(OSError, match="the disk is gone"):
        records.write({"train": Failing(OSError(5, "the disk is gone"))}, out=str(tmp_path / "new" / "deep"),
                      name="half", skip={}, advance=lambda: note.write_text("mine"))  # fmt: skip
    assert sorted(tmp_path.rglob("*")) == [note.parent, note]


@pytest.mark.parametrize("name", ["Flowers", "my flowers", "../x", "9lives", ""])
def test_a_name_that_tfds_would_refuse_is_refused_before_anything_is_read(name, tmp_path):
    with pytest.raises(errors.UserError, match="--name"):
        records.check_target(str(tmp_path), name)


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ([], "check|convert|prepare|digest"),
        (["convert", "--config.data.name=digits"], "--out must be given"),
        (["prepare", "--config.data.name=digits"], "tfds:NAME"),
        (["prepare", "--config.data.name=tfds:imagenet2012", "--manual_dir=nowhere"], "--manual_dir (nowhere)"),
    ],
)
def test_bad_input_is_one_line(arguments, part):
    assert part in one_line(run(*arguments, code=1)[1])


def add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    archive.addfile(info, io.BytesIO(data))


def jpeg(number: int) -> bytes:
    out = io.BytesIO()
    picture(number, width=40, height=30).save(out, "JPEG")
    return out.getvalue()


def test_imagenet_is_prepared_from_its_two_archives_and_trains_as_array_records(tmp_path):
    manual, train = tmp_path / "manual", {}
    manual.mkdir()
    with tarfile.open(manual / "ILSVRC2012_img_train.tar", "w") as outer:
        for label, synset in enumerate(("n01440764", "n01443537")):  # the first two classes
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode="w") as archive:
                for k in range(3):
                    train[f"{synset}_{k}.JPEG"] = jpeg(10 * label + k), label
                    add(archive, f"{synset}_{k}.JPEG", train[f"{synset}_{k}.JPEG"][0])
            add(outer, f"{synset}.tar", inner.getvalue())
    with tarfile.open(manual / "ILSVRC2012_img_val.tar", "w") as archive:
        for k in (2, 1):
            add(archive, f"ILSVRC2012_val_{k:08d}.JPEG", jpeg(100 + k))
    flags = ["--config.data.name=tfds:imagenet2012", f"--config.data.data_dir={tmp_path / 'data'}",
             "--config.data.train_split=train", "--config.data.eval_split=validation"]  # fmt: skip
    out, _ = run("prepare", *flags, f"--manual_dir={manual}")
    assert "train: 6 images" in out and "validation: 2 images" in out and "imagenet2012/5.1.0" in out

    config = data_config("tfds:imagenet2012", data_dir=str(tmp_path / "data"), train_split="train",
                         eval_split="validation")  # fmt: skip
    assert sources.sizes(config) == (6, 2, 1000)
    source = sources.open_source(config, "train")
    encoded, labels = source.read(np.arange(6))
    found = {source.name(i).split("(")[1][:-1]: (encoded[i], int(labels[i])) for i in range(6)}
    assert isinstance(source, sources.ArrayRecords) and found == train
    assert source.classes[:2] == ("n01440764", "n01443537")
    held_out = sources.open_source(config, "validation").read(np.arange(2))[1]
    # The first two lines of ILSVRC2012_validation_ground_truth by synset: n01751748 and n09193705.
    assert sorted(source.classes[label] for label in held_out) == ["n01751748", "n09193705"]
