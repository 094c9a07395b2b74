"""The same weights and pictures give the same logits in timm and in transformers; weights come back bit for bit.

Skipped where torch, timm or transformers is not installed; tools/weight_parity.py prints the whole table.
"""

import numpy as np
import pytest

from deit.models import variants
from tools import peers

pytestmark = pytest.mark.skipif(
    bool(peers.missing()), reason=f"{', '.join(peers.missing())} not installed: pip install -e '.[peers]'"
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
    [c for c in peers.CASES if "_huge_" not in c.variant and "_large_" not in c.variant and "_tiny_" not in c.variant],
    ids=str,
)
def test_logits_of_the_larger_networks_are_those_of_the_peer(case):
    check(case)


@pytest.mark.parametrize("distilled", [False, True])
def test_register_tokens_and_another_patch_are_timms(tmp_path, distilled):
    """timm's distilled class has no register tokens; its plain one has, with positions of the prefix."""
    import safetensors.torch

    from deit import convert, saved

    torch, timm, _ = peers.load()
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

    torch, _, _ = peers.load()
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


def test_the_line_that_export_prints_opens_the_file_in_timm(tmp_path, monkeypatch):
    """A student of the quickstart's size, and a published variant: the printed call is run as it is."""
    from deit import convert, saved
    from tests import family

    torch, timm, _ = peers.load()
    images = peers.pictures(2, 32)
    for name, fields in (
        ("deit_micro_distilled_patch8_32", {}),
        ("deit3_micro_patch8_32", {}),
        ("deit_tiny_distilled_patch16_224", {"patch": 4}),
    ):
        ckpt = family.checkpoint(tmp_path / name, name, size=32, **fields)
        line = convert.export(ckpt, tmp_path / f"{name}.safetensors", layout="timm")
        monkeypatch.chdir(tmp_path)
        scope = {"timm": timm}
        import safetensors.torch

        scope["safetensors"] = safetensors
        call = line.partition(": ")[2]
        exec(call if call.startswith("model =") else f"model = {call}", scope)
        got = peers.timm_logits(scope["model"].eval(), images)
        for head, value in saved.open_network(ckpt).network.logits(images).items():
            np.testing.assert_allclose(got[head], value, atol=peers.WITHIN)
