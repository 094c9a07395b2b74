"""The plan of a run that does not exist yet: where its weights come from, and what of them does not fit."""

import pytest

from configs import base, deit3_imagenet, finetune
from deit import errors, plan
from tests import family

DIGITS = {"variant": "deit_micro_patch8_32", "classes": tuple("01234")}


def config(start, name="digits:56789", **fields):
    c = finetune.get_config("digits")
    with c.unlocked():
        c.init_from, c.data.name = str(start), name
        c.update_from_flattened_dict(fields)
    return c


def row(text, name="weights from"):
    (line,) = (line for line in text.splitlines() if line.startswith(f"  {name}  "))
    return line.removeprefix(f"  {name}").strip()


def test_the_plan_says_which_heads_begin_anew_and_what_is_resized(tmp_path):
    start = family.checkpoint(tmp_path / "start", **DIGITS)
    told = row(plan.offline(config(start), replicas=1))
    assert told == f"{start} (raw); heads re-initialised: 5 classes (0, 1, 2, 3, 4) -> 5 (5, 6, 7, 8, 9)"
    told = row(plan.offline(config(start, "digits:01234", **{"data.image_size": 48}), replicas=1))
    assert told == f"{start} (raw); heads kept: the same 5 classes; tokens/pos_embed resized from 4 x 4 to 6 x 6"


def test_where_the_data_is_absent_the_plan_leaves_the_heads_open(tmp_path):
    start = family.checkpoint(tmp_path / "start", **DIGITS)
    told = row(plan.offline(config(start, f"folder:{tmp_path / 'absent'}"), replicas=1))
    assert told == f"{start} (raw); heads: re-initialised unless the classes are the same"


def test_a_start_that_is_absent_is_marked_and_one_that_does_not_fit_is_refused(tmp_path):
    assert row(plan.offline(config("nowhere"), replicas=1)) == "nowhere (raw)  [not checked: it is absent]"
    start = family.checkpoint(tmp_path / "start", **DIGITS)
    with pytest.raises(errors.UserError, match=r"has no averages \(EMA\)"):
        plan.offline(config(start, init_weights="ema"), replicas=1)


def test_the_start_of_the_teacher_that_is_trained_first_is_checked_too(tmp_path):
    start = family.checkpoint(tmp_path / "start", **DIGITS)
    c = config("")
    c.unlock()
    c.teacher.kind, c.teacher.train = "train", config(start, init_weights="ema")
    with pytest.raises(errors.UserError, match=r"teacher.train: .* has no averages \(EMA\)"):
        plan.offline(c, replicas=1)


def planned(**fields):
    """Return the plan of a small network on digits."""
    c = base.get_config()
    c.data.name, c.data.train_split, c.data.eval_split = "digits", "train", "test"
    c.model.variant, c.data.image_size = "deit_micro_distilled_patch8_32", 32
    c.update_from_flattened_dict(fields)
    return plan.offline(c, replicas=1)


def test_the_student_s_row_says_what_its_name_does_not():
    told = row(planned(), "student")
    assert told.startswith("deit_micro_distilled_patch8_32 at 32 px  214,996 parameters, ")
    fields = {"model.patch": 4, "model.registers": 2, "model.heads": "cls", "data.image_size": 34}
    assert row(planned(**fields), "student").startswith(
        "deit_micro_distilled_patch8_32 at 34 px, patch 4, 2 register tokens, class head only, the last 2 px at the "
        "right and at the bottom are not seen  "
    )


def test_what_is_not_trained_has_no_moments_and_no_averages():
    """A micro network: 214,996 parameters, of them two heads of 64 x 10 + 10; its averages are on."""
    assert row(planned(), "disk").startswith(f"{4 * 4 * 214_996 / 1e6:.0f} MB a checkpoint")
    told = planned(**{"optim.train_only": "heads"})
    assert row(told, "trained") == "heads alone, 1,300 parameters"
    assert row(told, "disk").startswith(f"{4 * (214_996 + 3 * 1300) / 1e6:.0f} MB a checkpoint")


def test_training_the_heads_alone_costs_a_pass_forward():
    whole, heads = (float(row(planned(**{"optim.train_only": only}), "compute").split()[0]) for only in ("", "heads"))
    assert whole / heads == pytest.approx(3, rel=0.01)


def test_the_recipe_that_the_numbers_are_of_is_in_the_plan():
    assert row(planned(), "loss") == "cross-entropy, smoothing 0.1, drop-path 0.1"
    assert row(planned(), "weight decay").startswith("0.05 x lr (PyTorch, DeiT paper); 1-D tensors")
    small = deit3_imagenet.get_config("small")
    fields = {name: small.optim[name.partition(".")[2]] for name in ("optim.name", "optim.clip_norm")}
    told = planned(**fields, **{"loss.kind": "bce", "loss.smoothing": 0.0, "model.drop_path": 0.05})
    assert row(told, "loss") == "binary cross-entropy, drop-path 0.05, gradients clipped to a norm of 1"
    assert row(told, "weight decay").startswith(
        "0.05 inside the step, before that takes the norm of its variable; 1-D "
    )
