"""The line that the converter prints opens what it wrote; the files beside say how the network is built and fed."""

import importlib.util
import json
import logging as python_logging

import numpy as np
import pytest
import safetensors.numpy
from PIL import Image

from deit import convert, errors, export_weights, predict, saved
from tests import family
from tests.test_layouts import timm
from tools import peer_packages, peers

needs_peers = pytest.mark.skipif(
    bool(peer_packages.missing()),
    reason=f"{', '.join(peer_packages.missing())} not installed: pip install -e '.[peers]'",
)
PLAIN, DISTILLED, DEIT3 = "deit_micro_patch8_32", "deit_micro_distilled_patch8_32", "deit3_micro_patch8_32"


def export(ckpt, tmp_path, layout, **options):
    """Return (what was written, the printed Python)."""
    out = tmp_path / ("theirs.safetensors" if layout == "facebook" else "theirs")
    line = export_weights.export(ckpt, out, layout=layout, **options)
    assert line.startswith(f"{out}: ")
    return out, line.removeprefix(f"{out}: ")


def opened(line, tmp_path):
    """Run the printed line in a module of its own, whose only imports are the line's, and return its model.

    `peer_packages.load` mends a torchvision that is not of torch's build.
    """
    peer_packages.load()
    (tmp_path / "opened.py").write_text(line + "\n")
    spec = importlib.util.spec_from_file_location("opened", tmp_path / "opened.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.model.eval()


@needs_peers
@pytest.mark.parametrize(
    "variant, layout, fields",
    [
        (PLAIN, "timm", {"registers": 3, "size": 64}),
        (PLAIN, "facebook", {"norm_epsilon": 1e-3}),
        (PLAIN, "huggingface", {"size": 64}),
        (DISTILLED, "timm", {"size": 64, "norm_epsilon": 1e-3}),
        (DISTILLED, "facebook", {"patch": 4}),
        (DISTILLED, "huggingface", {"norm_epsilon": 1e-3}),
        (DISTILLED, "huggingface", {"heads": "cls"}),
        (DEIT3, "timm", {"registers": 2}),
        (DEIT3, "timm", {"size": 36}),  # of which 4 x 4 patches of 8 px see 32, as of huge's 160 px
        (DEIT3, "facebook", {"size": 64, "norm_epsilon": 1e-3}),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("deit_tiny_distilled_patch16_224", "timm", {"size": 288, "patch": 32, "norm_epsilon": 1e-3}),
                ("deit_tiny_patch16_224", "timm", {"size": 384}),
                ("deit_tiny_distilled_patch16_224", "facebook", {"size": 64}),
                ("deit3_small_patch16_224", "timm", {"size": 64, "registers": 1}),
                ("deit3_small_patch16_384", "facebook", {"size": 384, "norm_epsilon": 1e-3}),
            )
        ),
    ],
)
def test_the_line_opens_the_file_with_the_same_logits(tmp_path, variant, layout, fields):
    ckpt = family.checkpoint(tmp_path / "ours", variant, **{"size": 32, **fields})
    _, line = export(ckpt, tmp_path, layout)
    if layout == "facebook":
        assert variant in line or "_micro_" in variant
    ours = saved.open_network(ckpt).network
    images = peers.pictures(2, ours.image_size)
    logits = peers._huggingface_logits if layout == "huggingface" else peers.timm_logits
    expected = logits(opened(line, tmp_path), images)
    got = ours.logits(images)
    assert got.keys() == expected.keys()
    for head, value in expected.items():
        assert np.abs(value).max() > 0.1
        np.testing.assert_allclose(got[head], value, atol=peers.WITHIN)


@needs_peers
@pytest.mark.parametrize("layout", ["timm", "huggingface"])
def test_a_trunk_without_a_classifier_is_opened_too(tmp_path, layout):
    safetensors.numpy.save_file(timm(), tmp_path / "before.safetensors")
    convert.load(tmp_path / "before.safetensors", tmp_path / "ours", variant=DISTILLED, classifier="drop")
    _, line = export(tmp_path / "ours", tmp_path, layout)
    state = opened(line, tmp_path).state_dict()
    name = "norm.weight" if layout == "timm" else "layernorm.weight"
    before = safetensors.numpy.load_file(tmp_path / "before.safetensors")
    np.testing.assert_array_equal(state[name].numpy(), before["norm.weight"])
    assert not any("pooler" in name or "head" in name for name in state)


