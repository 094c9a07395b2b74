"""RandAugment against a twin of timm's law: what is drawn, how strong it is, what it does to a picture."""

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image, ImageEnhance, ImageOps
from scipy import stats

from deit import rules
from deit.data import ops, randaugment
from tests import draws, photos
from tools import parity_cases

POLICY = rules.randaugment_policy("rand-m9-mstd0.5-inc1")
FILL = parity_cases.FILL
TIMM = [
    *("AutoContrast", "Equalize", "Invert", "Rotate", "Posterize", "Solarize", "SolarizeAdd", "Color", "Contrast"),
    *("Brightness", "Sharpness", "ShearX", "ShearY", "TranslateX", "TranslateY"),
]
PLAIN = ("AutoContrast", "Equalize", "Invert")


def twin(name: str, level: float, sign: float) -> float:
    """timm's argument of an op by its formulas: level 0..10, sign +-1; of a translation the share of the side."""
    part = level / 10
    enhance = max(0.1, 1 + sign * part * 0.9)
    return {
        "Rotate": sign * part * 30,
        "Posterize": 4 - int(part * 4),
        "Solarize": 256 - min(256, int(part * 256)),
        "SolarizeAdd": min(128, int(part * 110)),
        "Color": enhance,
        "Contrast": enhance,
        "Brightness": enhance,
        "Sharpness": enhance,
        "ShearX": sign * part * 0.3,
        "ShearY": sign * part * 0.3,
        "TranslateX": sign * part * 0.45,
        "TranslateY": sign * part * 0.45,
    }[name]


def by_pillow(image: Image.Image, name: str, argument: float) -> Image.Image:
    """The op by Pillow."""

    def moved(*matrix):
        return image.transform(image.size, Image.AFFINE, matrix, Image.BILINEAR, fillcolor=FILL)

    return {
        "AutoContrast": lambda: ImageOps.autocontrast(image),
        "Equalize": lambda: ImageOps.equalize(image),
        "Invert": lambda: ImageOps.invert(image),
        "Rotate": lambda: image.rotate(argument, Image.BILINEAR, fillcolor=FILL),
        "Posterize": lambda: parity_cases.posterize_by_pillow(image, argument),
        "Solarize": lambda: ImageOps.solarize(image, argument),
        "SolarizeAdd": lambda: parity_cases.solarize_add_by_pillow(image, argument),
        "Color": lambda: ImageEnhance.Color(image).enhance(argument),
        "Contrast": lambda: ImageEnhance.Contrast(image).enhance(argument),
        "Brightness": lambda: ImageEnhance.Brightness(image).enhance(argument),
        "Sharpness": lambda: ImageEnhance.Sharpness(image).enhance(argument),
        "ShearX": lambda: moved(1, argument, 0, 0, 1, 0),
        "ShearY": lambda: moved(1, 0, 0, argument, 1, 0),
        "TranslateX": lambda: moved(1, 0, argument, 0, 1, 0),
        "TranslateY": lambda: moved(1, 0, 0, 0, 1, argument),
    }[name]()


def drawn(*slots: tuple[str, bool, float, float]) -> dict[str, np.ndarray]:
    """Return what `draw` would: a slot is (name, applied, level, sign)."""
    names, applied, level, sign = zip(*slots)
    return {
        "op": np.array([TIMM.index(name) for name in names], np.int32),
        "applied": np.array(applied),
        "level": np.array(level, np.float32),
        "sign": np.array(sign, np.float32),
    }


@pytest.fixture(scope="module")
def sample() -> dict[str, np.ndarray]:
    """Ten thousand draws of the DeiT policy: op, applied, level, sign, each [10000, 2]."""
    return draws.sample(lambda seed: randaugment.draw(seed, POLICY))


def test_ops_are_timms_in_timms_order():
    assert list(randaugment.OPS) == TIMM


def test_a_draw_has_the_contracts_types():
    for count in (1, 2, 4):
        got = randaugment.draw(draws.seeds(1)[0], rules.Policy(9.0, 0.5, count))
        assert {name: (value.dtype, value.shape) for name, value in got.items()} == {
            "op": (tf.int32, [count]),
            "applied": (tf.bool, [count]),
            "level": (tf.float32, [count]),
            "sign": (tf.float32, [count]),
        }


def test_every_op_is_equally_likely_in_every_slot(sample):
    for slot in range(2):
        draws.assert_uniform_choice(sample["op"][:, slot], 15)


