"""Names, axes and joins of the layouts, written out by hand; what does not fit is named."""

import dataclasses

import numpy as np
import pytest

from deit import errors
from deit.models import layouts, variants

SHAPE = variants.of_name("deit_micro_distilled_patch8_32")
RANDOM = np.random.default_rng(0)
DIM, SIZE = 64, 32


def block(name, *shape):
    return {name: RANDOM.normal(size=shape).astype(np.float32)}


def timm(*, distilled=True, deit3=False, classes=3):
    """Return a timm state dict of the micro network, name by name as timm has them."""
    slots = 0 if deit3 else 1 + distilled
    w = {**block("cls_token", 1, 1, DIM), **block("pos_embed", 1, slots + 16, DIM)}
    w |= {**block("patch_embed.proj.weight", DIM, 3, 8, 8), **block("patch_embed.proj.bias", DIM)}
    for i in range(4):
        for norm in ("norm1", "norm2"):
            w |= {**block(f"blocks.{i}.{norm}.weight", DIM), **block(f"blocks.{i}.{norm}.bias", DIM)}
        for layer, units, given in (
            ("attn.qkv", 3 * DIM, DIM), ("attn.proj", DIM, DIM), ("mlp.fc1", 4 * DIM, DIM), ("mlp.fc2", DIM, 4 * DIM)
        ):  # fmt: skip
            w |= {**block(f"blocks.{i}.{layer}.weight", units, given), **block(f"blocks.{i}.{layer}.bias", units)}
        if deit3:
            w |= {**block(f"blocks.{i}.ls1.gamma", DIM), **block(f"blocks.{i}.ls2.gamma", DIM)}
    w |= {**block("norm.weight", DIM), **block("norm.bias", DIM)}
    w |= {**block("head.weight", classes, DIM), **block("head.bias", classes)}
    if distilled:
        w |= {**block("dist_token", 1, 1, DIM), **block("head_dist.weight", classes, DIM)}
        w |= block("head_dist.bias", classes)
    return w


def to_own(w, shape=SHAPE, *, layout="timm", size=SIZE, classes=3):
    return layouts.to_own(w, shape, layout=layout, image_size=size, num_classes=classes)


def test_a_kernel_is_the_weight_transposed_and_a_patch_projection_is_height_width_in_out():
    w = timm()
    own = to_own(w)
    np.testing.assert_array_equal(own["blocks/2/mlp/fc1/kernel"], w["blocks.2.mlp.fc1.weight"].T)
    np.testing.assert_array_equal(own["head_dist/kernel"], w["head_dist.weight"].T)
    kernel = own["patch_embed/proj/kernel"]
    assert kernel.shape == (8, 8, 3, DIM)
    assert kernel[1, 2, 0, 5] == w["patch_embed.proj.weight"][5, 0, 1, 2]
    np.testing.assert_array_equal(own["norm/gamma"], w["norm.weight"])
    np.testing.assert_array_equal(own["tokens/pos_embed"], w["pos_embed"])


def huggingface(w, *, distilled=True):
    """Return timm tensors as transformers has them, by a table of its own."""
    root = "deit" if distilled else "vit"
    names = {
        "cls_token": f"{root}.embeddings.cls_token",
        "dist_token": f"{root}.embeddings.distillation_token",
        "pos_embed": f"{root}.embeddings.position_embeddings",
        "norm.weight": f"{root}.layernorm.weight",
        "norm.bias": f"{root}.layernorm.bias",
        "head_dist.weight": "distillation_classifier.weight",
        "head_dist.bias": "distillation_classifier.bias",
    }
    result = {}
    for name, value in w.items():
        parts = name.split(".")
        if name in names:
            result[names[name]] = value
        elif parts[0] == "head":
            result[f"{'cls_' if distilled else ''}classifier.{parts[1]}"] = value
        elif parts[0] == "patch_embed":
            result[f"{root}.embeddings.patch_embeddings.projection.{parts[2]}"] = value
        elif parts[2:4] == ["attn", "qkv"]:
            for part, third in zip(("query", "key", "value"), np.split(value, 3)):
                result[f"{root}.encoder.layer.{parts[1]}.attention.attention.{part}.{parts[4]}"] = third
        else:
            inner = {"norm1": "layernorm_before", "norm2": "layernorm_after", "attn.proj": "attention.output.dense",
                     "mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense"}[".".join(parts[2:-1])]  # fmt: skip
            result[f"{root}.encoder.layer.{parts[1]}.{inner}.{parts[-1]}"] = value
    return result


