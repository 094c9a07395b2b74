"""Hard distillation: the teacher's decision is a second label (DeiT, equation 3)."""

import tensorflow as tf


def distillation(student_logits: tf.Tensor, teacher_labels: tf.Tensor) -> tf.Tensor:
    """Return the cross-entropy of each example with the teacher's class, float32 [B].

    Shapes: student_logits [B, C]; teacher_labels int [B], the argmax on the very picture the student sees.
    They are never smoothed and never mixed: a mixed picture has one teacher label.
    """
    logits = tf.cast(student_logits, tf.float32)
    return tf.nn.sparse_softmax_cross_entropy_with_logits(tf.stop_gradient(teacher_labels), logits)