def test_ops_are_drawn_with_replacement(sample):
    first, second = sample["op"].T
    draws.assert_uniform_choice(first * 15 + second, 225)


def test_half_of_the_ops_are_applied_each_by_itself(sample):
    draws.assert_probability(sample["applied"], 0.5)
    draws.assert_uniform_choice(sample["applied"] @ [2, 1], 4)


def test_level_is_normal_and_clipped_to_ten(sample):
    level = sample["level"].ravel()
    assert level.min() >= 0 and level.max() == 10
    draws.assert_probability(level == 10, stats.norm.sf(10, 9, 0.5))
    draws.assert_law(level[level < 10], stats.truncnorm(-np.inf, 2, loc=9, scale=0.5))


def test_level_is_clipped_at_zero_and_fixed_without_spread():
    low = draws.sample(lambda seed: randaugment.draw(seed, rules.Policy(0.5, 0.5, 2)), 2000)["level"]
    assert low.min() == 0
    draws.assert_probability(low == 0, stats.norm.cdf(0, 0.5, 0.5))
    fixed = draws.sample(lambda seed: randaugment.draw(seed, rules.Policy(7.0, 0.0, 2)), 50)["level"]
    assert (fixed == 7).all()


def test_sign_is_fair(sample):
    assert set(np.unique(sample["sign"])) == {-1, 1}
    draws.assert_probability(sample["sign"] > 0, 0.5)


def test_draws_of_an_image_are_unrelated(sample):
    columns = {f"{name} {slot}": sample[name][:, slot] for name in sample for slot in range(2)}
    draws.assert_unrelated(list(columns.values()), list(columns))


def test_draws_of_neighbouring_seeds_are_unrelated(sample):
    for name, values in sample.items():
        draws.assert_unrelated([values[:-1, 0], values[1:, 0]], [name, f"next {name}"])


@pytest.mark.parametrize("name", [name for name in TIMM if name not in PLAIN])
def test_argument_is_timms(name):
    levels = [0.0, 0.5, 1.0, 2.5, 4.0, 5.0, 7.3, 7.5, 8.2, 8.9, 9.0, 9.1, 9.77, 10.0]
    for level in levels:
        for sign in (-1.0, 1.0):
            got = randaugment.argument(name, tf.constant(level), tf.constant(sign))
            assert abs(float(got) - twin(name, level, sign)) <= 1e-4, (level, sign, float(got))


def test_ops_without_a_strength_have_no_argument():
    assert [randaugment.argument(name, 9.0, 1.0) for name in PLAIN] == [None, None, None]


def test_arguments_of_drawn_levels_are_timms(sample):
    """Over 2,000 drawn levels; whole numbers only where float32 is not next to the next one."""
    level, sign = sample["level"][:2000, 0], sample["sign"][:2000, 0]
    pairs = np.stack([level, sign], 1)
    for name in (name for name in TIMM if name not in PLAIN):
        got = _each_argument(name, pairs).numpy()
        expected = np.array([twin(name, float(a), float(s)) for a, s in zip(level, sign)])
        off = np.abs(got - expected) > 1e-4
        steps = {"Posterize": 4, "Solarize": 256, "SolarizeAdd": 110}.get(name)
        if steps:
            near = np.abs(level / 10 * steps - np.round(level / 10 * steps)) < 1e-4
            off &= ~near
        assert not off.any(), (name, level[off][:3], got[off][:3], expected[off][:3])


@tf.function
def _each_argument(name: str, pairs: tf.Tensor) -> tf.Tensor:
    """Return the argument of (level, sign) [n, 2], one by one: float32 [n]."""
    return tf.map_fn(
        lambda pair: tf.cast(randaugment.argument(name, pair[0], pair[1]), tf.float32),
        pairs,
        fn_output_signature=tf.float32,
    )


@pytest.mark.parametrize("shape", [(224, 224), (171, 263)])
@pytest.mark.parametrize("name", TIMM)
def test_an_applied_op_is_pillows_with_timms_argument(name, shape):
    """Translation is a share of the width or of the height: the uneven size tells them apart."""
    image = photos.views()[0][: shape[0], : shape[1]] if shape[0] == shape[1] else photos.views()[1]
    bound = 1.0 if name not in ("Rotate", "Sharpness", "ShearX", "ShearY", "TranslateX", "TranslateY") else 2.0
    side = {"TranslateX": image.shape[1], "TranslateY": image.shape[0]}.get(name, 1)
    for level, sign in ((9.0, 1.0), (9.0, -1.0), (7.8, 1.0), (10.0, -1.0), (3.0, 1.0)):
        argument = None if name in PLAIN else side * twin(name, level, sign)
        expected = np.asarray(by_pillow(Image.fromarray(image), name, argument), np.int32)
        got = randaugment.apply(image, drawn((name, True, level, sign)), FILL)
        assert got.dtype == tf.uint8
        assert np.abs(got.numpy() - expected).mean() <= bound, (level, sign)


