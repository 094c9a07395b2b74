"""A stand-in of the example's teacher, BiT-M R50x3, for measurements: its shape and interface, random weights.

Promises: the arithmetic of the model, weight standardisation at every call included. It knows nothing about flowers.
"""

import math
from collections.abc import Sequence

import tensorflow as tf

_GROUPS = 32
_NORM_EPSILON = 1e-5
_KERNEL_EPSILON = 1e-10


def export(
    path: str,
    *,
    num_classes: int,
    width: float = 3,
    blocks: Sequence[int] = (3, 4, 6, 3),
    image_size: int | None = None,
    seed: int = 0,
) -> None:
    """Write a SavedModel to `path`: serving_default takes raw images and gives {"logits": [B, num_classes]}.

    The images are float32 [B, image_size, image_size, 3] in [0, 255]; None takes any size.
    The defaults are R50x3: with 5 classes 211 M parameters, 72 GFLOPs an image of 224 px, 850 MB on the disk.
    """
    network = Network(num_classes=num_classes, width=width, blocks=blocks, seed=seed)

    @tf.function(input_signature=[tf.TensorSpec([None, image_size, image_size, 3], tf.float32, name="images")])
    def serve(images):
        return {"logits": network.logits(images)}

    tf.saved_model.save(network, path, signatures={"serving_default": serve})


class Network(tf.Module):
    """A ResNet-v2 of bottleneck units with GroupNorm and standardised kernels (arXiv:1912.11370, section 3.1).

    Attributes:
      root: the convolution of the images, 7x7 with stride 2.
      units: the units of all stages; the first of every stage but the first halves the sides.
      norm: what the last unit's output passes before it is averaged.
      kernel, bias: the linear head, [D, C] and [C].
    """

    def __init__(self, *, num_classes: int, width: float = 3, blocks: Sequence[int] = (3, 4, 6, 3), seed: int = 0):
        super().__init__()
        draw = _He(seed)
        channels = int(64 * width)
        self.root = StdConv([7, 7, 3, channels], draw)
        self.units = []
        for stage, count in enumerate(blocks):
            inner = int(64 * width) << stage
            for unit in range(count):
                self.units.append(Unit(channels, inner, draw, first=unit == 0, stride=2 if stage and not unit else 1))
                channels = 4 * inner
        self.norm = GroupNormRelu(channels)
        self.kernel = tf.Variable(draw([channels, num_classes]))
        self.bias = tf.Variable(tf.zeros([num_classes]))

    def logits(self, images: tf.Tensor) -> tf.Tensor:
        """Return logits [B, C] of raw images [B, H, W, 3] in [0, 255]."""
        x = self.root(images / 127.5 - 1.0, stride=2)
        x = tf.pad(x, [[0, 0], [1, 1], [1, 1], [0, 0]])  # BiT pads its pooling with zeros, below which values can be
        x = tf.nn.max_pool2d(x, 3, 2, "VALID")
        for unit in self.units:
            x = unit(x)
        return tf.reduce_mean(self.norm(x), [1, 2]) @ self.kernel + self.bias


class Unit(tf.Module):
    """A pre-activation bottleneck unit: three convolutions, each after its norm and ReLU, beside a shortcut."""

    def __init__(self, channels: int, inner: int, draw, *, first: bool, stride: int):
        super().__init__()
        self.stride = stride
        self.norms = [GroupNormRelu(size) for size in (channels, inner, inner)]
        shapes = [1, 1, channels, inner], [3, 3, inner, inner], [1, 1, inner, 4 * inner]
        self.convs = [StdConv(shape, draw) for shape in shapes]
        self.projection = StdConv([1, 1, channels, 4 * inner], draw) if first else None

    def __call__(self, x: tf.Tensor) -> tf.Tensor:
        """Map [B, H, W, channels] to [B, H / stride, W / stride, 4 inner]; the projection sees the activated input."""
        y = self.norms[0](x)
        shortcut = self.projection(y, stride=self.stride) if self.projection else x
        y = self.norms[1](self.convs[0](y))
        y = self.norms[2](self.convs[1](y, stride=self.stride))
        return self.convs[2](y) + shortcut


class StdConv(tf.Module):
    """A convolution without bias, whose kernel has mean 0 and variance 1 an output channel (arXiv:1903.10520)."""

    def __init__(self, shape: Sequence[int], draw):
        super().__init__()
        self.kernel = tf.Variable(draw(shape))  # [H, W, I, O]

    def __call__(self, x: tf.Tensor, *, stride: int = 1) -> tf.Tensor:
        """Convolve [B, H, W, I], padded by half a kernel on every side, which SAME is not where it strides."""
        mean, variance = tf.nn.moments(self.kernel, [0, 1, 2])
        kernel = (self.kernel - mean) * tf.math.rsqrt(variance + _KERNEL_EPSILON)
        half = self.kernel.shape[0] // 2
        return tf.nn.conv2d(x, kernel, stride, [[0, 0], [half, half], [half, half], [0, 0]])


class GroupNormRelu(tf.Module):
    """GroupNorm of 32 groups (arXiv:1803.08494, equation 7), then ReLU."""

    def __init__(self, channels: int):
        super().__init__()
        self.gamma = tf.Variable(tf.ones([_GROUPS, channels // _GROUPS]))
        self.beta = tf.Variable(tf.zeros([_GROUPS, channels // _GROUPS]))

    def __call__(self, x: tf.Tensor) -> tf.Tensor:
        """Map [B, H, W, D] to the same shape.

        The variance is that of flax, E[x^2] - E[x]^2 in fp32, and norm, gamma and beta are one multiply-add: six
        passes over the activations in all. The sums run over pixels first and over a group's channels after that,
        since a CPU takes three times as long to reduce [B, H * W, G, D / G] at once.
        """
        mean, square = self._grouped(x), self._grouped(tf.square(x))  # [B, G, 1]
        variance = tf.maximum(square - tf.square(mean), 0.0)
        scale = self.gamma * tf.math.rsqrt(variance + _NORM_EPSILON)  # [B, G, D / G]
        return tf.nn.relu(x * self._spread(scale) + self._spread(self.beta - mean * scale))

    def _grouped(self, x: tf.Tensor) -> tf.Tensor:
        means = tf.reduce_mean(x, [1, 2])  # [B, D]
        return tf.reduce_mean(tf.reshape(means, [-1, *self.gamma.shape]), -1, keepdims=True)

    def _spread(self, values: tf.Tensor) -> tf.Tensor:
        return tf.reshape(values, [-1, 1, 1, self.gamma.shape.num_elements()])


class _He:
    """Normal draws of variance 2 / fan-in, other ones at every call."""

    def __init__(self, seed: int):
        self.seed, self.calls = seed, 0

    def __call__(self, shape: Sequence[int]) -> tf.Tensor:
        self.calls += 1
        return tf.random.stateless_normal(shape, [self.seed, self.calls], stddev=math.sqrt(2 / math.prod(shape[:-1])))
