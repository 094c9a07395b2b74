"""Networks that can teach: an ImageNet backbone with a new head, a small ResNet for the quickstart."""

from __future__ import annotations

import difflib
import pathlib
from typing import Any

import h5py
import numpy as np
import tensorflow as tf

from deit import errors, keras
from deit.models import vit

_serializable = keras.utils.register_keras_serializable(package="deit")


@_serializable
class InputRange(keras.layers.Layer):
    """Bring RGB images in [0, 255] into the range that a network of keras.applications was trained on.

    tf: [-1, 1]. torch: (x / 255 - mean) / std of ImageNet. caffe: BGR minus ImageNet's mean. none: as it is.
    """

    def __init__(self, mode: str, **kwargs: Any) -> None:
        super().__init__(autocast=False, **kwargs)
        self.mode = mode

    def call(self, x: tf.Tensor) -> tf.Tensor:
        if self.mode == "caffe":
            x = x[..., ::-1]
        scale, shift = _RANGES[self.mode]
        return tf.cast(x * tf.constant(scale, tf.float32) - tf.constant(shift, tf.float32), self.compute_dtype)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "mode": self.mode}


def check(model_config: Any) -> None:
    """Raise UserError if the backbone is unknown, its weights file is missing or it needs one."""
    name, weights = model_config.backbone, model_config.weights
    if name not in BACKBONES:
        near = difflib.get_close_matches(name, BACKBONES, n=3, cutoff=0.0)
        raise errors.UserError(f"model.backbone ({name}) is unknown; nearest: {', '.join(near)}")
    if weights == "none" and name not in WITHOUT_BATCH_NORM:
        raise errors.UserError(
            f"model.weights (none) with model.backbone ({name}): batch-norm statistics stay frozen here, "
            "so this network needs trained weights"
        )
    if weights not in ("imagenet", "none") and not pathlib.Path(weights).is_file():
        raise errors.UserError(f"model.weights ({weights}) must be imagenet, none or an existing Keras weights file")


def backbone(
    model_config: Any, *, num_classes: int, image_size: int, policy: Any, load_weights: bool
) -> tuple[Any, tuple[str, ...]]:
    """Build a backbone, cut, pooled, with a new head; return it and the path prefixes of loaded weights."""
    weights = model_config.weights if load_weights else "none"
    construct, mode = BACKBONES[model_config.backbone]
    network = _cut(_construct(construct, model_config, weights, image_size, policy), model_config.cut)
    if len(network.output_shape) != 4:
        raise errors.UserError(f"model.cut ({model_config.cut}) must be a layer whose output is [B, H, W, C]")
    if weights not in ("imagenet", "none"):
        _load_by_name(network, weights)
    image = keras.Input([image_size, image_size, 3], name="image", dtype="float32")
    x = InputRange(mode, name="input_range", dtype=policy)(image)
    x = network(x, training=False)  # batch-norm statistics stay frozen, dropout stays off
    model = _with_head(image, x, num_classes, model_config.variant)
    return model, () if weights == "none" else (network.name,)


def groupnorm_resnet(
    model_config: Any, *, num_classes: int, image_size: int, policy: Any, load_weights: bool
) -> tuple[Any, tuple[str, ...]]:
    """Build a ResNet of three stages (32, 64, 128 channels, two convolutions each) with group normalisation.

    It has no pretrained weights to load. Group normalisation has no state, so it trains from nothing at any
    batch size. About 300 k parameters.
    """
    image = keras.Input([image_size, image_size, 3], name="image", dtype="float32")
    x = vit.Normalize(model_config.mean, model_config.std, name="normalize", dtype=policy)(image)
    x = _convolution(x, 32, 2, "stem", policy)  # half the side at once: the first stage costs most
    for i, width in enumerate((32, 64, 128)):
        x = _residual(x, width, 1 if i == 0 else 2, f"stage{i}", policy)
    return _with_head(image, x, num_classes, model_config.variant), ()


def _residual(x: Any, width: int, stride: int, name: str, policy: Any) -> Any:
    y = _convolution(x, width, stride, f"{name}.0", policy)
    y = _convolution(y, width, 1, f"{name}.1", policy, activate=False)
    if x.shape[-1] != width or stride != 1:
        x = keras.layers.Conv2D(width, 1, strides=stride, name=f"{name}.shortcut", dtype=policy)(x)
    y = keras.layers.Add(name=f"{name}.add", dtype=policy)([x, y])
    return keras.layers.ReLU(name=f"{name}.out", dtype=policy)(y)


def _convolution(x: Any, width: int, stride: int, name: str, policy: Any, *, activate: bool = True) -> Any:
    x = keras.layers.Conv2D(
        width,
        3,
        strides=stride,
        padding="same",
        use_bias=False,
        kernel_initializer=keras.initializers.HeNormal(),
        name=f"{name}.conv",
        dtype=policy,
    )(x)
    x = keras.layers.GroupNormalization(groups=8, epsilon=1e-5, name=f"{name}.norm", dtype=policy)(x)
    return keras.layers.ReLU(name=f"{name}.relu", dtype=policy)(x) if activate else x


def _with_head(image: Any, x: Any, num_classes: int, name: str) -> Any:
    x = keras.layers.GlobalAveragePooling2D(name="pool", dtype="float32")(x)
    return keras.Model(image, {"cls": keras.layers.Dense(num_classes, name="head", dtype="float32")(x)}, name=name)


