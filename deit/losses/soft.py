"""Soft distillation: the student's distribution follows the teacher's (DeiT, equation 2)."""

import tensorflow as tf


def distillation(
    student_logits: tf.Tensor, teacher_logits: tf.Tensor, *, tau: float, form: str, reduction: str
) -> tf.Tensor:
    """Return the loss of each example, float32 [B].

    Shapes: both logits [B, C]. tau > 0 is the temperature.
    Forms: `kl`, tau^2 KL(softmax(Zt / tau) || softmax(Z / tau)), where tau^2 keeps the gradient's size at any
    temperature; `ce`, cross-entropy of Z (not divided by tau) with softmax(Zt / tau), without tau^2.
    Reductions: `batch`, a sum over classes, as in the paper; `batch_classes` divides by C besides, as
    facebookresearch/deit does: C times weaker, 1000 times on ImageNet, for comparison with its numbers.
    """
    student = tf.cast(student_logits, tf.float32)
    teacher = tf.stop_gradient(tf.cast(teacher_logits, tf.float32))
    return _FORMS[form](student, teacher, tau) / _DIVISORS[reduction](student)


def _kl(student: tf.Tensor, teacher: tf.Tensor, tau: float) -> tf.Tensor:
    log_student = tf.nn.log_softmax(student / tau)
    log_teacher = tf.nn.log_softmax(teacher / tau)
    return tau**2 * tf.reduce_sum(tf.exp(log_teacher) * (log_teacher - log_student), -1)


def _ce(student: tf.Tensor, teacher: tf.Tensor, tau: float) -> tf.Tensor:
    return tf.nn.softmax_cross_entropy_with_logits(tf.nn.softmax(teacher / tau), student)


_FORMS = {"kl": _kl, "ce": _ce}
_DIVISORS = {"batch": lambda logits: 1.0, "batch_classes": lambda logits: float(logits.shape[-1])}
