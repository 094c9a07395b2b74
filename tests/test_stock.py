"""The network as Keras' own layers: the same logits, and a file that opens where this package is not."""

import subprocess
import sys

import numpy as np
import pytest

from configs import base
from deit.models import factory, paths, stock

CASES = {
    "DeiT": ("deit_micro_patch4_32", {}, 32),
    "distilled": ("deit_micro_distilled_patch8_32", {}, 32),
    "one head of two tokens": ("deit_micro_distilled_patch8_32", {"heads": "cls"}, 32),
    "registers": ("deit_micro_distilled_patch8_32", {"registers": 3}, 32),
    "DeiT-III": ("deit3_micro_patch8_32", {}, 32),
    "a side that is no multiple": ("deit3_micro_patch8_32", {"mean": (0.1, 0.5, 0.7), "std": (0.3, 0.2, 0.9)}, 37),
    "the Keras example": ("keras_example", {}, 32),
}


def scattered(variant, fields, size):
    c = base.get_config().model
    with c.unlocked():
        c.variant = variant
        c.update_from_flattened_dict(fields)
    network = factory.build(c, num_classes=5, image_size=size, precision="float32")
    rng = np.random.default_rng(1)
    for path, variable in paths.variables(network.model):
        around = 1.0 if path.endswith("gamma") else 0.0
        variable.assign(around + rng.normal(size=variable.shape) * (0.3 if around else 0.1))
    return c, network


def as_stock(c, network):
    tensors = {path: variable.numpy() for path, variable in paths.variables(network.model)}
    size = network.image_size
    return stock.build(tensors, factory.shape_of(c), name="student", image_size=size, mean=c.mean, std=c.std)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_keras_own_layers_give_the_network_s_logits(case):
    c, network = scattered(*case)
    model = as_stock(c, network)
    images = np.random.default_rng(2).uniform(0, 255, [3, case[2], case[2], 3]).astype("f4")
    want, got = network.logits(images), model(images)
    assert got.keys() == want.keys()
    for head in want:
        assert np.abs(want[head]).max() > 0.3
        np.testing.assert_allclose(got[head], want[head], atol=1e-5 * np.abs(want[head]).max(), err_msg=head)
    assert {type(layer).__module__.partition(".")[0] for layer in model.layers} == {"tf_keras"}


def test_the_file_opens_in_a_process_that_has_not_this_package(tmp_path):
    c, network = scattered(*CASES["distilled"])
    as_stock(c, network).save(tmp_path / "model.keras")
    images = np.random.default_rng(2).uniform(0, 255, [2, 32, 32, 3]).astype("f4")
    np.save(tmp_path / "images.npy", images)
    code = (
        "import sys, numpy as np, tf_keras; m = tf_keras.models.load_model('model.keras'); "
        "assert 'deit' not in sys.modules; "
        "np.savez('logits.npz', **{k: v.numpy() for k, v in m(np.load('images.npy')).items()})"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    found = np.load(tmp_path / "logits.npz", allow_pickle=False)
    for head, want in network.logits(images).items():
        np.testing.assert_allclose(found[head], want, atol=1e-5 * np.abs(want).max())
