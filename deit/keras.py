"""The only door to legacy Keras (tf_keras 2.15): a move to another Keras starts and ends here.

tensorflow-addons subclasses `tf.keras`' legacy optimizers, so `tf.keras` must be tf_keras; TensorFlow reads
TF_USE_LEGACY_KERAS when `tf.keras` is first touched, and nothing in this package touches it before this line.
"""

import os

os.environ["TF_USE_LEGACY_KERAS"] = "1"

import tensorflow as tf
import tf_keras
from tf_keras import (  # noqa: F401
    Input,
    Model,
    Sequential,
    __version__,
    applications,
    backend,
    initializers,
    layers,
    mixed_precision,
    models,
    optimizers,
    utils,
)
from tf_keras.src.mixed_precision import autocast_variable

if tf.keras.layers.Layer is not tf_keras.layers.Layer:
    raise ImportError("tf.keras was loaded before deit.keras: set TF_USE_LEGACY_KERAS=1 before importing TensorFlow")


def uncast_variables():
    """Return a context in which the variables of a mixed-precision layer are read as they are, in float32.

    Legacy Keras has no public way: inside a layer's `call` they come rounded to its compute dtype.
    """
    return autocast_variable.enable_auto_cast_variables(None)
