"""What lies beside the weights of others: taken over where it fits the variant, refused by file and field else."""

import json
import math

import pytest

from deit import errors, peer_settings
from deit.models import variants

SHAPE = variants.of_name("deit_small_patch16_224")
USUAL = {
    "num_attention_heads": 6,
    "hidden_act": "gelu",
    "qkv_bias": True,
    "intermediate_size": 1536,
    "layer_norm_eps": 1e-12,
}
PICTURE = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}


def read(folder, *, layout="huggingface", config=None, picture=None):
    for name, content in (("config.json", config), ("preprocessor_config.json", picture)):
        if content is not None:
            (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return peer_settings.read(folder, layout, SHAPE)


def test_files_that_are_absent_say_nothing(tmp_path):
    found = read(tmp_path)
    assert (found.norm_epsilon, found.mean, found.crop_ratio, found.class_names()) == (1e-12, None, None, ())
    assert read(tmp_path, layout="timm") == peer_settings.Settings(tmp_path)
    assert read(tmp_path, layout="timm", config={"something": "else"}) == peer_settings.Settings(tmp_path)
    assert read(tmp_path, config=USUAL).norm_epsilon == 1e-12


@pytest.mark.parametrize(
    "change, message",
    [
        ({"num_attention_heads": 12}, r"config.json: num_attention_heads \(12\) must be 6: it is another network"),
        ({"hidden_act": "gelu_new"}, r"hidden_act \('gelu_new'\) must be 'gelu'"),
        ({"qkv_bias": False}, r"qkv_bias \(False\) must be True"),
        ({"intermediate_size": 768}, r"intermediate_size \(768\) must be 1536"),
        *(({"layer_norm_eps": value}, "layer_norm_eps .* must be a number between 0 and 1")
          for value in (0, 1, -1e-6, "1e-6", None, True, math.nan, [1])),
    ],
)  # fmt: skip
def test_another_network_is_refused_though_its_tensors_would_fit(tmp_path, change, message):
    with pytest.raises(errors.UserError, match=message):
        read(tmp_path, config={**USUAL, **change})


@pytest.mark.parametrize("text", ["{", "[1]", "", "\x00", '{"a": ' * 100_000])
@pytest.mark.parametrize("layout", ["huggingface", "timm"])
def test_a_file_that_is_no_json_object_is_named(tmp_path, text, layout):
    with pytest.raises(errors.UserError, match=r"config.json must be (a )?JSON"):
        read(tmp_path, layout=layout, config=text)


@pytest.mark.parametrize(
    "size, crop, ratio",
    [
        (256, {"crop_size": 224, "do_center_crop": True}, 0.875),
        ({"height": 256, "width": 256}, {"crop_size": {"height": 224, "width": 224}}, 0.875),
        ({"shortest_edge": 256}, {"crop_size": 224}, 0.875),
        (224, {"do_center_crop": True}, 1.0),
        (224, {}, 0.0),
        ({"height": 224, "width": 224}, {"do_center_crop": False, "crop_size": 224}, 0.0),
        ({"shortest_edge": 224}, {}, None),
        (256, {"do_resize": False}, None),
    ],
)
def test_a_centre_crop_is_its_part_of_the_side_before_it(tmp_path, size, crop, ratio):
    found = read(tmp_path, picture={**PICTURE, "size": size, **crop})
    assert found.crop_ratio == ratio and found.mean == found.std == (0.5,) * 3


def test_the_side_before_every_crop_comes_back_exactly(tmp_path):
    for crop in (224, 288, 384):
        for size in range(crop, 2 * crop):
            ratio = peer_settings._crop_ratio(tmp_path, {"size": size, "crop_size": crop})
            assert int(crop / ratio) == size


def test_pixels_that_are_not_normalised_have_mean_0_and_std_1(tmp_path):
    found = read(tmp_path, picture={"do_normalize": False})
    assert (found.mean, found.std) == ((0.0,) * 3, (1.0,) * 3)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"image_mean": [0.5, 0.5]}, r"image_mean \(\[0.5, 0.5\]\) must be three numbers"),
        ({"image_mean": "abc"}, r"image_mean"),
        ({"image_mean": [math.nan] * 3}, r"image_mean"),
        ({"image_std": [0.5, 0, 0.5]}, r"image_std .* must be three numbers above 0"),
        ({"image_std": [10**400] * 3}, r"image_std"),
        ({"image_std": None}, r"image_std"),
        ({"size": 224, "crop_size": 256}, r"crop_size / size \(1.14.*\) must be between 0.25 and 1"),
        ({"size": {"height": 224, "width": 256}}, r"size .* must be the px of a square"),
        ({"size": "large"}, r"size .* must be the px of a square"),
        ({"size": {"height": [1]}}, r"size .* must be the px of a square"),
        ({"size": -1, "crop_size": 224}, r"size .* must be the px of a square"),
        ({"rescale_factor": 1 / 127.5}, r"rescale_factor 1/255"),
        ({"do_rescale": False}, r"do_rescale must be true"),
    ],
)
def test_an_image_processor_that_can_t_be_followed_is_named(tmp_path, change, message):
    with pytest.raises(errors.UserError, match=f"preprocessor_config.json: .*{message}"):
        read(tmp_path, picture={**PICTURE, **change})


