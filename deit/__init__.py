"""Data-efficient image transformers by distillation, in TensorFlow."""

__version__ = "0.1.0"
