"""The optimizers: tensorflow-addons' AdamW and LAMB, with rate and decay taken from consumed batches.

Promises: rate and coupled decay follow `step`, so a skipped update costs its place in the schedule; bias correction
follows the optimizer's own `iterations`, the updates really applied; one `apply`, one iteration; a variable's scale
(layer-wise decay of the rate) multiplies its applied step, decay included, and not its gradient, which Adam would
divide out again.

Two traps of tensorflow-addons 0.23 end here: its AdamW takes an empty list of variables to decay for all of them, and
under MirroredStrategy looks for each replica's copy in that list, so mirrored variables never decay.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import tensorflow as tf

from deit import addons, schedules

_STEP = ("lr_t", "wd_t")  # what a step is made of: tensorflow-addons' names for the rate, and for AdamW's decay


class _Scheduled:
    """What both optimizers share, in front of one of tensorflow-addons.

    Attributes:
      learning_rate_at: update (int or tensor) -> learning rate, float32 scalar.
      step: the variable that counts consumed batches; it drives the learning rate.
      moments: names of the slots of a variable.
      decayed: references of the variables that decay, replicas' copies included; `apply` sets it.
      scales: reference -> factor of a variable's step, where it is not 1; `apply` sets it.
    """

    moments: tuple[str, ...] = ("m", "v")
    decayed: frozenset = frozenset()
    scales: Mapping[Any, float] = {}

    def __init__(self, *, learning_rate_at: schedules.Schedule, step: tf.Variable, **settings):
        super().__init__(learning_rate=lambda: learning_rate_at(step), name="optimizer", **settings)
        self.learning_rate_at = learning_rate_at
        self.step = step

    def _do_use_weight_decay(self, variable: tf.Variable) -> bool:
        return variable.ref() in self.decayed

    def _resource_apply_dense(self, gradient, variable, apply_state=None):
        scale = self.scales.get(variable.ref(), 1.0)
        if scale != 1.0:
            apply_state = {
                place: {name: value * scale if name in _STEP else value for name, value in coefficients.items()}
                for place, coefficients in apply_state.items()
            }
        return super()._resource_apply_dense(gradient, variable, apply_state=apply_state)


class AdamW(_Scheduled, addons.AdamW):
    """Adam with decoupled decay (arXiv:1711.05101)."""


class Lamb(_Scheduled, addons.LAMB):
    """Adam whose step has the norm of its variable (arXiv:1904.00962, algorithm 2); decay is part of that step.

    A variable that does not decay is not adapted either, as in NVIDIA's FusedLAMB, which DeiT-III was trained with.

    Attributes:
      decays: whether there is a decay at all; without, nothing is adapted and this is Adam.
    """

    decays: bool = True

    def _do_layer_adaptation(self, variable: tf.Variable) -> bool:
        return self.decays and self._do_use_weight_decay(variable)


def build(config, step: tf.Variable) -> AdamW | Lamb:
    """Return the optimizer of a resolved configuration.

    AdamW's decay an update: optim.weight_decay times the learning rate (`decay_coupled`: PyTorch, the DeiT paper), else
    optim.weight_decay itself whatever the rate (tensorflow-addons' own). LAMB's is part of its step.
    """
    return _BUILDERS[config.optim.name](config, step, schedules.build(config))


def _adamw(config, step: tf.Variable, rate_at: schedules.Schedule) -> AdamW:
    optim = config.optim

    def coupled():
        return optim.weight_decay * rate_at(step)

    optimizer = AdamW(
        learning_rate_at=rate_at,
        step=step,
        weight_decay=coupled if optim.decay_coupled else optim.weight_decay,
        beta_1=optim.beta_1,
        beta_2=optim.beta_2,
        epsilon=optim.epsilon,
        amsgrad=optim.amsgrad,
    )
    optimizer.moments = ("m", "v", "vhat") if optim.amsgrad else ("m", "v")
    return optimizer


def _lamb(config, step: tf.Variable, rate_at: schedules.Schedule) -> Lamb:
    optim = config.optim
    optimizer = Lamb(
        learning_rate_at=rate_at,
        step=step,
        weight_decay=optim.weight_decay,
        beta_1=optim.beta_1,
        beta_2=optim.beta_2,
        epsilon=optim.epsilon,
    )
    optimizer.decays = optim.weight_decay > 0
    return optimizer


def create_slots(optimizer: AdamW | Lamb, variables: Sequence[tf.Variable]) -> None:
    """Create iterations and moments, all zero; call it in `strategy.scope()`, before a restore."""
    optimizer._create_all_weights(list(variables))


def apply(
    optimizer: AdamW | Lamb,
    grads_and_vars: Sequence[tuple[tf.Tensor, tf.Variable]],
    *,
    decayed: Collection[tf.Variable],
    scales: Sequence[float] = (),
) -> None:
    """Apply gradients that are already summed over replicas, decaying the variables in `decayed`.

    `scales`: factor of each variable's step, in the order of `grads_and_vars`; empty = 1 for all. Call it in a replica
    context, or outside any strategy.
    """
    local = tf.distribute.get_strategy().experimental_local_results

    def copies(variable):
        return [copy.ref() for copy in (variable, *local(variable))]

    optimizer.decayed = frozenset(ref for variable in decayed for ref in copies(variable))
    scaled = zip((variable for _, variable in grads_and_vars), scales, strict=True) if scales else ()
    optimizer.scales = {ref: scale for variable, scale in scaled for ref in copies(variable)}
    optimizer.apply_gradients(grads_and_vars, experimental_aggregate_gradients=False)


def slots(optimizer: AdamW | Lamb, named_variables: Sequence[tuple[str, tf.Variable]]) -> list[tuple[str, tf.Variable]]:
    """Return (own path, variable) of the state: `optimizer/m/<path>`, ..., `optimizer/iterations`."""
    moments = [
        (f"optimizer/{name}/{path}", optimizer.get_slot(variable, name))
        for name in optimizer.moments
        for path, variable in named_variables
    ]
    return [*moments, ("optimizer/iterations", optimizer.iterations)]


_BUILDERS = {"adamw": _adamw, "lamb": _lamb}
