"""A classifier of keras.applications as a teacher, fed as its own `preprocess_input` would feed it."""

import dataclasses
import difflib
from pathlib import Path

from deit import cost, errors, keras
from deit import workdir as run_directory
from deit.teachers import base

IMAGENET_CLASSES = 1000


def build(config, *, classes: tuple[str, ...], workdir: Path) -> base.Teacher:
    """Return the network teacher.name with teacher.weights: `imagenet` or a Keras weights file for the data.

    Input: teacher.image_size px (0 = data.image_size). A file holds the whole network with its classifier.
    Errors: UserError for an unknown name, a missing or unfitting file, a size that the network refuses.
    """
    check(config)
    teacher = config.teacher
    if teacher.weights == "imagenet" and len(classes) != IMAGENET_CLASSES:  # before anything is downloaded
        raise errors.UserError(
            f"teacher.weights ('imagenet') has {IMAGENET_CLASSES} classes, the data has {len(classes)}: it "
            "must be the path of a weights file with the data's classes (or train one: teacher.kind=train "
            "with model.variant=backbone)"
        )
    network = _construct(config, num_classes=len(classes), weights=teacher.weights)
    network.trainable = False
    num_classes = network.output_shape[-1]
    return base.Teacher(
        name=teacher.name,
        forward=lambda images: network(images, training=False),
        input=_input(config),
        num_classes=num_classes,
        parameters=network.count_params(),
        classes=base.named(teacher.class_names, teacher.name, num_classes),
        identity=identity(config, workdir=workdir),
    )


def check(config) -> None:
    """Raise UserError for an unknown teacher.name, missing weights or names; builds nothing."""
    teacher = config.teacher
    if teacher.name not in _NETWORKS:
        near = difflib.get_close_matches(teacher.name, _NETWORKS, n=3, cutoff=0.0)
        raise errors.UserError(f"teacher.name ({teacher.name!r}) is unknown; nearest: {', '.join(near)}")
    with base.readable(f"teacher.weights ({teacher.weights!r})"):
        if teacher.weights != "imagenet" and not Path(teacher.weights).is_file():
            raise errors.UserError(f"teacher.weights ({teacher.weights!r}) must be imagenet or an existing file")
    base.class_names(teacher.class_names)


def describe(config, num_classes: int) -> base.Described:
    """Return name, size and cost of the network, which is built without weights. Errors: UserError as in `build`."""
    check(config)
    teacher = config.teacher
    count = IMAGENET_CLASSES if teacher.weights == "imagenet" else num_classes
    network = _construct(config, num_classes=count, weights=None)
    line = f"{teacher.name} ({teacher.weights}), {network.count_params():,} parameters"
    wanted = _input(config)
    flops = cost.of(lambda images: network(images, training=False), wanted.size).flops
    return base.Described(base.described(line, wanted), flops)


def identity(config, *, workdir: Path) -> str:
    """Return the network's name and what its weights are: `imagenet` or the sha256 of their file."""
    check(config)
    name, weights = config.teacher.name, config.teacher.weights
    if weights == "imagenet":
        return f"{name} imagenet"
    with base.readable(f"teacher.weights ({weights!r})"):
        return f"{name} {run_directory.describe(Path(weights))['sha256']}"


def preprocessing(config) -> dict[str, object]:
    """Return the declared input: a family's could be corrected one day, which makes it another teacher."""
    check(config)
    return base.fields(_input(config))


def names() -> tuple[str, ...]:
    """Return every legal value of teacher.name."""
    return tuple(_NETWORKS)


def classes(config, *, workdir: Path) -> list[tuple[str, ...]]:
    """Return the class names of teacher.class_names, if any."""
    found = base.class_names(config.teacher.class_names)
    return [] if found is None else [found]


def absent(config) -> bool:
    """Return False: weights that are not there are refused at the start."""
    return False


def _input(config) -> base.Input:
    _, declared = _NETWORKS[config.teacher.name]
    return dataclasses.replace(declared, size=config.teacher.image_size or config.data.image_size)


