"""The plan of a run that does not exist yet: where its weights come from, and what of them does not fit."""

import pytest

from configs import finetune
from deit import errors, plan
from tests import family

DIGITS = {"variant": "deit_micro_patch8_32", "classes": tuple("01234")}


def config(start, name="digits:56789", **fields):
    c = finetune.get_config("digits")
    with c.unlocked():
        c.init_from, c.data.name = str(start), name
        c.update_from_flattened_dict(fields)
    return c


def row(text):
    (line,) = (line for line in text.splitlines() if line.startswith("  weights from"))
    return line.removeprefix("  weights from").strip()


def test_the_plan_says_which_heads_begin_anew_and_what_is_resized(tmp_path):
    start = family.checkpoint(tmp_path / "start", **DIGITS)
    told = row(plan.offline(config(start), replicas=1))
    assert told == f"{start} (raw); heads re-initialised: 5 classes (0, 1, 2, ...) -> 5 (5, 6, 7, ...)"
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
