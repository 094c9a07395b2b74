"""timm's own loader of a recipe, answering one line a batch: the peer that the Pillow loaders stand in for.

Run by an interpreter that has timm, torch and torchvision (peer.py starts it); imports nothing of this project.
`python timm_loader.py SETTINGS IMAGES.npz` (SETTINGS is JSON): for each line on standard input one batch is made and a
line printed. The settings' `style`: `timm` is timm.data.create_loader as it comes (uint8 batches, normalised and erased
by its prefetcher in this process); `deit` is what facebookresearch/deit's main.py builds from timm's parts (tensors
normalised and erased by the workers, batches mixed in this process).
"""

import io
import json
import sys

import numpy as np
import timm.data
import torch
from PIL import Image

_PASSES = 100  # passes over the images in one epoch, so that no worker pauses at the end of one


class Encoded(torch.utils.data.Dataset):
    """Encoded images held in memory; timm sets `transform`."""

    transform = target_transform = None

    def __init__(self, path: str):
        with np.load(path, allow_pickle=False) as stored:
            self._data, self._ends, self._labels = (stored[name] for name in ("encoded", "ends", "labels"))

    def classes(self) -> int:
        return int(self._labels.max()) + 1

    def __len__(self) -> int:
        return len(self._ends) * _PASSES

    def __getitem__(self, index: int):
        i = index % len(self._ends)
        data = self._data[self._ends[i - 1] if i else 0 : self._ends[i]]
        return self.transform(Image.open(io.BytesIO(data.tobytes())).convert("RGB")), int(self._labels[i])


def batches(settings: dict, path: str):
    """Yield the batches of the loader that the settings describe."""
    prefetcher = settings["style"] == "timm"
    dataset = Encoded(path)
    mixing = dict(settings["mixing"], num_classes=dataset.classes()) if settings["mixing"] else None
    loader = timm.data.create_loader(
        dataset,
        is_training=True,
        use_prefetcher=prefetcher,
        collate_fn=timm.data.FastCollateMixup(**mixing) if mixing and prefetcher else None,
        device=torch.device("cpu"),
        **settings["loader"],
    )
    mixup = timm.data.Mixup(**mixing) if mixing and not prefetcher else None
    while True:
        for images, labels in loader:
            yield mixup(images, labels) if mixup else (images, labels)


def main(settings: str, path: str) -> None:
    made = batches(json.loads(settings), path)
    for _ in sys.stdin:
        next(made)
        print("made", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