def test_ops_are_applied_one_after_the_other():
    image = photos.small(64)
    for names in (("Rotate", "Equalize"), ("Equalize", "Rotate"), ("Invert", "Invert"), ("Posterize", "AutoContrast")):
        both = randaugment.apply(image, drawn(*((name, True, 9.0, 1.0) for name in names)), FILL)
        one = randaugment.apply(image, drawn((names[0], True, 9.0, 1.0)), FILL)
        np.testing.assert_array_equal(both, randaugment.apply(one, drawn((names[1], True, 9.0, 1.0)), FILL))


def test_an_op_that_is_not_applied_leaves_every_byte():
    image = photos.small(64)
    apply = tf.function(lambda what: randaugment.apply(image, what, FILL))
    inverted = ops.invert(image)
    for name in TIMM:
        np.testing.assert_array_equal(apply(drawn((name, False, 9.0, 1.0), (name, False, 10.0, -1.0))), image)
        for slots in ([("Invert", True), (name, False)], [(name, False), ("Invert", True)]):
            np.testing.assert_array_equal(apply(drawn(*((n, a, 9.0, 1.0) for n, a in slots))), inverted)


def test_only_ops_that_are_applied_are_computed():
    """In the graph of `apply` nothing touches a picture but conditionals, which hold the 15 ops of both slots."""
    image = tf.TensorSpec([48, 32, 3], tf.uint8)
    two = drawn(("Invert", True, 9, 1), ("Invert", True, 9, 1))
    specs = {name: tf.TensorSpec(value.shape, value.dtype) for name, value in two.items()}
    apply = tf.function(lambda image, what: randaugment.apply(image, what, FILL))
    graph = apply.get_concrete_function(image, specs).graph
    pictures = [op for op in graph.get_operations() if any(t.shape == [48, 32, 3] for t in op.inputs)]
    conditionals = [op for op in pictures if op.type in ("If", "StatelessIf", "Case", "StatelessCase")]
    assert {op.type for op in pictures} - {op.type for op in conditionals} <= {"Identity", "EnsureShape", "Shape"}
    assert len(conditionals) >= 2
    counts = [max(_branches(op, graph.as_graph_def().library)) for op in conditionals]
    assert [count for count in counts if 15 <= count <= 17] == counts


def _branches(operation, library) -> list[int]:
    """Return the number of branches of a conditional and of those directly in its branches."""
    functions = {function.signature.name: function for function in library.function}

    def names(attributes) -> list[str]:
        if "branches" in attributes:
            return [f.name for f in attributes["branches"].list.func]
        return [attributes[key].func.name for key in ("then_branch", "else_branch")]

    own = names(operation.node_def.attr)
    nested = [
        node for name in own for node in functions[name].node_def if node.op.removeprefix("Stateless") in ("If", "Case")
    ]
    return [len(own), *(len(names(node.attr)) for node in nested)]


def test_same_seed_same_bytes_in_any_thread():
    image = photos.small(64)

    def view(seed):
        return randaugment.apply(image, randaugment.draw(seed, POLICY), FILL)

    def run(calls):
        dataset = tf.data.Dataset.from_tensor_slices(draws.seeds(120)).map(view, num_parallel_calls=calls)
        return np.stack(list(dataset.as_numpy_iterator()))

    once = run(1)
    np.testing.assert_array_equal(run(4), once)
    np.testing.assert_array_equal(run(1), once)
    changed = (once != image).any((1, 2, 3))
    assert 0.5 < changed.mean() < 0.95  # both ops are left out in a quarter of the draws
    assert len({picture.tobytes() for picture in once}) > 60


def test_describe_names_what_was_applied():
    slots = (("Rotate", True, 9.0, -1.0), ("Equalize", True, 9.0, 1.0), ("Solarize", False, 9.0, 1.0))
    got = randaugment.describe(drawn(*slots))
    assert len(got) == 2
    assert got[0] == "Rotate -27"
    assert got[1] == "Equalize"
    assert randaugment.describe(drawn(("Invert", False, 9.0, 1.0))) == []