@pytest.mark.parametrize(
    "variant, layout, fields, message",
    [
        (DISTILLED, "timm", {"registers": 2}, r"no register tokens \(model.registers\) in a distilled network"),
        (PLAIN, "facebook", {"registers": 2}, r"facebookresearch/deit has no register tokens"),
        (PLAIN, "huggingface", {"registers": 2}, r"transformers has no DeiT-III and no register tokens"),
        (DEIT3, "huggingface", {}, r"transformers has no DeiT-III"),
        (DISTILLED, "timm", {"heads": "cls"}, r"timm has no distilled network with one head"),
    ],
)
def test_what_the_other_code_base_has_not_is_refused_and_nothing_is_left(tmp_path, variant, layout, fields, message):
    ckpt = family.checkpoint(tmp_path / "ours", variant, **fields)
    with pytest.raises(errors.UserError, match=message):
        export(ckpt, tmp_path, layout)
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]


@pytest.mark.parametrize(
    "name, layout, rule",
    [
        ("theirs.pth", "facebook", "end in .safetensors"),
        ("theirs.safetensors", "timm", "be a directory, which timm opens as a whole"),
        ("theirs.safetensors", "huggingface", "be a directory, which huggingface opens as a whole"),
    ],
)
def test_a_wrong_suffix_is_refused_before_anything_is_read(tmp_path, name, layout, rule):
    with pytest.raises(errors.UserError, match=rf"--out \(.*{name}\) must {rule}"):
        export_weights.export(tmp_path / "absent", tmp_path / name, layout=layout)


def test_files_of_somebody_else_beside_the_export_survive(tmp_path):
    ckpt = family.checkpoint(tmp_path / "ours", PLAIN)
    (tmp_path / "tmp-theirs.safetensors").write_text("mine")
    (tmp_path / "tmp-theirs").mkdir()
    (tmp_path / "tmp-theirs" / "x").write_text("mine")
    for layout in ("facebook", "huggingface"):
        export(ckpt, tmp_path, layout)
    assert (tmp_path / "tmp-theirs.safetensors").read_text() == (tmp_path / "tmp-theirs" / "x").read_text() == "mine"
    assert len(list(tmp_path.iterdir())) == 5


def test_a_disk_that_is_full_is_one_line(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    ckpt = family.checkpoint(tmp_path / "ours", PLAIN)
    monkeypatch.setattr("deit.weights_file.write", full)
    for layout in ("timm", "facebook", "huggingface"):
        with pytest.raises(errors.UserError, match=r"--out .* can't be written: No space left on device"):
            export(ckpt, tmp_path, layout)
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]


@needs_peers
@pytest.mark.parametrize("crop", [0.875, 0.0])
def test_timm_s_directory_says_what_timm_makes_of_a_picture_and_what_the_classes_are_called(tmp_path, crop):
    fields = {"mean": (0.5, 0.4, 0.3), "std": (0.1, 0.2, 0.3), "crop_ratio": crop, "classes": ("rose", "tulip")}
    _, line = export(family.checkpoint(tmp_path / "ours", DISTILLED, size=64, **fields), tmp_path, "timm")
    model = opened(line, tmp_path)
    import timm as library

    found = library.data.resolve_model_data_config(model)
    assert found == {
        "input_size": (3, 64, 64), "mean": [0.5, 0.4, 0.3], "std": [0.1, 0.2, 0.3], "crop_pct": crop or 1.0,
        "interpolation": "bicubic" if crop else "bilinear", "crop_mode": "center" if crop else "squash",
    }  # fmt: skip
    assert model.pretrained_cfg["label_names"] == ["rose", "tulip"] and model.num_classes == 2
    library.data.create_transform(**found)


@needs_peers
@pytest.mark.parametrize("crop", [0.875, 1.0])
def test_a_picture_that_is_not_square_is_answered_alike_in_transformers_and_timm(tmp_path, crop):
    pixels = np.random.default_rng(0).integers(0, 256, [6, 12, 3], np.uint8)
    picture = Image.fromarray(pixels).resize((480, 240), Image.Resampling.BICUBIC)
    picture.save(tmp_path / "wide.png")
    ckpt = family.checkpoint(tmp_path / "ours", DISTILLED, crop_ratio=crop)
    opened_here = predict.open_network(str(ckpt))
    (answer,) = predict.pictures(opened_here, [str(tmp_path / "wide.png")], top=3)
    torch, library, transformers = peer_packages.load()
    for layout in ("huggingface", "timm"):
        out, line = export(ckpt, tmp_path / layout, layout)
        model = opened(line, tmp_path)
        if layout == "huggingface":
            processor = transformers.AutoImageProcessor.from_pretrained(out)
            logits = model(processor(picture, return_tensors="pt")["pixel_values"]).logits
        else:
            transform = library.data.create_transform(**library.data.resolve_model_data_config(model))
            logits = model(transform(picture)[None])
        theirs = torch.softmax(logits, -1)[0].detach().numpy()
        ours = dict(answer.classes)
        # Pillow rounds to bytes between the two axes, so pixels differ by one.
        np.testing.assert_allclose([ours[name] for name in "abc"], theirs, atol=2e-3, err_msg=layout)