@pytest.mark.parametrize(
    "content, message",
    [
        ({"pretrained_cfg": {"mean": [1, 2]}}, r"mean \(\[1, 2\]\) must be three numbers"),
        ({"pretrained_cfg": {"std": [1, 2, -3]}}, r"std .* above 0"),
        ({"pretrained_cfg": {"crop_pct": 2.0}}, r"crop_pct \(2.0\) must be between 0.25 and 1"),
        ({"pretrained_cfg": []}, r"pretrained_cfg must be an object"),
        ({"architecture": "x", "model_args": {"num_heads": 12}}, r"model_args.num_heads \(12\) must be 6"),
        ({"architecture": "x", "model_args": {"act_layer": "relu"}}, r"model_args.act_layer \('relu'\) must be 'gelu'"),
        (
            {"architecture": "x", "model_args": {"global_pool": "avg"}},
            r"model_args.global_pool \('avg'\) must be 'token'",
        ),
        ({"architecture": "x", "global_pool": "avg"}, r"global_pool \('avg'\) must be 'token'"),
        (
            {"architecture": "x", "model_args": {"norm_layer": "rmsnorm"}},
            r"model_args.norm_layer \('rmsnorm'\) must be",
        ),
    ],
)
def test_a_config_of_timm_that_can_t_be_followed_is_named(tmp_path, content, message):
    with pytest.raises(errors.UserError, match=f"config.json: {message}"):
        read(tmp_path, layout="timm", config=content)


@pytest.mark.parametrize(
    "content",
    [
        {"architecture": "x", "label_names": ["rose", "tulip"], "pretrained_cfg": {}},
        {"architecture": "x", "pretrained_cfg": {"label_names": ["rose", "tulip"]}},
        {"architecture": "x", "labels": ["rose", "tulip"]},
    ],
)
def test_names_of_classes_are_read_where_timm_keeps_them(tmp_path, content):
    assert read(tmp_path, layout="timm", config=content).class_names() == ("rose", "tulip")


@pytest.mark.parametrize(
    "fields, crop", [({}, 0.0), ({"crop_pct": 0.9}, 0.9), ({"crop_mode": "center"}, 1.0), ({"crop_mode": None}, 1.0)]
)
def test_a_picture_that_timm_squashes_into_the_square_has_no_crop(tmp_path, fields, crop):
    content = {"pretrained_cfg": {"crop_pct": 1.0, "crop_mode": "squash", **fields}}
    assert read(tmp_path, layout="timm", config=content).crop_ratio == crop


@pytest.mark.parametrize(
    "layout, fields, warning",
    [
        ("timm", {"interpolation": "bilinear"}, "interpolation (bilinear): here a picture is resized bicubic"),
        ("timm", {"crop_mode": "border"}, "crop_mode (border): here the centre is cropped"),
        ("timm", {"interpolation": "bicubic", "crop_mode": "center"}, ""),
        ("timm", {"interpolation": ["bicubic"]}, "interpolation (['bicubic'])"),
        ("huggingface", {"resample": ["bicubic"]}, "resample (['bicubic'])"),
        ("timm", {"crop_pct": 1.0, "crop_mode": "squash", "interpolation": "bilinear"}, ""),
        ("huggingface", {"resample": 2}, "resample (bilinear): here a picture is resized bicubic"),
        ("huggingface", {"resample": 0}, "resample (0): here a picture is resized bicubic"),
        ("huggingface", {"size": {"height": 256, "width": 256}, "crop_size": 224}, "here the short side is resized"),
        ("huggingface", {"size": {"shortest_edge": 256}, "crop_size": 224, "resample": 3}, ""),
        ("huggingface", {"size": 224, "do_center_crop": False, "resample": 2}, ""),
    ],
)
def test_what_is_done_to_a_picture_otherwise_than_here_is_warned_of(tmp_path, caplog, layout, fields, warning):
    if layout == "timm":
        read(tmp_path, layout=layout, config={"pretrained_cfg": {"crop_pct": 0.9, **fields}})
    else:
        read(tmp_path, picture={**PICTURE, **fields})
    assert warning in caplog.text and bool(caplog.text) == bool(warning)


@pytest.mark.parametrize(
    "labels, names",
    [
        ({"0": "LABEL_0", "1": "LABEL_1"}, ()),
        ({"1": "b", "0": "a"}, ("a", "b")),
        ({"0": "crane", "1": "dog", "2": "crane"}, ("crane (0)", "dog", "crane (2)")),
        ({}, ()),
    ],
)
def test_names_are_in_the_order_of_the_logits_and_those_that_come_again_are_numbered(tmp_path, labels, names):
    assert read(tmp_path, config={"id2label": labels}).class_names() == names


@pytest.mark.parametrize(
    "labels",
    [["a", "b"], {"0": "a", "2": "b"}, {"x": "a"}, {"0": 3}, {"0": ""}, {"0": "a", "00": "b"}, "ab", 3],
)
def test_names_that_are_no_list_of_all_classes_are_refused(tmp_path, labels):
    with pytest.raises(errors.UserError, match=r"config.json: the labels must be a name for each"):
        read(tmp_path, config={"id2label": labels}).class_names()


def test_a_number_that_makes_another_name_is_refused(tmp_path):
    labels = {"0": "crane", "1": "crane", "2": "crane (0)"}
    with pytest.raises(errors.UserError, match=r"the labels have 'crane \(0\)' twice"):
        read(tmp_path, config={"id2label": labels}).class_names()
