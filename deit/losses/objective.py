"""The training objective: which loss acts on which head, and how the two are weighted."""

import tensorflow as tf

from deit.losses import base, hard, soft


def objective(
    outputs: dict[str, tf.Tensor],
    labels: tf.Tensor,
    teacher: tf.Tensor | None,
    *,
    loss_config,
    distill_config,
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """Return (total, classification, distillation), float32 [B] each; only the first is weighted.

    Shapes: outputs `cls` [B, C] and, for distilled variants, `dist` [B, C]; labels int [B] or float [B, C];
    teacher int [B] (distill.kind hard, equation 3), logits [B, C] (soft, equation 2) or None (none).
    With two heads the classification term acts on `cls` and the distillation term on `dist`; with one both
    act on it. Without a teacher two heads are trained through the average of their logits, their answer.
    """
    distill = _DISTILLATION[distill_config.kind](outputs.get("dist", outputs["cls"]), teacher, distill_config)
    answer = outputs["cls"]
    if distill_config.kind == "none" and "dist" in outputs:
        answer = (outputs["cls"] + outputs["dist"]) / 2.0
    cls = base.classification(answer, labels, kind=loss_config.kind, smoothing=loss_config.smoothing)
    if distill_config.kind == "none":
        return cls, cls, distill
    of_cls, of_distill = _WEIGHTS[distill_config.weighting](distill_config.alpha)
    return of_cls * cls + of_distill * distill, cls, distill


def _none(logits: tf.Tensor, teacher: tf.Tensor | None, config) -> tf.Tensor:
    return tf.zeros(tf.shape(logits)[:1], tf.float32)


def _hard(logits: tf.Tensor, teacher: tf.Tensor, config) -> tf.Tensor:
    return hard.distillation(logits, teacher)


def _soft(logits: tf.Tensor, teacher: tf.Tensor, config) -> tf.Tensor:
    return soft.distillation(logits, teacher, tau=config.tau, form=config.form, reduction=config.reduction)


_DISTILLATION = {"none": _none, "hard": _hard, "soft": _soft}
_WEIGHTS = {"convex": lambda alpha: (1.0 - alpha, alpha), "sum": lambda alpha: (1.0, alpha)}