@pytest.mark.parametrize("distilled", [True, False])
def test_q_k_and_v_of_transformers_are_joined(distilled):
    w = timm(distilled=distilled)
    shape = SHAPE if distilled else variants.of_name("deit_micro_patch8_32")
    own, same = to_own(w, shape), to_own(huggingface(w, distilled=distilled), shape, layout="huggingface")
    assert own.keys() == same.keys()
    for name, value in own.items():
        np.testing.assert_array_equal(same[name], value)


def test_names_in_memory_of_transformers_5_are_known_too():
    w = huggingface(timm())
    renamed = {}
    for name, value in w.items():
        for old, new in (
            ("encoder.layer", "layers"), ("attention.attention.query", "attention.q_proj"),
            ("attention.attention.key", "attention.k_proj"), ("attention.attention.value", "attention.v_proj"),
            ("attention.output.dense", "attention.o_proj"), ("intermediate.dense", "mlp.fc1"),
        ):  # fmt: skip
            name = name.replace(old, new)
        renamed[name.replace(".output.dense.", ".mlp.fc2.")] = value
    assert "deit.layers.3.mlp.fc2.bias" in renamed and "deit.layers.0.attention.o_proj.weight" in renamed
    own, same = to_own(w, layout="huggingface"), to_own(renamed, layout="huggingface")
    assert all(np.array_equal(own[name], same[name]) for name in own)


@pytest.mark.parametrize("layout", ["timm", "facebook", "huggingface"])
@pytest.mark.parametrize("variant", ["deit_micro_distilled_patch8_32", "deit_micro_patch8_32", "deit3_micro_patch8_32"])
def test_out_and_back_is_bitwise_equal(layout, variant):
    shape, deit3 = variants.of_name(variant), variant.startswith("deit3")
    own = to_own(timm(distilled=shape.distilled, deit3=deit3), shape)
    sizes = {"layout": layout, "image_size": SIZE, "num_classes": 3}
    if deit3 and layout == "huggingface":
        with pytest.raises(errors.UserError, match="transformers has no DeiT-III"):
            layouts.from_own(own, shape, **sizes)
        return
    foreign = layouts.from_own(own, shape, **sizes)
    assert layouts.detect(list(foreign)) == ("timm" if layout == "facebook" and not deit3 else layout)
    assert layouts.classes(foreign, layout) == 3
    back = layouts.to_own(foreign, shape, **sizes)
    assert own.keys() == back.keys() and all(own[name].tobytes() == back[name].tobytes() for name in own)


