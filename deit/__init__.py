"""Data-efficient image transformers by distillation, in TensorFlow."""

import os

__version__ = "0.2.0"

# Read once, when TensorFlow is first imported: below 3 it prints three false errors about CUDA libraries.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
