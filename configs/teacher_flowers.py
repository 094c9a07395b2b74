"""Fine-tune MobileNet (ImageNet weights, cut at conv_pw_12_relu) into a teacher for tf_flowers, or for your pictures.

python main.py --config=configs/teacher_flowers.py
python tools/eval.py --ckpt=runs/teacher_flowers
python main.py --config=configs/deit_tiny_flowers.py \\
    --config.teacher.kind=run --config.teacher.path=runs/teacher_flowers

Batch-norm statistics stay ImageNet's; every other weight is trained. Without a network, name a Keras weights
file: --config.model.weights=FILE.h5. A linear head alone reaches 91.8 % on train[90%:].

For your own pictures, in the first and the third command: --config.data.name=folder:PICTURES and, where the folder
has splits of its own, --config.data.train_split=train --config.data.eval_split=val (docs/data.md). The first one's
--workdir=runs/NAME is then --ckpt and --config.teacher.path. Look at the report (the second command): a class of low
recall is one that the student will be taught wrongly. What to change for a better teacher, in this order:
- a larger backbone: --config.model.backbone=EfficientNetV2S --config.model.cut= (with its whole body); any name of
  deit/models/cnn.py. A teacher at 299 px teaches a student at 224: --config.data.image_size=299.
- longer: --config.epochs=20.
- a smaller --config.optim.peak_lr (1e-4) where the first epochs lose what ImageNet's weights know.
A teacher too large to work beside its student is asked once: tools/cache_teacher.py (docs/teachers.md).
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
