"""The family's sizes against the published numbers, DeiT-III against a NumPy twin of its own, register tokens."""

import dataclasses
import math

import numpy as np
import pytest

from configs import base
from deit import errors
from deit.models import deit, factory, paths, variants
from tests.published import PARAMETERS
from tools import peer_packages

# design of arXiv:2012.12877: trunk alone
WITHOUT_HEADS = {
    "deit_tiny_distilled_patch16_224": 5_524_800,
    "deit_small_distilled_patch16_224": 21_666_432,
    "deit_base_distilled_patch16_224": 85_800_192,
    "deit_base_distilled_patch16_384": 86_092_032,
}

# (dim, depth, heads, patch, tokens before the patches, whether these have positions): no parameter count shows heads.
SIZES = {
    "deit_tiny_patch16_224": (192, 12, 3, 16, 1, True),
    "deit_tiny_distilled_patch16_224": (192, 12, 3, 16, 2, True),
    "deit_small_patch16_224": (384, 12, 6, 16, 1, True),
    "deit_small_distilled_patch16_224": (384, 12, 6, 16, 2, True),
    "deit_base_patch16_224": (768, 12, 12, 16, 1, True),
    "deit_base_distilled_patch16_224": (768, 12, 12, 16, 2, True),
    "deit_base_patch16_384": (768, 12, 12, 16, 1, True),
    "deit_base_distilled_patch16_384": (768, 12, 12, 16, 2, True),
    "deit3_small_patch16_224": (384, 12, 6, 16, 1, False),
    "deit3_small_patch16_384": (384, 12, 6, 16, 1, False),
    "deit3_medium_patch16_224": (512, 12, 8, 16, 1, False),
    "deit3_base_patch16_224": (768, 12, 12, 16, 1, False),
    "deit3_base_patch16_384": (768, 12, 12, 16, 1, False),
    "deit3_large_patch16_224": (1024, 24, 16, 16, 1, False),
    "deit3_large_patch16_384": (1024, 24, 16, 16, 1, False),
    "deit3_huge_patch14_224": (1280, 32, 16, 14, 1, False),
    "deit_micro_patch4_32": (64, 4, 2, 4, 1, True),
    "deit_micro_distilled_patch4_32": (64, 4, 2, 4, 2, True),
    "deit_micro_patch8_32": (64, 4, 2, 8, 1, True),
    "deit_micro_distilled_patch8_32": (64, 4, 2, 8, 2, True),
    "deit3_micro_patch8_32": (64, 4, 2, 8, 1, False),
}


def model_config(variant, **fields):
    config = base.get_config().model
    config.variant = variant
    for name, value in fields.items():
        config[name] = value
    return config


def build(variant, *, size=32, classes=5, **fields):
    return factory.build(model_config(variant, **fields), num_classes=classes, image_size=size, precision="float32")


def counts(variant):
    """Return (all parameters, those of the trunk): one block is built, the others have the same shapes."""
    shape = variants.of_name(variant)
    model, _ = deit.build(
        dataclasses.replace(shape, depth=1), "one", num_classes=1000, image_size=variants.size_of(variant),
        mean=[0] * 3, std=[1] * 3, drop_path=0.0, policy="float32", fused_gradients=True,
    )  # fmt: skip
    sizes = {path: math.prod(v.shape) for path, v in paths.variables(model)}
    block = sum(n for path, n in sizes.items() if path.startswith("blocks/0/"))
    total = sum(sizes.values()) + (shape.depth - 1) * block
    return total, total - sum(n for path, n in sizes.items() if path.startswith("head"))


@pytest.mark.parametrize("variant", PARAMETERS)
def test_parameter_counts_are_the_published_ones(variant):
    total, trunk = counts(variant)
    assert total == PARAMETERS[variant]
    assert trunk == WITHOUT_HEADS.get(variant, trunk)


def sizes(name):
    shape = variants.of_name(name)
    return shape.dim, shape.depth, shape.num_heads, shape.patch, shape.prefix, shape.prefix_slots


def test_there_are_these_variants_and_no_others_and_their_sizes_are_the_published_ones():
    assert {name: sizes(name) for name in variants.names()} == SIZES
    assert {name for name in SIZES if "_micro_" not in name} == PARAMETERS.keys()


