"""Weight files that are not what their names say: refused in one line, and no pickle runs code."""

import argparse
import collections
import re

import numpy as np
import pytest
import safetensors.numpy

from deit import errors, weights_file
from tools import peer_packages

needs_torch = pytest.mark.skipif(
    "torch" in peer_packages.missing(),
    reason="torch not installed: pip install -e '.[peers]' runs the tests of .pth files",
)


def save(path, content, *, zipped=True):
    import torch

    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    return path


def tensors():
    import torch

    return {f"blocks.{i}.norm.weight": torch.arange(5.0) + i for i in range(4)}


def refused(path):
    """Return the line with which a file is refused; None where it is read."""
    try:
        weights_file.read(path)
    except errors.UserError as error:
        assert "\n" not in str(error) and not re.search(r"weights_only|trust", str(error)), error
        return str(error)
    return None


def test_safetensors_cut_short_at_any_byte_or_with_a_bit_flipped_are_one_line_or_read(tmp_path):
    path = tmp_path / "x.safetensors"
    safetensors.numpy.save_file({"a": np.arange(6, dtype=np.float32), "b": np.ones([2, 2], np.float32)}, path)
    whole = path.read_bytes()
    for end in range(len(whole)):
        path.write_bytes(whole[:end])
        assert "is no whole safetensors file" in refused(path), end
    for at in range(len(whole)):
        for bit in (0, 3, 7):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << bit]) + whole[at + 1 :])
            refused(path)  # raises whatever is no UserError


@needs_torch
def test_a_tensor_that_is_larger_than_what_the_file_holds_is_named_and_not_made(tmp_path):
    import torch

    path = save(tmp_path / "x.pth", {"a": torch.zeros(1).expand(10_000_000, 10_000_000)})
    assert "a has shape [10000000, 10000000], more than any network" in refused(path)


def test_a_checkpoint_of_ours_is_told_the_other_direction(tmp_path):
    for name in ("run", "ckpt"):
        (tmp_path / name).mkdir()
    (tmp_path / "run" / "checkpoints").mkdir()
    (tmp_path / "ckpt" / "manifest.json").write_text("{}")
    for name in ("run", "ckpt"):
        assert "is a run or checkpoint of this code base: --to=" in refused(tmp_path / name)


@needs_torch
@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_cut_short_or_with_a_bit_flipped_is_one_line_or_read(tmp_path, zipped):
    path = save(tmp_path / "x.pth", {"model": tensors(), "args": argparse.Namespace(lr=1.0)}, zipped=zipped)
    whole, random = path.read_bytes(), np.random.default_rng(0)
    for end in (*range(0, len(whole), 7), len(whole) - 1):
        path.write_bytes(whole[:end])
        said = refused(path)
        assert said is None if end == len(whole) else said and "x.pth" in said, end
    for at in random.integers(0, len(whole), 400):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << int(random.integers(8))]) + whole[at + 1 :])
        refused(path)


@needs_torch
@pytest.mark.parametrize("zipped", [True, False])
def test_a_training_checkpoint_of_facebookresearch_deit_is_read_with_its_arguments_in_it(tmp_path, zipped, caplog):
    caplog.set_level("INFO", logger="absl")
    content = {"model": tensors(), "model_ema": tensors(), "epoch": 299, "args": argparse.Namespace(lr=5e-4, seed=0)}
    read = weights_file.read(save(tmp_path / "checkpoint.pth", content, zipped=zipped))
    np.testing.assert_array_equal(read["blocks.2.norm.weight"], np.arange(5) + 2)
    assert "`model` is taken; `model_ema`, its average, is left alone" in caplog.text


class Refused:
    """A class that no file of weights needs."""


@needs_torch
@pytest.mark.parametrize("zipped", [True, False])
def test_what_is_refused_is_named_and_nobody_is_told_to_trust_it(tmp_path, zipped):
    said = refused(save(tmp_path / "x.pth", {"model": tensors(), "by": Refused()}, zipped=zipped))
    assert said == (
        f"{tmp_path / 'x.pth'} holds no plain tensors, and nothing else is loaded: it asks for "
        f"{Refused.__module__}.Refused"
    )
    (tmp_path / "y.pth").write_bytes(b"PK\x03\x04 no archive")
    assert refused(tmp_path / "y.pth").endswith("it is cut short or no file of torch.save")


@needs_torch
def test_parameters_are_read_and_what_is_no_dense_tensor_of_a_name_is_named(tmp_path):
    import torch

    path = tmp_path / "x.pth"
    read = weights_file.read(save(path, {"a": torch.nn.Parameter(torch.ones(2))}))
    np.testing.assert_array_equal(read["a"], [1, 1])
    read = weights_file.read(save(path, collections.OrderedDict(a=torch.ones(2).expand(3, 2))))
    assert read["a"].shape == (3, 2)
    for content, message in (
        ({"a": torch.eye(2).to_sparse()}, "a must be a dense tensor, not torch.sparse_coo"),
        ({"a": torch.ones(2, device="meta")}, "a must be a dense tensor, not meta"),
        ({3: torch.ones(2)}, "the key 3 must be the name of a tensor"),
        ({"a": torch.ones(2, dtype=torch.float16)}, "a is torch.float16, not float32"),
        ({"a": 1.0}, "a must be a tensor, not float"),
        ([torch.ones(2)], "must hold a dict of tensors by name, not list"),
    ):
        assert message in refused(save(path, content))


def test_a_directory_with_a_pickle_alone_is_answered_by_its_name(tmp_path):
    with pytest.raises(errors.UserError, match=r"model.safetensors is no file$"):
        weights_file.file_of(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(errors.UserError, match=r"are a pickle: --from=.*/pytorch_model.bin$"):
        weights_file.file_of(tmp_path)