def _construct(construct: Any, model_config: Any, weights: str, image_size: int, policy: Any) -> Any:
    source = "imagenet" if weights == "imagenet" else None
    before = keras.mixed_precision.global_policy()
    keras.backend.reset_uids()  # some leave layers unnamed: count them from one every time
    keras.mixed_precision.set_global_policy(policy)  # these networks take no dtype
    try:
        return construct(include_top=False, weights=source, input_shape=(image_size, image_size, 3))
    except Exception as error:  # one line for a size that is too small, a failed download and the like
        reason = str(error).splitlines()[0]
        raise errors.UserError(
            f"model.backbone ({model_config.backbone}) with model.weights ({weights}) at "
            f"{image_size} px can't be built: {reason}"
        ) from error
    finally:
        keras.mixed_precision.set_global_policy(before)


def _cut(network: Any, cut: str) -> Any:
    names = [layer.name for layer in network.layers]
    if cut and cut not in names:
        near = difflib.get_close_matches(cut, names, n=3, cutoff=0.0)
        raise errors.UserError(f"model.cut ({cut}) is no layer of {network.name}; nearest: {', '.join(near)}")
    output = network.get_layer(cut).output if cut else network.output
    return keras.Model(network.input, output, name="backbone")


def _load_by_name(network: Any, path: str) -> None:
    """Assign the weights of a Keras HDF5 file by layer name; every layer that has weights must be in it."""
    try:
        with h5py.File(path) as file:
            groups = file.get("model_weights", file)
            stored = {_text(name) for name in groups.attrs["layer_names"]}
        missing = [layer.name for layer in network.layers if layer.weights and layer.name not in stored]
        if not missing:
            network.load_weights(path, by_name=True)
    except (OSError, KeyError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise errors.UserError(f"model.weights ({path}) is no Keras HDF5 weights file for it: {reason}") from error
    if missing:
        raise errors.UserError(
            f"model.weights ({path}) lacks {len(missing)} of the backbone's layers, the first is {missing[0]}"
        )


def _text(name: str | bytes | np.bytes_) -> str:
    return name.decode() if isinstance(name, bytes) else str(name)


# mode -> (scale, shift): x * scale - shift; caffe after the swap to BGR.
_RANGES = {
    "tf": ([1 / 127.5] * 3, [1.0] * 3),
    "torch": (
        [1 / (255 * s) for s in (0.229, 0.224, 0.225)],
        [m / s for m, s in ((0.485, 0.229), (0.456, 0.224), (0.406, 0.225))],
    ),
    "caffe": ([1.0] * 3, [103.939, 116.779, 123.68]),
    "none": ([1.0] * 3, [0.0] * 3),
}

_A = keras.applications

# name -> (constructor, input range). "none": the network scales its own input.
BACKBONES = {
    "ConvNeXtTiny": (_A.ConvNeXtTiny, "none"),
    "ConvNeXtSmall": (_A.ConvNeXtSmall, "none"),
    "ConvNeXtBase": (_A.ConvNeXtBase, "none"),
    "DenseNet121": (_A.DenseNet121, "torch"),
    "DenseNet169": (_A.DenseNet169, "torch"),
    "DenseNet201": (_A.DenseNet201, "torch"),
    "EfficientNetB0": (_A.EfficientNetB0, "none"),
    "EfficientNetB1": (_A.EfficientNetB1, "none"),
    "EfficientNetB2": (_A.EfficientNetB2, "none"),
    "EfficientNetB3": (_A.EfficientNetB3, "none"),
    "EfficientNetB4": (_A.EfficientNetB4, "none"),
    "EfficientNetV2B0": (_A.EfficientNetV2B0, "none"),
    "EfficientNetV2B1": (_A.EfficientNetV2B1, "none"),
    "EfficientNetV2B2": (_A.EfficientNetV2B2, "none"),
    "EfficientNetV2B3": (_A.EfficientNetV2B3, "none"),
    "EfficientNetV2S": (_A.EfficientNetV2S, "none"),
    "InceptionResNetV2": (_A.InceptionResNetV2, "tf"),
    "InceptionV3": (_A.InceptionV3, "tf"),
    "MobileNet": (_A.MobileNet, "tf"),
    "MobileNetV2": (_A.MobileNetV2, "tf"),
    "MobileNetV3Large": (_A.MobileNetV3Large, "none"),
    "MobileNetV3Small": (_A.MobileNetV3Small, "none"),
    "NASNetMobile": (_A.NASNetMobile, "tf"),
    "ResNet50": (_A.ResNet50, "caffe"),
    "ResNet101": (_A.ResNet101, "caffe"),
    "ResNet152": (_A.ResNet152, "caffe"),
    "ResNet50V2": (_A.ResNet50V2, "tf"),
    "ResNet101V2": (_A.ResNet101V2, "tf"),
    "ResNet152V2": (_A.ResNet152V2, "tf"),
    "ResNetRS50": (_A.ResNetRS50, "none"),
    "VGG16": (_A.VGG16, "caffe"),
    "VGG19": (_A.VGG19, "caffe"),
    "Xception": (_A.Xception, "tf"),
}

WITHOUT_BATCH_NORM = ("ConvNeXtTiny", "ConvNeXtSmall", "ConvNeXtBase", "VGG16", "VGG19")