def test_facebook_s_scales_have_other_names():
    w = timm(distilled=False, deit3=True)
    renamed = {n.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2"): v for n, v in w.items()}
    assert layouts.detect(list(renamed)) == "facebook"
    own = to_own(renamed, variants.of_name("deit3_micro_patch8_32"), layout="facebook")
    np.testing.assert_array_equal(own["blocks/3/ls2/gamma"], w["blocks.3.ls2.gamma"])


def test_the_grid_is_resized_to_the_resolution_and_equal_sizes_are_left_alone():
    w = timm()
    assert to_own(w, size=64)["tokens/pos_embed"].shape == (1, 2 + 64, DIM)
    np.testing.assert_array_equal(to_own(w, size=64)["tokens/pos_embed"][:, :2], w["pos_embed"][:, :2])


def test_heads_are_left_out_where_none_are_wanted():
    own = to_own(timm(), classes=0)
    assert not any(name.startswith("head") for name in own)
    assert "blocks/3/mlp/fc2/bias" in own


def changed(**changes):
    w = {**timm(), **changes}
    return {name: value for name, value in w.items() if value is not None}


@pytest.mark.parametrize(
    "w, message",
    [
        (changed(**{"head_dist.weight": None}), r"missing head_dist.weight"),
        (changed(**{"dist_token": None}), r"missing dist_token"),
        (changed(extra=np.zeros(3, np.float32)), r"left over extra"),
        (changed(**{"norm.bias": np.zeros(63, np.float32)}), r"norm.bias has shape \[63\], not \[64\]"),
        (
            changed(**{"patch_embed.proj.weight": np.zeros([DIM, 3, 16, 16], np.float32)}),
            r"patch_embed.proj.weight has shape \[64, 3, 16, 16\], not \[64, 3, 8, 8\]",
        ),
        (changed(**{"cls_token": np.zeros([1, 1, DIM], np.float16)}), r"cls_token is float16, not float32"),
        (
            changed(pos_embed=np.zeros([1, 2 + 12, DIM], np.float32)),
            r"pos_embed has a grid of 12 patches, which is not square",
        ),
        (changed(pos_embed=np.zeros([1, 18, DIM], np.float64)), r"pos_embed is float64, not float32"),
    ],
)
def test_what_does_not_fit_is_named(w, message):
    with pytest.raises(errors.UserError, match=message):
        to_own(w)


def test_many_problems_are_counted_and_a_file_of_no_layout_is_told():
    w = {name: value for name, value in timm().items() if not name.startswith("blocks.3")}
    with pytest.raises(errors.UserError, match=r"missing blocks.3.attn.proj.bias; .* and 4 more$"):
        to_own(w)
    with pytest.raises(errors.UserError, match=r"no layout that is known .*: it has a, b"):
        layouts.detect(["b", "a"])


def test_a_network_that_a_layout_does_not_have_is_refused():
    one_head = dataclasses.replace(SHAPE, two_heads=False)
    with pytest.raises(errors.UserError, match="timm has no distilled network with one head"):
        list(layouts.entries(one_head, layout="timm", image_size=32, num_classes=3))
    names = [
        name for e in layouts.entries(one_head, layout="huggingface", image_size=32, num_classes=3) for name in e.names
    ]
    assert "classifier.weight" in names and "cls_classifier.weight" not in names


def test_names_that_no_layout_has_twice_are_refused_by_both():
    w = huggingface(timm())
    w["deit.layers.1.mlp.fc1.bias"] = w["deit.encoder.layer.1.intermediate.dense.bias"]
    with pytest.raises(errors.UserError, match=r"deit.encoder.* and deit.layers.1.mlp.fc1.bias are two names of one"):
        to_own(w, layout="huggingface")


@pytest.mark.parametrize("distilled", [True, False])
@pytest.mark.parametrize("since_5", [True, False])
def test_a_base_model_of_transformers_has_no_prefix_and_a_pooler_that_is_left_out(distilled, since_5):
    shape = SHAPE if distilled else variants.of_name("deit_micro_patch8_32")
    w = timm(distilled=distilled)
    theirs = huggingface(w, distilled=distilled)
    theirs = {name.partition(".")[2]: v for name, v in theirs.items() if name.startswith(("deit.", "vit."))}
    theirs |= {**block("pooler.dense.weight", DIM, DIM), **block("pooler.dense.bias", DIM)}
    if since_5:
        theirs = {name.replace("encoder.layer.", "layers."): value for name, value in theirs.items()}
    assert layouts.detect(list(theirs)) == "huggingface"
    assert layouts.poolers(theirs, "huggingface") == ["pooler.dense.bias", "pooler.dense.weight"]
    own = to_own(theirs, shape, layout="huggingface", classes=0)
    expected = to_own(w, shape, classes=0)
    assert own.keys() == expected.keys() and all(np.array_equal(own[name], expected[name]) for name in own)
    assert layouts.grid(theirs, shape, "huggingface") == 4
    assert layouts.poolers(["pooler.dense.weight"], "timm") == []


@pytest.mark.parametrize("name", ["pos_embed", "norm.weight", "head.weight"])
def test_a_scalar_where_a_tensor_belongs_is_named(name):
    with pytest.raises(errors.UserError, match=rf"{name} has shape \[\], not"):
        w = changed(**{name: np.float32(1.0).reshape([])})
        to_own(w, classes=layouts.classes(w, "timm"))


@pytest.mark.parametrize(
    "layout, variant, message",
    [
        ("facebook", "deit_micro_patch8_32", "facebookresearch/deit has no register tokens"),
        ("timm", "deit_micro_distilled_patch8_32", "timm has no register tokens .* in a distilled network"),
        ("huggingface", "deit_micro_patch8_32", "no register tokens"),
    ],
)
def test_register_tokens_are_refused_where_a_code_base_has_none(layout, variant, message):
    shape = dataclasses.replace(variants.of_name(variant), registers=2)
    with pytest.raises(errors.UserError, match=message):
        list(layouts.entries(shape, layout=layout, image_size=32, num_classes=3))