@pytest.mark.skipif(
    bool(peer_packages.missing()), reason=f"{', '.join(peer_packages.missing())} not installed: pip install '.[peers]'"
)
def test_every_published_name_is_timm_s_and_so_are_its_sizes():
    torch, timm, _ = peer_packages.load()
    published = {name for name in variants.names() if "_micro_" not in name}
    assert published == set(timm.list_models(["deit_*", "deit3_*"]))
    for name in published:
        with torch.device("meta"):
            model = timm.create_model(name)
        block, shape = model.blocks[0], variants.of_name(name)
        patch, sides = model.patch_embed.patch_size, model.patch_embed.img_size
        with_positions = model.pos_embed.shape[1] > model.patch_embed.num_patches
        found = (model.embed_dim, len(model.blocks), block.attn.num_heads, patch[0], model.num_prefix_tokens)
        assert (*found, with_positions) == sizes(name), name
        assert sides[0] == variants.size_of(name) and block.norm1.eps == shape.norm_epsilon
        assert hasattr(block.ls1, "gamma") == bool(shape.layer_scale)
        assert sum(value.numel() for value in model.parameters()) == PARAMETERS[name]


def test_a_name_at_another_resolution_is_one_that_exists_or_none():
    assert variants.at_size("deit_base_patch16_224.fb_in1k", 384) == "deit_base_patch16_384"
    assert variants.at_size("deit_tiny_patch16_224", 384) == ""


def test_a_tag_of_weights_says_nothing_about_the_network_and_an_unknown_name_is_told_its_neighbours():
    assert variants.of_name("deit3_small_patch16_224.fb_in22k_ft_in1k") == variants.of_name("deit3_small_patch16_224")
    with pytest.raises(
        errors.UserError, match=r"deit3_smal_patch16_224.* is unknown; nearest: deit3_small_patch16_224"
    ):
        build("deit3_smal_patch16_224")


def test_drop_path_is_constant_in_deit_iii_and_linear_in_deit():
    np.testing.assert_allclose(build("deit3_micro_patch8_32", drop_path=0.3).drop_rates, [0.3] * 8)
    np.testing.assert_allclose(
        build("deit_micro_patch8_32", drop_path=0.3).drop_rates, np.repeat([0, 0.1, 0.2, 0.3], 2)
    )


@pytest.mark.parametrize(
    "fields, tokens",
    [
        ({"patch": 16}, {"pos_embed": 1 + 4}),
        ({"patch": 4}, {"pos_embed": 1 + 64}),
        ({"registers": 4}, {"pos_embed": 1 + 4 + 16, "reg_token": 4}),
    ],
)
def test_patch_and_registers_are_parameters(fields, tokens):
    found = {p.rpartition("/")[2]: v for p, v in paths.variables(build("deit_micro_patch8_32", **fields).model)}
    assert {name: found[name].shape[1] for name in tokens} == tokens


def test_deit_iii_gives_the_prefix_no_position():
    found = dict(paths.variables(build("deit3_micro_patch8_32", registers=2).model))
    assert found["tokens/pos_embed"].shape[1] == 16 and found["tokens/reg_token"].shape[1] == 2


def test_layer_scale_starts_at_its_value_and_does_not_decay():
    found = dict(paths.variables(build("deit3_micro_patch8_32").model))
    for branch in ("ls1", "ls2"):
        path = f"blocks/3/{branch}/gamma"
        np.testing.assert_array_equal(found[path], np.full([64], 1e-4, np.float32))
        assert paths.no_decay(path, found[path])
    assert paths.no_decay("tokens/reg_token", found["tokens/pos_embed"])


def test_a_distilled_network_may_answer_with_its_class_head_only():
    two = build("deit_micro_distilled_patch8_32")
    one = build("deit_micro_distilled_patch8_32", heads="cls")
    assert list(two.model.output) == ["cls", "dist"] and list(one.model.output) == ["cls"]
    values = {path: variable.numpy() for path, variable in paths.variables(two.model)}
    kept = {path: value for path, value in values.items() if not path.startswith("head_dist/")}
    paths.assign(paths.variables(one.model), kept)
    images = np.random.default_rng(0).uniform(0, 255, [2, 32, 32, 3]).astype(np.float32)
    # The distillation token is still there, and the class token attends to it.
    np.testing.assert_allclose(one.logits(images)["cls"], two.logits(images)["cls"], atol=1e-5)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"patch": 33}, r"data.image_size \(32\) must be at least model.patch \(33\)"),
        ({"variant": "groupnorm_resnet", "registers": 1}, r"model.registers \(1\) is for DeiT's variants"),
        ({"variant": "keras_example", "heads": "cls"}, r"model.heads \(cls\) is for DeiT's variants"),
    ],
)
def test_what_does_not_go_together_is_refused(fields, message):
    config = model_config(**{"variant": "deit_micro_patch8_32", **fields})
    with pytest.raises(errors.UserError, match=message):
        factory.check(config, 32)


