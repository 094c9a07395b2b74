"""The optimizer: tensorflow-addons' AdamW, with the learning rate and the decay taken from consumed batches.

Promises: rate and coupled decay follow `step`, so a skipped update costs its place in the schedule; bias
correction follows the optimizer's own `iterations`, the updates really applied; one `apply`, one iteration.

Two traps of tensorflow-addons 0.23 end here: an empty list of variables to decay means all of them, and
under MirroredStrategy it looks for each replica's copy in that list, so mirrored variables never decay.
"""

from collections.abc import Sequence

import tensorflow as tf

from deit import addons, schedules


class Optimizer(addons.AdamW):
    """AdamW that knows its schedule.

    Attributes:
      learning_rate_at: update (int or tensor) -> learning rate, float32 scalar.
      step: the variable that counts consumed batches; it drives the learning rate.
    """

    def __init__(self, *, learning_rate_at: schedules.Schedule, step: tf.Variable, **settings):
        super().__init__(learning_rate=lambda: learning_rate_at(step), name="optimizer", **settings)
        self.learning_rate_at = learning_rate_at
        self.step = step


def build(config, step: tf.Variable) -> Optimizer:
    """Return the optimizer of a resolved configuration.

    Decay an update: optim.weight_decay times the learning rate (`decay_coupled`: PyTorch, the DeiT paper),
    else optim.weight_decay itself whatever the rate (tensorflow-addons' own).
    """
    optim = config.optim
    rate_at = schedules.build(config)
    decay = optim.weight_decay
    if optim.decay_coupled:

        def decay():
            return optim.weight_decay * rate_at(step)

    return Optimizer(
        learning_rate_at=rate_at,
        step=step,
        weight_decay=decay,
        beta_1=optim.beta_1,
        beta_2=optim.beta_2,
        epsilon=optim.epsilon,
        amsgrad=optim.amsgrad,
    )


def create_slots(optimizer: Optimizer, variables: Sequence[tf.Variable]) -> None:
    """Create iterations and moments, all zero; call it in `strategy.scope()`, before a restore."""
    optimizer._create_all_weights(list(variables))


def apply(optimizer: Optimizer, grads_and_vars: Sequence[tuple], decay_variables: Sequence[tf.Variable]) -> None:
    """Apply gradients that are already summed over replicas, decaying `decay_variables` first.

    Call it in a replica context, or outside any strategy.
    """
    local = tf.distribute.get_strategy().experimental_local_results
    decayed = [copy for variable in decay_variables for copy in (variable, *local(variable))]
    optimizer.apply_gradients(
        grads_and_vars,
        # `step` is never trained: a list that holds only it decays nothing, an empty one everything.
        decay_var_list=decayed or [optimizer.step],
        experimental_aggregate_gradients=False,
    )


def slots(optimizer: Optimizer, named_variables: Sequence[tuple[str, tf.Variable]]) -> list[tuple[str, tf.Variable]]:
    """Return (own path, variable) of the state: `optimizer/m/<path>`, ..., `optimizer/iterations`."""
    names = ("m", "v", "vhat") if optimizer.amsgrad else ("m", "v")
    moments = [
        (f"optimizer/{name}/{path}", optimizer.get_slot(variable, name))
        for name in names
        for path, variable in named_variables
    ]
    return [*moments, ("optimizer/iterations", optimizer.iterations)]
