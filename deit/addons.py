"""The only door to tensorflow-addons (its last release, 0.23, imports with TensorFlow 2.13 to 2.15).

tensorflow-addons imports a few classes from the package `keras` that TensorFlow brings along. Two Kerases in a process
cost start-up time, and with both imported legacy Keras never ends loading some functional models. So for the time of
the import, `keras.X` stands for `tf_keras.X`.
"""

import sys
import warnings

from deit import keras  # noqa: F401  tensorflow-addons subclasses tf.keras, which must be tf_keras

_aliases = {
    name.removeprefix("tf_"): module
    for name, module in sys.modules.items()
    if name.partition(".")[0] == "tf_keras" and name.removeprefix("tf_") not in sys.modules
}
sys.modules.update(_aliases)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # its end-of-life notice, at every import
    from tensorflow_addons.optimizers import LAMB, AdamW  # noqa: F401
for _name in _aliases:
    del sys.modules[_name]