@pytest.mark.parametrize("layout", ["timm", "huggingface"])
@pytest.mark.parametrize("crop", [0.875, 1.0, 0.0])
def test_a_network_that_goes_out_and_comes_back_is_the_same_for_pictures_too(tmp_path, layout, crop):
    fields = {
        "norm_epsilon": 1e-3,
        "mean": (0.5, 0.4, 0.3),
        "std": (0.1, 0.2, 0.3),
        "crop_ratio": crop,
        "classes": ("rose", "tulip"),
    }
    ckpt = family.checkpoint(tmp_path / "ours", DISTILLED, **fields)
    out, _ = export(ckpt, tmp_path, layout)
    convert.load(out, tmp_path / "again", variant=DISTILLED)
    before, after = saved.config_of(ckpt), saved.config_of(tmp_path / "again")
    for name in ("mean", "std", "norm_epsilon", "patch", "registers", "heads", "variant"):
        assert after.model[name] == before.model[name]
    assert int(32 / (after.eval.crop_ratio or 1)) == int(32 / (crop or 1)) and bool(after.eval.crop_ratio) == bool(crop)
    assert tuple(after.resolved.classes) == ("rose", "tulip")
    tensors = [safetensors.numpy.load_file(path / "tensors.safetensors") for path in (ckpt, tmp_path / "again")]
    assert tensors[0].keys() == tensors[1].keys()
    assert all(tensors[0][name].tobytes() == tensors[1][name].tobytes() for name in tensors[0])


def test_config_json_says_how_the_network_is_built(tmp_path):
    ckpt = family.checkpoint(tmp_path / "ours", DISTILLED, size=64, classes=("rose", "tulip"), norm_epsilon=1e-5)
    out, _ = export(ckpt, tmp_path, "huggingface")
    content = json.loads((out / "config.json").read_text())
    expected = {
        "architectures": ["DeiTForImageClassificationWithTeacher"], "model_type": "deit", "hidden_size": 64,
        "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 256, "hidden_act": "gelu",
        "layer_norm_eps": 1e-5, "qkv_bias": True, "image_size": 64, "patch_size": 8, "num_channels": 3,
        "id2label": {"0": "rose", "1": "tulip"}, "label2id": {"rose": 0, "tulip": 1},
    }  # fmt: skip
    assert {name: content[name] for name in expected} == expected


@pytest.mark.parametrize("crop, before, resample", [(0.875, 36, 3), (1.0, 32, 3), (0.0, 32, 2)])
def test_preprocessor_config_json_says_what_a_picture_is_made_into(tmp_path, crop, before, resample):
    ckpt = family.checkpoint(tmp_path / "ours", PLAIN, mean=(0.5, 0.4, 0.3), std=(0.1, 0.2, 0.3), crop_ratio=crop)
    out, _ = export(ckpt, tmp_path, "huggingface")
    content = json.loads((out / "preprocessor_config.json").read_text())
    assert content["image_mean"] == [0.5, 0.4, 0.3] and content["image_std"] == [0.1, 0.2, 0.3]
    size = {"shortest_edge": before} if crop else {"height": before, "width": before}
    assert content["size"] == size and content["resample"] == resample
    assert content["do_center_crop"] is bool(crop) and content["crop_size"] == {"height": 32, "width": 32}
    assert content["do_rescale"] is content["do_normalize"] is True and content["rescale_factor"] == 1 / 255


def test_pixels_that_are_not_normalised_as_imagenet_s_are_a_warning_where_a_file_can_t_say_it(tmp_path, caplog):
    caplog.set_level(python_logging.WARNING)
    export(family.checkpoint(tmp_path / "usual", PLAIN), tmp_path, "facebook")
    assert caplog.text == ""
    (tmp_path / "theirs.safetensors").unlink()
    other = family.checkpoint(tmp_path / "other", PLAIN, mean=(0.5,) * 3, std=(0.5,) * 3)
    export(other, tmp_path, "timm")
    assert caplog.text == ""
    export(other, tmp_path, "facebook")
    assert "trained with mean (0.5, 0.5, 0.5) and std (0.5, 0.5, 0.5)" in caplog.text
