"""What teacher.members may say, and the single teachers that it means."""

import pytest

from configs import base as template
from deit import members


def parsed(*texts, **ensemble):
    teacher = template.get_config().teacher
    teacher.kind, teacher.members = "ensemble", texts
    teacher.update(ensemble)
    return members.parse(teacher)


def test_a_member_is_a_single_teacher_that_has_what_it_does_not_say_from_the_ensemble():
    run, network = parsed("run:runs/a", "keras_application:ResNet50", precision="mixed_bfloat16", image_size=64)
    assert (run.kind, run.path, run.members) == ("run", "runs/a", ())
    assert (network.kind, network.name, network.path) == ("keras_application", "ResNet50", "")
    assert {each.precision for each in (run, network)} == {"mixed_bfloat16"}
    assert {each.image_size for each in (run, network)} == {64}


def test_fields_follow_after_spaces_with_the_types_of_the_configuration():
    (found,) = parsed(
        "saved_model:hub/b image_size=299 range=(0,1) mean=(0.5,0.5,0.5) std=(.5,.5,.5) background=True "
        "class_names='names of b.txt' sha256=ab"
    )
    assert (found.path, found.image_size, found.range) == ("hub/b", 299, (0.0, 1.0))
    assert (found.mean, found.std) == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    assert (found.background, found.class_names, found.sha256) == (True, "names of b.txt", "ab")
    assert all(isinstance(number, float) for number in (*found.range, *found.std))


def test_a_path_may_hold_colons_and_if_quoted_spaces():
    url, quoted = parsed("saved_model:https://host:80/b?x=y", '"run:my runs/a"')
    assert url.path == "https://host:80/b?x=y"
    assert quoted.path == "my runs/a"


def test_members_do_not_share_what_one_of_them_says():
    first, second = parsed("run:a image_size=32", "run:b")
    first.image_size = 48
    assert (first.image_size, second.image_size) == (48, 0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"'' must be saved_model:PATH, run:PATH or keras_application:NAME"),
        ("runs/a", r"'runs/a' must be saved_model:PATH"),
        ("run:", r"'run:' must be saved_model:PATH"),
        ("ensemble:a", r"'ensemble:a' must be saved_model:PATH"),
        ("train:a", r"'train:a' must be saved_model:PATH"),
        ("run:a batch=3", r"'batch' in 'run:a batch=3' must be one of sha256, image_size"),
        ("run:a image_size", r"'' in 'run:a image_size' must be of type int"),
        ("run:a image_size=1.5", r"'1.5' in .* must be of type int"),
        ("run:a image_size=True", r"'True' in .* must be of type int"),
        ("run:a background=1", r"'1' in .* must be of type bool"),
        ("run:a range=(0,x)", r"'\(0,x\)' in .* must be of type tuple"),
        ("run:'a", r"No closing quotation"),
        (3, r"3 must be a text such as 'run:runs/a'"),
    ],
)
def test_what_names_no_teacher_is_refused_by_what_it_says(text, message):
    with pytest.raises(ValueError, match=message):
        parsed("run:first", text)
