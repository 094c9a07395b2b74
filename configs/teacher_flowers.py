"""Fine-tune MobileNet (ImageNet weights, cut at conv_pw_12_relu) into a teacher for tf_flowers.

python main.py --config=configs/teacher_flowers.py
python main.py --config=configs/deit_tiny_flowers.py \\
    --config.teacher.kind=run --config.teacher.path=runs/teacher_flowers

Batch-norm statistics stay ImageNet's; every other weight is trained. Without a network, name a Keras weights
file: --config.model.weights=FILE.h5. A linear head alone reaches 91.8 % on train[90%:].
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    """Return the locked configuration."""
    c = base.get_config()
    c.model.variant, c.model.backbone, c.model.cut = "backbone", "MobileNet", "conv_pw_12_relu"
    c.model.drop_path = 0.0
    c.epochs, c.global_batch, c.micro_batch = 5.0, 64, 32
    c.optim.peak_lr, c.optim.warmup_epochs = 3e-4, 0.5
    c.checkpoint.every_updates = c.eval.every_updates = 52  # an epoch
    c.log.every_updates = 5
    return c.lock()
