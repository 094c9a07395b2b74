"""The same weights and pictures give the same logits in timm and in transformers; weights come back bit for bit.

Skipped where torch, timm or transformers is not installed; tools/weight_parity.py prints the whole table.
"""

import numpy as np
import pytest

from deit.models import variants
from tools import peer_packages, peers

pytestmark = pytest.mark.skipif(
    bool(peer_packages.missing()),
    reason=f"{', '.join(peer_packages.missing())} not installed: pip install -e '.[peers]'",
)
LARGE = ("_base_", "_medium_", "_large_", "_huge_")
SMALL = [case for case in peers.CASES if not any(size in case.variant for size in LARGE)]


def check(case):
    row = peers.compare(case)
    assert row.agrees, row
    assert row.largest > 0.5  # a network that answers nothing would agree with anything
    assert row.round_trip is (True if case.size == variants.size_of(case.variant) else None)


@pytest.mark.parametrize(
    "case", [case for case in SMALL if "_tiny_" in case.variant or "deit3" in case.variant], ids=str
)
def test_logits_of_every_head_are_those_of_the_peer(case):
    check(case)


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        *(peers.Case(name, "timm", 224) for name in ("deit_small_distilled_patch16_224", "deit_base_patch16_224")),
        peers.Case("deit_base_distilled_patch16_384", "timm", 384),
        peers.Case("deit3_medium_patch16_224", "timm", 288),
        peers.Case("deit3_base_patch16_224", "timm", 224),
        peers.Case("deit_base_distilled_patch16_224", "huggingface", 224),
    ],
    ids=str,
)
def test_logits_of_larger_networks_are_those_of_the_peer(case):
    """One of each kind; tools/weight_parity.py has them all, large and huge too."""
    assert case in peers.CASES
    check(case)


@pytest.mark.parametrize("distilled", [False, True])
def test_register_tokens_and_another_patch_are_timms(tmp_path, distilled):
    """timm's distilled class has no register tokens; its plain one has, with positions of the prefix."""
    import safetensors.torch

    from deit import convert, saved

    torch, timm, _ = peer_packages.load()
    options = {"img_size": 32, "patch_size": 4, "embed_dim": 64, "depth": 4, "num_heads": 2, "num_classes": 3}
    if distilled:
        model = timm.models.deit.VisionTransformerDistilled(**options)
    else:
        model = timm.models.VisionTransformer(**options, reg_tokens=4)
    peers.scatter(model)
    safetensors.torch.save_file(model.state_dict(), tmp_path / "theirs.safetensors")
    variant = f"deit_micro{'_distilled' if distilled else ''}_patch8_32"
    convert.load(
        tmp_path / "theirs.safetensors", tmp_path / "ours", variant=variant, patch=4, registers=0 if distilled else 4
    )
    images = peers.pictures(2, 32)
    got = saved.open_network(tmp_path / "ours").network.logits(images)
    expected = peers.timm_logits(model, images)
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(got[name], value, atol=peers.WITHIN)


def test_a_pickle_of_tensors_is_read_and_one_with_code_in_it_is_refused(tmp_path):
    import pickle

    from deit import errors, weights_file

    torch, _, _ = peer_packages.load()
    tensors = {"patch_embed.proj.weight": torch.arange(6.0).reshape(2, 3).T}
    torch.save({"model": tensors, "epoch": 3}, tmp_path / "plain.pth")
    read = weights_file.read(tmp_path / "plain.pth")
    np.testing.assert_array_equal(read["patch_embed.proj.weight"], [[0, 3], [1, 4], [2, 5]])

    class Evil:
        def __reduce__(self):
            return (pytest.fail, ("code in a weights file was run",))

    (tmp_path / "evil.pth").write_bytes(pickle.dumps({"model": Evil()}))
    torch.save({"model": Evil()}, tmp_path / "evil2.pth")
    torch.save({"model": {"head.weight": torch.zeros(2, dtype=torch.float16)}}, tmp_path / "half.pth")
    for name, message in (
        ("evil.pth", "holds no plain tensors, and nothing else is loaded"),
        ("evil2.pth", "holds no plain tensors, and nothing else is loaded"),
        ("half.pth", r"head.weight is torch.float16, not float32"),
    ):
        with pytest.raises(errors.UserError, match=message):
            weights_file.read(tmp_path / name)
