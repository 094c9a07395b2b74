"""The presets of the main job: each trains, and those of published recipes hold the published numbers."""

import numpy as np
import pytest
import tensorflow as tf

from configs import deit_tiny_flowers
from deit import config as configuration
from deit import train_step
from deit.data import sources, stream
from deit.models import factory, paths
from deit.teachers import labels
from tests.published import DEIT

UPDATES = 20


class Colours:
    """A teacher that answers by brightness, so that its label differs from the true one."""

    num_classes = 10

    def logits(self, images):
        brightness = tf.reduce_mean(images, [1, 2, 3]) / 25.5
        return -tf.abs(brightness[:, None] - tf.range(10.0)[None])


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["card", "keras_example", "scratch"])
def test_a_preset_overfits_a_fixed_stream_of_64_images_in_20_updates(preset):
    config = deit_tiny_flowers.get_config(preset)
    with config.unlocked():
        config.data.name, config.augment.resize_margin, config.augment.flip = "digits", 0, 0.0
        config.global_batch, config.total_updates = min(64, config.global_batch), UPDATES
    whole = sources.open_source(config.data, "train")
    source = sources.InMemory(*whole.read(np.arange(64)), classes=whole.classes)
    config = configuration.resolve(config, train_size=64, eval_size=1, classes=whole.classes, replicas=1)
    strategy = tf.distribute.OneDeviceStrategy("/cpu:0")
    with strategy.scope():
        network = factory.build(config.model, num_classes=10, image_size=224, precision="float32")
        state = train_step.create_state(config, network)
    update = train_step.make(config, strategy, state)
    label = tf.function(labels.function(config, Colours())) if config.distill.kind != "none" else lambda batch: None
    batches = stream.training(
        source, config, start_update=0, slice_start=0, slice_size=config.global_batch, drop_rates=network.drop_rates
    )
    losses = [float(update(batch, label(batch))[0]) for batch in batches.take(UPDATES)]
    assert np.mean(losses[-5:]) < np.mean(losses[:5]), losses


def test_the_keras_example_has_its_published_9_08_million_parameters():
    config = deit_tiny_flowers.get_config("keras_example")
    network = factory.build(config.model, num_classes=5, image_size=224, precision="float32")
    count = sum(int(np.prod(variable.shape)) for _, variable in paths.variables(network.model))
    assert round(count / 1e6, 2) == 9.08


def test_the_card_preset_holds_the_cards_hyperparameters():
    config = deit_tiny_flowers.get_config("card")
    optim = config.optim
    assert (optim.peak_lr, optim.lr_batch, optim.schedule, optim.warmup_epochs) == (6.25e-5, 0, "constant", 0.0)
    assert (optim.weight_decay, optim.decay_coupled, optim.decay_exclude) == (1e-4, False, False)
    assert (optim.beta_1, optim.beta_2, optim.epsilon, optim.amsgrad) == (0.9, 0.999, 1e-7, False)
    assert (config.global_batch, config.precision, config.model.variant) == (16, "float32", "keras_example")


NOT_THE_PAPERS = {
    "global_batch": 256,  # 1024: one device
    "augment.mix_group": 64,  # the whole batch of a process
    "augment.resize_margin": 20,  # of another crop
}
WITH_A_TEACHER = {"model.variant": "deit_tiny_distilled_patch16_224", "distill.kind": "hard"}
WITHOUT = {"model.variant": "deit_tiny_patch16_224", "distill.kind": "none"}


@pytest.mark.parametrize(("preset", "heads"), [("full", WITH_A_TEACHER), ("full_scratch", WITHOUT)])
def test_the_full_presets_hold_the_published_recipe_field_by_field(preset, heads):
    held = dict(configuration.flatten(deit_tiny_flowers.get_config(preset)))
    expected = {**DEIT, **NOT_THE_PAPERS, **heads}
    assert {name: held[name] for name in expected} == expected
    recipe = {name for name in held if name.split(".")[0] in ("augment", "optim", "loss", "distill")}
    assert recipe <= expected.keys(), "a field of the recipe that this test does not know"
    assert held["teacher.kind"] == ("saved_model" if preset == "full" else "none")


def test_the_full_preset_trains_3871_updates_at_the_rate_of_its_batch():
    config = deit_tiny_flowers.get_config("full")
    resolved = configuration.resolve(config, train_size=3303, eval_size=367, classes="abcde", replicas=1).resolved
    assert resolved.total_updates == 3871  # 300 x 3303 / 256 = 3870.7
    assert resolved.warmup_updates == 65  # 5 x 3303 / 256 = 64.5, of 3871 / 3870.7
    assert resolved.peak_lr == 2.5e-4  # 5e-4 x 256 / 512
