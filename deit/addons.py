"""The only door to tensorflow-addons (its last release, 0.23, imports with TensorFlow 2.13 to 2.15)."""

import warnings

from deit import keras  # noqa: F401  tensorflow-addons subclasses tf.keras, which must be tf_keras

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # its end-of-life notice, at every import
    from tensorflow_addons.optimizers import AdamW  # noqa: F401
