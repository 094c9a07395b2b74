"""Every field once: unit, legal values, source. A variant is `base.get_config()` and a few changed lines."""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Return the defaults: DeiT-Ti/16 without a teacher on tf_flowers."""
    c = ConfigDict()
    c.seed = 0  # drives the data stream: order, crops, every draw of the augmentation
    c.epochs = 20.0  # passes over the training split
    c.total_updates = 0  # optimizer steps; > 0 replaces `epochs` and shrinks every duration in proportion
    c.global_batch = 256  # examples per optimizer update = replicas x micro_batch x accum_steps
    c.micro_batch = 16  # examples per forward/backward pass on one replica
    c.precision = "float32"  # float32 | tf32 | mixed_bfloat16 | mixed_float16
    # auto (multi_worker where TF_CONFIG names several workers, else one_device) | one_device (the first GPU, else the
    # CPU) | mirrored (several devices of this machine) | multi_worker (several processes, one device each) | tpu
    c.strategy = "auto"
    c.devices = 0  # with strategy=mirrored: how many devices (0 = every GPU; on a CPU, logical devices)
    c.tpu = "local"  # with strategy=tpu: name or grpc:// address of the TPU; local = of this TPU VM
    c.startup_seconds = 600.0  # with multi_worker: how long a process waits for the others before it gives up
    c.xla = False  # compile a micro-batch's forward and backward pass with XLA (never the collectives)
    # Where the student's weights come from: a run directory, a checkpoint, or what tools/convert_weights.py wrote; "" =
    # drawn by model.seed. Its position embedding is resized; its heads come over where the classes are the same.
    c.init_from = ""
    c.init_weights = "raw"  # raw | ema: which of the two a run's checkpoint has
    c.max_skipped = 10  # updates in a row with non-finite gradients before the run stops with exit code 4

    c.data = ConfigDict()
    # tfds:NAME | folder:PATH (a folder per class) | digits (scikit-learn's) | digits:56789 (those of these classes)
    c.data.name = "tfds:tf_flowers"
    c.data.data_dir = ""  # where TFDS looks for and prepares data; "" = its default
    c.data.train_split = "train[:90%]"
    c.data.eval_split = "train[90%:]"
    c.data.image_size = 224  # px, the side of the student's square input
    c.data.train_size = 3303  # examples; read only by --mode=plan where the data is absent
    c.data.eval_size = 367  # examples; as above
    c.data.num_classes = 5  # as above
    c.data.split_seed = 0  # order of a folder's or the digits' examples behind NAME[a%:b%]
    c.data.max_ram_bytes = 8_000_000_000  # of a TFDS split in tfrecord files, which is held in memory, encoded
    c.data.max_pixels = 100_000_000  # height x width; a larger image is not decoded and counts as unreadable
    c.data.max_bad_fraction = 0.01  # unreadable training images tolerated, as a fraction of those read; 0 to 1
    c.data.threads = 0  # threads that decode and augment; 0 = one a core

    c.augment = ConfigDict()
    # resize_crop (Keras example: resize to S + margin, random S crop) | random_resized (DeiT) | simple (DeiT-III:
    # short side to S, 4 px of reflected border, random S crop)
    c.augment.crop = "resize_crop"
    c.augment.resize_margin = 20  # px, for resize_crop
    c.augment.scale = (0.08, 1.0)  # fraction of the area, for random_resized
    c.augment.ratio = (3 / 4, 4 / 3)  # width / height, for random_resized
    c.augment.flip = 0.5  # probability of a horizontal flip
    c.augment.randaugment = ""  # timm's notation, DeiT: rand-m9-mstd0.5-inc1 (two of 15 operations); "" = off
    c.augment.three_augment = False  # DeiT-III: one of grey, solarize, Gaussian blur; DeiT-III adds jitter 0.3
    c.augment.jitter = 0.0  # brightness, contrast, saturation each by a factor in 1 +- jitter; 0 <= . <= 1
    c.augment.erasing = 0.0  # probability that a rectangle becomes noise (DeiT: 0.25)
    c.augment.mixup = 0.0  # alpha of the Beta distribution (DeiT: 0.8); 0 = off
    c.augment.cutmix = 0.0  # alpha of the Beta distribution (DeiT: 1.0); 0 = off
    c.augment.mix_prob = 1.0  # probability that a group is mixed at all
    c.augment.mix_switch = 0.5  # probability of cutmix where both are on
    c.augment.mix_group = 64  # examples with one lambda, mixed among themselves; divides a replica's share of a batch
    c.augment.repeats = 1  # views of an example in a row (repeated augmentation, arXiv:1902.05509; DeiT: 3)

    c.model = ConfigDict()
    # timm's names (deit_*, deit3_*) | keras_example | deit_micro[_distilled]_patch{4,8}_32, deit3_micro_patch8_32 |
    # backbone | groupnorm_resnet
    c.model.variant = "deit_tiny_distilled_patch16_224"
    c.model.patch = 0  # px, the side of a patch; 0 = as the variant's name says
    c.model.registers = 0  # register tokens (arXiv:2309.16588), timm's reg_tokens
    # all (a distilled variant's two) | cls (its distillation token has no head: only the class token answers)
    c.model.heads = "all"
    c.model.seed = 0  # drives initial weights and drop-path
    c.model.norm_epsilon = 1e-6  # of the layer normalisations, above 0; networks of Hugging Face have 1e-12
    c.model.drop_path = 0.1  # rate of the last block, linear over depth (DeiT), or of all (DeiT-III); 0 <= . < 1
    # Hand-written gradients of DeiT's blocks (deit/models/fused_block.py): faster, less memory. False: plain layers
    c.model.fused_gradients = True
    c.model.mean = (0.485, 0.456, 0.406)  # input is (x / 255 - mean) / std; ImageNet's
    c.model.std = (0.229, 0.224, 0.225)
    c.model.backbone = "MobileNet"  # with variant=backbone: a classifier of tf_keras.applications
    c.model.weights = "imagenet"  # with variant=backbone: imagenet | none | path of a Keras weights file
    c.model.cut = ""  # with variant=backbone: last layer kept; "" = all but the classifier

    c.optim = ConfigDict()
    c.optim.name = "adamw"  # adamw | lamb (DeiT-III)
    c.optim.peak_lr = 1e-3  # learning rate after warm-up, at batch `lr_batch`
    c.optim.lr_batch = 0  # peak_lr is scaled by global_batch / lr_batch (DeiT: 512); 0 = used as it is
    c.optim.schedule = "cosine"  # cosine | constant
    c.optim.warmup_epochs = 2.0
    c.optim.warmup_lr = 0.0  # where warm-up starts
    c.optim.final_lr = 0.0  # where the cosine ends
    c.optim.weight_decay = 0.05
    c.optim.decay_coupled = True  # True: decay x lr(update), as in PyTorch and the DeiT paper; False: TFA's own
    c.optim.decay_exclude = True  # no decay on 1-D tensors, biases, position embedding and tokens (DeiT)
    c.optim.beta_1 = 0.9
    c.optim.beta_2 = 0.999
    c.optim.epsilon = 1e-8
    c.optim.amsgrad = False
    c.optim.clip_norm = 0.0  # global norm of the gradients; 0 = off
    c.optim.layer_decay = 1.0  # 0 < . <= 1: a layer's step is this times that of the one above (fine-tuning: .65 to .9)
    # "" = everything | attention (attention, heads, position embedding; arXiv:2203.09795) | heads (linear probing)
    c.optim.train_only = ""
    c.optim.ema_decay = 0.999  # at update t: min(ema_decay, (1 + t) / (10 + t)); 0 = no EMA

    c.loss = ConfigDict()
    c.loss.kind = "ce"  # ce | bce (DeiT-III)
    c.loss.smoothing = 0.1  # 0 <= . < 1

    c.distill = ConfigDict()
    c.distill.kind = "none"  # none | soft (paper eq. 2) | hard (paper eq. 3)
    c.distill.alpha = 0.5  # weight of the distillation term, 0 to 1; the paper: hard .5, soft .1 with tau 3
    c.distill.tau = 3.0  # temperature of soft distillation, > 0; facebookresearch/deit's default: 1
    c.distill.form = "kl"  # soft only: kl (tau^2 KL) | ce (cross-entropy with softmax(Zt / tau), no tau^2)
    c.distill.reduction = "batch"  # batch (mean over examples) | batch_classes (facebookresearch/deit: B * C)
    c.distill.weighting = "convex"  # convex ((1 - alpha), alpha) | sum (1, alpha): timm's is sum with alpha 1

    c.teacher = ConfigDict()
    c.teacher.kind = "none"  # none | saved_model | keras_application | run | train | ensemble
    # saved_model: directory (TF-Hub's too), zip, tar or tar.gz of one, or the URL of such a file; run: a run directory
    c.teacher.path = ""
    c.teacher.sha256 = ""  # saved_model as archive or URL: refuse another content
    c.teacher.image_size = 0  # px the teacher wants, for saved_model and keras_application; 0 = the student's
    c.teacher.range = (0.0, 255.0)  # saved_model: what [0, 255] is scaled to before mean and std; TF-Hub: (0.0, 1.0)
    c.teacher.mean = (0.0, 0.0, 0.0)  # saved_model: then subtracted, one a channel
    c.teacher.std = (1.0, 1.0, 1.0)  # saved_model: then divided by
    c.teacher.class_names = ""  # saved_model, keras_application: file of names, one a line, in the logits' order
    c.teacher.background = False  # saved_model: its first logit is no class (TF-Hub's "background")
    c.teacher.name = "ResNet50"  # keras_application: a classifier of tf_keras.applications
    c.teacher.weights = "imagenet"  # keras_application: imagenet | path of a Keras weights file with the data's classes
    # ensemble: KIND:PATH (saved_model, run) or keras_application:NAME each, then FIELD=VALUE of teacher.* after spaces
    c.teacher.members = ()  # ("run:runs/a", "saved_model:hub/b image_size=299 range=(0,1)"): probabilities are averaged
    c.teacher.batch = 64  # images per teacher pass, whatever micro_batch is
    c.teacher.precision = ""  # "" (the student's; a SavedModel's own) | float32 | mixed_bfloat16 | mixed_float16
    c.teacher.min_accuracy = 0.0  # refuse to train below this top-1 on the evaluation split, 0 to 1
    c.teacher.top_k = 0  # soft: logits the student learns from, the remaining probability spread evenly; 0 = all
    c.teacher.logits_dtype = "float32"  # soft: float32 | float16, what the logits are rounded to, cached or not
    c.teacher.cache = "off"  # off | read (what lacks is computed) | write (all is computed) | readwrite
    c.teacher.cache_dir = ""  # where its answers are kept, for every run that reads the same stream
    c.teacher.allow_ties = False  # take answers made with another teacher.batch, precision or device, bitwise or not
    c.teacher.train = ConfigDict()  # kind=train: a whole config; main.py trains it first into <workdir>/teacher

    c.checkpoint = ConfigDict()
    c.checkpoint.every_updates = 50  # 0 = only at the end
    c.checkpoint.every_minutes = 0.0  # besides, whenever so much time has gone by since the last one; 0 = off
    c.checkpoint.keep = 3  # newest ones kept; the best on the evaluation split is kept besides
    c.checkpoint.keep_every = 0  # updates: checkpoints at multiples of it are kept for good; 0 = off
    c.checkpoint.max_failed = 0  # saves in a row that fail (full disk) before the run stops; 0 = it trains on

    c.eval = ConfigDict()
    c.eval.every_updates = 50  # 0 = only at the end
    c.eval.batch = 64  # images per pass
    c.eval.crop_ratio = 0.0  # 0 = plain resize (Keras example); else resize to S / crop_ratio, centre crop S

    c.log = ConfigDict()
    c.log.every_updates = 1
    return c
