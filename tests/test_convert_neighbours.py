"""What a conversion takes from beside the weights: names of classes, mean and std of pixels, the crop."""

import hashlib
import json

import pytest
import safetensors.numpy

from deit import checkpoint, convert, errors, export_weights, saved
from tests.test_layouts import huggingface, timm

VARIANT = "deit_micro_distilled_patch8_32"


@pytest.fixture
def file(tmp_path):
    """Return timm's weights of the micro network in a file."""
    safetensors.numpy.save_file(timm(), tmp_path / "theirs.safetensors")
    return tmp_path / "theirs.safetensors"


def test_a_thousand_classes_are_imagenet_s_in_the_order_of_its_folders(tmp_path):
    safetensors.numpy.save_file(timm(classes=1000), tmp_path / "theirs.safetensors")
    convert.load(tmp_path / "theirs.safetensors", tmp_path / "ours", variant=VARIANT)
    config = saved.config_of(tmp_path / "ours")
    classes = config.resolved.classes
    assert (classes[0], classes[999], len(classes)) == ("n01440764", "n15075141", 1000)
    assert list(classes) == sorted(classes)
    assert (config.data.name, config.data.eval_split) == ("tfds:imagenet2012", "validation")
    assert config.resolved.total_updates == 0  # as a teacher it is finished, and says so


def test_a_directory_of_transformers_brings_its_names_and_its_epsilon(tmp_path):
    (tmp_path / "theirs").mkdir()
    safetensors.numpy.save_file(huggingface(timm()), tmp_path / "theirs" / "model.safetensors")
    labels = {"0": "rose", "1": "tulip", "2": "daisy"}
    (tmp_path / "theirs" / "config.json").write_text(json.dumps({"id2label": labels, "layer_norm_eps": 1e-5}))
    convert.load(tmp_path / "theirs", tmp_path / "ours", variant=VARIANT)
    config = saved.config_of(tmp_path / "ours")
    assert tuple(config.resolved.classes) == ("rose", "tulip", "daisy") and config.model.norm_epsilon == 1e-5
    digest = hashlib.sha256((tmp_path / "theirs" / "config.json").read_bytes()).hexdigest()
    assert checkpoint.manifest(tmp_path / "ours")["source"]["config.json"] == f"sha256 {digest}"
    line = convert.load(tmp_path / "theirs", tmp_path / "again", variant=VARIANT)
    assert "at 32 px, crop 0.875, " in line and line.endswith("), config.json beside it")


@pytest.mark.parametrize("how", ["transformers", "timm's hub", "timm's older hub"])
def test_what_is_done_to_pixels_comes_along_and_goes_back(tmp_path, how):
    theirs, mean, std = tmp_path / "theirs", [0.5, 0.4, 0.3], [0.5, 0.25, 0.125]
    theirs.mkdir()
    fields = {"mean": mean, "std": std, "crop_pct": 0.9}
    if how == "transformers":
        safetensors.numpy.save_file(huggingface(timm()), theirs / "model.safetensors")
        content = {"image_mean": mean, "image_std": std, "do_center_crop": True, "crop_size": 32, "size": 36}
        (theirs / "preprocessor_config.json").write_text(json.dumps(content))
    else:
        safetensors.numpy.save_file(timm(), theirs / "model.safetensors")
        content = fields if "older" in how else {"pretrained_cfg": fields}
        (theirs / "config.json").write_text(json.dumps({"architecture": "x", **content}))
    convert.load(theirs, tmp_path / "ours", variant=VARIANT)
    config = saved.config_of(tmp_path / "ours")
    assert list(config.model.mean) == mean and list(config.model.std) == std
    assert config.eval.crop_ratio == (32 / 36 if how == "transformers" else 0.9)
    if how == "transformers":
        export_weights.export(tmp_path / "ours", tmp_path / "back", layout="huggingface")
        back = json.loads((tmp_path / "back" / "preprocessor_config.json").read_text())
        assert back["image_mean"] == mean and back["image_std"] == std
        assert back["size"] == {"shortest_edge": 36} and back["crop_size"]["height"] == 32


IN_WORDS = [
    "tench, Tinca tinca",
    *(f"thing {i}" for i in range(1, 999)),
    "toilet tissue, toilet paper, bathroom tissue",
]
IN_WORDS[134] = IN_WORDS[517] = "crane"


def beside(folder, labels, classes):
    folder.mkdir()
    safetensors.numpy.save_file(huggingface(timm(classes=classes)), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"id2label": labels}))
    return folder


def test_imagenet_s_names_in_words_become_those_of_its_folders(tmp_path):
    theirs = beside(tmp_path / "theirs", {str(i): name for i, name in enumerate(IN_WORDS)}, 1000)
    convert.load(theirs, tmp_path / "ours", variant=VARIANT)
    config = saved.config_of(tmp_path / "ours")
    assert config.resolved.classes[0] == "n01440764" and config.resolved.classes[999] == "n15075141"
    assert len(set(config.resolved.classes)) == 1000 and config.data.name == "tfds:imagenet2012"


def test_names_that_come_again_are_numbered_and_a_wrong_number_of_them_is_the_file_s_fault(tmp_path):
    theirs = beside(tmp_path / "theirs", {"0": "crane", "1": "dog", "2": "crane"}, 3)
    convert.load(theirs, tmp_path / "ours", variant=VARIANT)
    assert saved.config_of(tmp_path / "ours").resolved.classes == ("crane (0)", "dog", "crane (2)")
    theirs = beside(tmp_path / "other", {"0": "crane", "1": "dog"}, 3)
    with pytest.raises(errors.UserError, match=r"other/config.json has 2 labels, the classifier 3 classes"):
        convert.load(theirs, tmp_path / "x", variant=VARIANT)
    names = tmp_path / "names.txt"
    names.write_text("a\nb\nc\n")
    convert.load(theirs, tmp_path / "named", variant=VARIANT, names_file=names)  # the flag decides


@pytest.mark.parametrize(
    "content, options, message",
    [
        (b"a\nb\na\n", {}, r"must hold different names, one a line: 'a' comes again"),
        (b"a\n", {}, r"must hold two different names or more"),
        (b"\xff\xfe\x00", {}, r"can't be read: it is no UTF-8 text"),
        (None, {}, r"can't be read: No such file or directory"),
        (b"a\nb\n", {}, r"--class_names \(.*names.txt\) has 2 names, the classifier 3 classes"),
        (b"a\nb\n", {"classifier": "drop"}, r"--class_names .* --classifier is drop"),
    ],
)
def test_a_file_of_names_that_can_t_be_taken_is_one_line(file, tmp_path, content, options, message):
    names = tmp_path / "names.txt"
    if content is not None:
        names.write_bytes(content)
    with pytest.raises(errors.UserError, match=message):
        convert.load(file, tmp_path / "ours", variant=VARIANT, names_file=names, **options)
    assert not (tmp_path / "ours").exists()
