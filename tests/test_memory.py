"""Out of memory, and a full disk that TensorFlow raises as the same error, as one line that says what to change."""

import pytest
import tensorflow as tf

from configs import base
from deit import config as configuration
from deit import errors, memory


def resolved(replicas=1, **fields):
    config = base.get_config()
    config.update_from_flattened_dict(fields)
    return configuration.resolve(config, train_size=3303, eval_size=367, classes="abcde", replicas=replicas)


def allocate():
    """Raise what tf.zeros([1 << 44]) raises on a CPU, without the ten seconds for which it tries."""
    place = "/job:localhost/replica:0/task:0/device:CPU:0"
    raise tf.errors.ResourceExhaustedError(
        None,
        None,
        f"{{{{function_node __wrapped__Fill_device_{place}}}}} OOM when allocating tensor with shape[17592186044416] "
        f"and type float on {place} by allocator mklcpu [Op:Fill] name: ",
    )


def message(config, field, function, **options):
    with pytest.raises(errors.UserError) as caught, memory.advised(config, field, **options):
        function()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.slow
def test_tensorflows_own_error_is_caught_with_and_without_a_graph():
    @tf.function
    def in_graph(size):
        return tf.fill([size], 0.0)

    for function in (lambda: tf.zeros([1 << 44]), lambda: in_graph(tf.constant(1 << 44, tf.int64))):
        assert message(resolved(), "micro_batch", function) == message(resolved(), "micro_batch", allocate)


def test_a_micro_batch_that_does_not_fit_is_answered_with_one_that_makes_the_same_update():
    assert message(resolved(), "micro_batch", allocate) == (
        "out of memory in a micro-batch of 16 (tensor with shape[17592186044416] and type float): "
        "try --config.micro_batch=8 (accum_steps 16 -> 32, the same update)"
    )


@pytest.mark.parametrize(
    ("global_batch", "replicas", "micro", "lower", "steps"),
    [(96, 2, 48, 24, "1 -> 2"), (90, 2, 45, 15, "1 -> 3"), (63, 1, 9, 7, "7 -> 9"), (14, 2, 7, 1, "1 -> 7")],
)
def test_the_advised_micro_batch_is_the_largest_below_that_divides_a_replicas_share(
    global_batch, replicas, micro, lower, steps
):
    config = resolved(replicas, global_batch=global_batch, micro_batch=micro)
    text = message(config, "micro_batch", allocate)
    assert text.endswith(f"try --config.micro_batch={lower} (accum_steps {steps}, the same update)")
    assert resolved(replicas, global_batch=global_batch, micro_batch=lower)  # it is legal


@pytest.mark.parametrize("field", ["micro_batch", "teacher.batch", "eval.batch"])
def test_where_one_image_does_not_fit_other_fields_are_named(field):
    text = message(resolved(**{field: 1}), field, allocate)
    assert " of 1 (" in text and f"{field}=" not in text
    for other in ("data.image_size", "model.variant", "precision", "xla"):
        assert other in text


@pytest.mark.parametrize(
    ("field", "start"),
    [("teacher.batch", "out of memory in a teacher pass"), ("eval.batch", "out of memory in an evaluation pass")],
)
def test_other_passes_are_advised_to_take_half(field, start):
    text = message(resolved(**{field: 50}), field, allocate)
    assert text.startswith(f"{start} of 50 (") and text.endswith(f"try --config.{field}=25")


def test_a_teachers_pass_is_never_larger_than_a_replicas_share():
    text = message(resolved(2, **{"global_batch": 32, "teacher.batch": 64}), "teacher.batch", allocate)
    assert "a teacher pass of 16 (" in text and text.endswith("try --config.teacher.batch=8")


def test_the_field_of_a_nested_teacher_is_named_in_full():
    text = message(resolved(), "micro_batch", allocate, prefix="teacher.train.")
    assert "try --config.teacher.train.micro_batch=8 " in text


def raising(error):
    def function():
        raise error

    return function


def test_pythons_own_memory_error_counts_too():
    assert message(resolved(), "eval.batch", raising(MemoryError())) == (
        "out of memory in an evaluation pass of 64: try --config.eval.batch=32"
    )
    text = message(resolved(), "eval.batch", raising(MemoryError("Unable to allocate 9 GiB for an array")))
    assert "(Unable to allocate 9 GiB for an array)" in text


def test_a_full_disk_is_no_memory_and_names_no_batch():
    error = tf.errors.ResourceExhaustedError(None, None, "{{node Save}} runs/a/tensors; No space left on device\nmore")
    text = message(resolved(), "micro_batch", raising(error))
    assert text == "the disk is full: runs/a/tensors; No space left on device"


def test_a_long_message_is_cut_to_the_beginning_of_its_first_line():
    error = tf.errors.ResourceExhaustedError(None, None, f"\n{{{{node x}}}} Out of memory{'!' * 500}\nsecond line")
    text = message(resolved(), "micro_batch", raising(error))
    assert "(Out of memory!!!" in text and "second" not in text and "node" not in text and len(text) < 300


@pytest.mark.parametrize(
    "error", [ValueError("a"), errors.UserError("b"), tf.errors.InvalidArgumentError(None, None, "c")]
)
def test_other_errors_pass_as_they_are(error):
    with pytest.raises(type(error)) as caught, memory.advised(resolved(), "micro_batch"):
        raise error
    assert caught.value is error


def test_a_block_that_fits_is_left_alone():
    with memory.advised(resolved(), "micro_batch"):
        done = True
    assert done
