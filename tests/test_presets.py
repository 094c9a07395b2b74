"""The presets of the main job train: each overfits a fixed stream of 64 images at its full 224 px."""

import numpy as np
import pytest
import tensorflow as tf

from configs import deit_tiny_flowers
from deit import config as configuration
from deit import train_step
from deit.data import sources, stream
from deit.models import factory, paths

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
    update = train_step.make(config, strategy, state, Colours())
    batches = stream.training(
        source, config, start_update=0, slice_start=0, slice_size=config.global_batch, drop_rates=network.drop_rates
    )
    losses = [float(update(batch)[0]) for batch in batches.take(UPDATES)]
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
