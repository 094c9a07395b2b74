"""Losses: pure functions of tensors, one number an example; `losses.objective` puts them together."""

from deit.losses.objective import objective

__all__ = ["objective"]
