"""A classifier of keras.applications as a teacher, fed through its own `preprocess_input`."""

import difflib
from pathlib import Path

from deit import errors, keras
from deit.teachers import base, download

IMAGENET_CLASSES = 1000


def build(config, *, classes: tuple[str, ...]) -> base.Teacher:
    """Return the network teacher.name with teacher.weights: `imagenet` or a Keras weights file for the data.

    Input: teacher.image_size px (0 = data.image_size). A file holds the whole network with its classifier.
    Errors: UserError for an unknown name, a missing or unfitting file, a size that the network refuses.
    """
    check(config.teacher)
    teacher = config.teacher
    imagenet = teacher.weights == "imagenet"
    if imagenet and len(classes) != IMAGENET_CLASSES:  # before anything is downloaded
        raise errors.UserError(
            f"teacher.weights ('imagenet') has {IMAGENET_CLASSES} classes, the data has {len(classes)}: it "
            "must be the path of a weights file with the data's classes (or train one: teacher.kind=train "
            "with model.variant=backbone)"
        )
    size = teacher.image_size or config.data.image_size
    _, preprocess = _NETWORKS[teacher.name]
    network = _construct(config, size=size, num_classes=len(classes), weights=teacher.weights)
    network.trainable = False
    return base.Teacher(
        name=teacher.name,
        # preprocess_input scales in place where it can: it gets a tensor, which can't be changed.
        forward=lambda images: network(preprocess(images), training=False),
        image_size=size,
        num_classes=network.output_shape[-1],
        parameters=network.count_params(),
        classes=None,
        identity=f"{teacher.name} {'imagenet' if imagenet else download.sha256(Path(teacher.weights))}",
    )


def check(teacher) -> None:
    """Raise UserError for an unknown teacher.name or a weights file that is missing; builds nothing."""
    if teacher.name not in _NETWORKS:
        near = difflib.get_close_matches(teacher.name, _NETWORKS, n=3, cutoff=0.0)
        raise errors.UserError(f"teacher.name ({teacher.name!r}) is unknown; nearest: {', '.join(near)}")
    with base.readable(f"teacher.weights ({teacher.weights!r})"):
        if teacher.weights != "imagenet" and not Path(teacher.weights).is_file():
            raise errors.UserError(f"teacher.weights ({teacher.weights!r}) must be imagenet or an existing file")


def describe(config, num_classes: int) -> str:
    """Return name and size of the network, which is built without weights. Errors: UserError as in `build`."""
    teacher = config.teacher
    check(teacher)
    size = teacher.image_size or config.data.image_size
    count = IMAGENET_CLASSES if teacher.weights == "imagenet" else num_classes
    network = _construct(config, size=size, num_classes=count, weights=None)
    return f"{teacher.name} ({teacher.weights}), {network.count_params():,} parameters, {size} px"


def _construct(config, *, size: int, num_classes: int, weights: str | None):
    """Build the network with logits as output and load its weights, if any."""
    construct, _ = _NETWORKS[config.teacher.name]
    before = keras.mixed_precision.global_policy()
    keras.mixed_precision.set_global_policy(_POLICIES[config.precision])  # these networks take no dtype
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
        reason = str(error).strip().splitlines()[0]
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

_A = keras.applications

# (module with preprocess_input, its classifiers)
_FAMILIES = (
    (_A.convnext, (_A.ConvNeXtTiny, _A.ConvNeXtSmall, _A.ConvNeXtBase, _A.ConvNeXtLarge, _A.ConvNeXtXLarge)),
    (_A.densenet, (_A.DenseNet121, _A.DenseNet169, _A.DenseNet201)),
    (_A.efficientnet, (_A.EfficientNetB0, _A.EfficientNetB1, _A.EfficientNetB2, _A.EfficientNetB3)),
    (_A.efficientnet, (_A.EfficientNetB4, _A.EfficientNetB5, _A.EfficientNetB6, _A.EfficientNetB7)),
    (
        _A.efficientnet_v2,
        (_A.EfficientNetV2B0, _A.EfficientNetV2B1, _A.EfficientNetV2B2, _A.EfficientNetV2B3),
    ),
    (_A.efficientnet_v2, (_A.EfficientNetV2S, _A.EfficientNetV2M, _A.EfficientNetV2L)),
    (_A.inception_resnet_v2, (_A.InceptionResNetV2,)),
    (_A.inception_v3, (_A.InceptionV3,)),
    (_A.mobilenet, (_A.MobileNet,)),
    (_A.mobilenet_v2, (_A.MobileNetV2,)),
    (_A.mobilenet_v3, (_A.MobileNetV3Small, _A.MobileNetV3Large)),
    (_A.nasnet, (_A.NASNetMobile, _A.NASNetLarge)),
    (_A.regnet, (_A.RegNetX002, _A.RegNetX004, _A.RegNetX006, _A.RegNetX008, _A.RegNetX016, _A.RegNetX032)),
    (_A.regnet, (_A.RegNetX040, _A.RegNetX064, _A.RegNetX080, _A.RegNetX120, _A.RegNetX160, _A.RegNetX320)),
    (_A.regnet, (_A.RegNetY002, _A.RegNetY004, _A.RegNetY006, _A.RegNetY008, _A.RegNetY016, _A.RegNetY032)),
    (_A.regnet, (_A.RegNetY040, _A.RegNetY064, _A.RegNetY080, _A.RegNetY120, _A.RegNetY160, _A.RegNetY320)),
    (_A.resnet, (_A.ResNet50, _A.ResNet101, _A.ResNet152)),
    (_A.resnet_rs, (_A.ResNetRS50, _A.ResNetRS101, _A.ResNetRS152, _A.ResNetRS200, _A.ResNetRS270)),
    (_A.resnet_rs, (_A.ResNetRS350, _A.ResNetRS420)),
    (_A.resnet_v2, (_A.ResNet50V2, _A.ResNet101V2, _A.ResNet152V2)),
    (_A.vgg16, (_A.VGG16,)),
    (_A.vgg19, (_A.VGG19,)),
    (_A.xception, (_A.Xception,)),
)
_NETWORKS = {
    construct.__name__: (construct, module.preprocess_input)
    for module, constructs in _FAMILIES
    for construct in constructs
}