def _construct(config, *, num_classes: int, weights: str | None):
    """Build the network with logits as output and load its weights, if any."""
    construct, _ = _NETWORKS[config.teacher.name]
    size = _input(config).size
    policy = _POLICIES[base.precision(config)]
    before = keras.mixed_precision.global_policy()
    keras.mixed_precision.set_global_policy(policy)  # these networks take no dtype
    try:
        network = construct(
            weights="imagenet" if weights == "imagenet" else None,
            input_shape=(size, size, 3),
            classes=num_classes,
            classifier_activation=None,
        )
        if weights not in (None, "imagenet"):
            network.load_weights(weights)
    except Exception as error:  # a size that is refused, a failed download, a file of another network
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise errors.UserError(
            f"teacher.name ({config.teacher.name}) with teacher.weights ({weights}) at {size} px "
            f"(teacher.image_size) can't be built: {reason}"
        ) from error
    finally:
        keras.mixed_precision.set_global_policy(before)
    return network


_POLICIES = {
    "float32": "float32",
    "tf32": "float32",
    "mixed_bfloat16": "mixed_bfloat16",
    "mixed_float16": "mixed_float16",
}

# What the families' `preprocess_input` does, as numbers (a test holds one against the other).
_RAW = base.Input(0)  # the network has the scaling inside
_SIGNED = base.Input(0, range=(-1.0, 1.0))  # "tf"
_IMAGENET = base.Input(0, range=(0.0, 1.0), mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))  # "torch"
_CAFFE = base.Input(0, mean=(103.939, 116.779, 123.68), channels="BGR")

_A = keras.applications

# (input, classifiers that want it)
_FAMILIES = (
    (_RAW, (_A.ConvNeXtTiny, _A.ConvNeXtSmall, _A.ConvNeXtBase, _A.ConvNeXtLarge, _A.ConvNeXtXLarge)),
    (_IMAGENET, (_A.DenseNet121, _A.DenseNet169, _A.DenseNet201)),
    (_RAW, (_A.EfficientNetB0, _A.EfficientNetB1, _A.EfficientNetB2, _A.EfficientNetB3)),
    (_RAW, (_A.EfficientNetB4, _A.EfficientNetB5, _A.EfficientNetB6, _A.EfficientNetB7)),
    (
        _RAW,
        (_A.EfficientNetV2B0, _A.EfficientNetV2B1, _A.EfficientNetV2B2, _A.EfficientNetV2B3),
    ),
    (_RAW, (_A.EfficientNetV2S, _A.EfficientNetV2M, _A.EfficientNetV2L)),
    (_SIGNED, (_A.InceptionResNetV2,)),
    (_SIGNED, (_A.InceptionV3,)),
    (_SIGNED, (_A.MobileNet,)),
    (_SIGNED, (_A.MobileNetV2,)),
    (_RAW, (_A.MobileNetV3Small, _A.MobileNetV3Large)),
    (_SIGNED, (_A.NASNetMobile, _A.NASNetLarge)),
    (_RAW, (_A.RegNetX002, _A.RegNetX004, _A.RegNetX006, _A.RegNetX008, _A.RegNetX016, _A.RegNetX032)),
    (_RAW, (_A.RegNetX040, _A.RegNetX064, _A.RegNetX080, _A.RegNetX120, _A.RegNetX160, _A.RegNetX320)),
    (_RAW, (_A.RegNetY002, _A.RegNetY004, _A.RegNetY006, _A.RegNetY008, _A.RegNetY016, _A.RegNetY032)),
    (_RAW, (_A.RegNetY040, _A.RegNetY064, _A.RegNetY080, _A.RegNetY120, _A.RegNetY160, _A.RegNetY320)),
    (_CAFFE, (_A.ResNet50, _A.ResNet101, _A.ResNet152)),
    (_RAW, (_A.ResNetRS50, _A.ResNetRS101, _A.ResNetRS152, _A.ResNetRS200, _A.ResNetRS270)),
    (_RAW, (_A.ResNetRS350, _A.ResNetRS420)),
    (_SIGNED, (_A.ResNet50V2, _A.ResNet101V2, _A.ResNet152V2)),
    (_CAFFE, (_A.VGG16,)),
    (_CAFFE, (_A.VGG19,)),
    (_SIGNED, (_A.Xception,)),
)
_NETWORKS = {construct.__name__: (construct, wanted) for wanted, constructs in _FAMILIES for construct in constructs}
