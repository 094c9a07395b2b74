"""timm's distilled DeiT in eager PyTorch on this machine: training updates, or evaluation, one JSON line.

python tools/benchmarks/timm_update.py train|eval [--model=NAME] [--precision=fp32|bf16] [--batch=16] [--steps=8]

Hard labels of the teacher are given, AdamW is PyTorch's fused one, there is no EMA and no guard. Sizes, precision and
drop-path come from our configuration, so that both sides compute the same.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tools import peer_packages
from tools.benchmarks import resident

CLASSES, SMOOTHING = 5, 0.1


def main() -> None:
    """Measure what the command line asks for and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["train", "eval"])
    parser.add_argument("--model", default="deit_tiny_distilled_patch16_224")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--drop_path", type=float, default=0.1)
    parser.add_argument("--steps", type=int, default=8)
    wanted = parser.parse_args()
    torch, timm = peer_packages.torch_and_timm()
    torch.manual_seed(0)
    model = timm.create_model(wanted.model, num_classes=CLASSES, drop_path_rate=wanted.drop_path, img_size=wanted.size)
    images = torch.rand(wanted.batch, 3, wanted.size, wanted.size)
    half = torch.autocast("cpu", dtype=torch.bfloat16, enabled=wanted.precision == "bf16")
    step = (_training if wanted.what == "train" else _evaluation)(torch, model, images, half)
    seconds = []
    for _ in range(wanted.steps + 3):
        started = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - started)
    found = {
        "images_per_sec": wanted.batch / statistics.median(seconds[3:]),
        "peak_mb": resident.peak(),
        "torch": torch.__version__,
        "timm": timm.__version__,
    }
    print(json.dumps(found))


def _training(torch, model, images, half):
    model.set_distilled_training(True)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.05, fused=True)
    truth, told = (torch.randint(0, CLASSES, (len(images),)) for _ in range(2))
    entropy = torch.nn.functional.cross_entropy

    def step():
        optimizer.zero_grad(set_to_none=True)
        with half:
            of_class, of_teacher = model(images)
        loss = entropy(of_class.float(), truth, label_smoothing=SMOOTHING) + entropy(of_teacher.float(), told)
        (loss / 2).backward()
        optimizer.step()

    return step


def _evaluation(torch, model, images, half):
    model.eval()

    def step():
        with torch.inference_mode(), half:
            model(images)

    return step


if __name__ == "__main__":
    main()