def test_what_no_whole_patch_covers_at_the_right_and_the_bottom_is_not_seen():
    c = base.get_config().model
    c.variant = "deit_micro_patch8_32"
    network = factory.build(c, num_classes=3, image_size=36, precision="float32")
    inner = factory.build(c, num_classes=3, image_size=32, precision="float32")
    images = np.random.default_rng(0).uniform(0, 255, [2, 36, 36, 3]).astype(np.float32)
    expected = inner.logits(images[:, :32, :32])["cls"].numpy()
    np.testing.assert_allclose(network.logits(images)["cls"], expected, rtol=1e-5, atol=1e-6)


def test_a_network_that_is_only_counted_draws_no_initial_value(monkeypatch):
    from deit import keras

    monkeypatch.setattr(keras.initializers.TruncatedNormal, "__call__", lambda *_, **__: pytest.fail("drawn"))
    c = base.get_config().model
    c.variant = "deit_micro_patch8_32"
    network = factory.build(c, num_classes=3, image_size=32, precision="float32", load_weights=False)
    assert not any(v.numpy().any() for _, v in paths.variables(network.model))
    with pytest.raises(BaseException, match="drawn"):
        factory.build(c, num_classes=3, image_size=32, precision="float32")


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_layer_scale_and_positions_of_patches_alone_equal_their_formulas(fused):
    """x + p before the class token joins; each branch times its gamma: one block against NumPy."""
    shape = dataclasses.replace(variants.of_name("deit3_micro_patch8_32"), depth=1)
    model, train_model = deit.build(
        shape, "one", num_classes=3, image_size=16, mean=[0.4] * 3, std=[0.2] * 3, drop_path=0.5, policy="float32",
        fused_gradients=fused,
    )  # fmt: skip
    random, w = np.random.default_rng(1), {}
    for path, variable in paths.variables(model):
        w[path] = random.normal(0, 0.2, variable.shape) + path.endswith("norm1/gamma")
        variable.assign(w[path].astype(np.float32))
    images = random.uniform(0, 255, [2, 16, 16, 3]).astype(np.float32)
    x = (images.astype(np.float64) / 255 - 0.4) / 0.2
    squares = [x[:, 8 * i : 8 * i + 8, 8 * j : 8 * j + 8] for i in range(2) for j in range(2)]
    patches = [np.einsum("bhwc,hwcd->bd", s, w["patch_embed/proj/kernel"]) for s in squares]
    x = np.stack(patches, 1) + w["patch_embed/proj/bias"] + w["tokens/pos_embed"]
    x = np.concatenate([np.repeat(w["tokens/cls_token"], 2, 0), x], 1)

    def norm(x, name):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
        return x * w[f"{name}/gamma"] + w[f"{name}/beta"]

    def dense(x, name):
        return x @ w[f"{name}/kernel"] + w[f"{name}/bias"]

    def attention(x):
        heads = []
        q, k, v = np.split(dense(x, "blocks/0/attn/qkv"), 3, -1)
        for part in np.split(np.arange(64), 2):
            scores = np.exp(q[..., part] @ k[..., part].swapaxes(1, 2) / math.sqrt(32))
            heads.append(scores / scores.sum(-1, keepdims=True) @ v[..., part])
        return dense(np.concatenate(heads, -1), "blocks/0/attn/proj")

    def mlp(x):
        x = dense(x, "blocks/0/mlp/fc1")
        return dense(x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2))), "blocks/0/mlp/fc2")

    keep = np.array([[1.0, 0.0], [0.0, 1.0]])  # kept branches count double at a rate of a half
    plain = dropped = x
    for i, branch in enumerate(
        (lambda x: attention(norm(x, "blocks/0/norm1")), lambda x: mlp(norm(x, "blocks/0/norm2")))
    ):
        gamma = w[f"blocks/0/ls{i + 1}/gamma"]
        plain = plain + gamma * branch(plain)
        dropped = dropped + gamma * branch(dropped) * keep[:, i, None, None] / 0.5
    for got, want in ((model(images), plain), (train_model({"image": images, "drop": keep}), dropped)):
        np.testing.assert_allclose(got["cls"], dense(norm(want, "norm")[:, 0], "head"), rtol=1e-4, atol=1e-4)
