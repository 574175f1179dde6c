"""Ten thousand steps take no more memory than a thousand; ten thousand losses of every kind are finite."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from gradmix.ssl.losses import NTXentLoss, SupConLoss
from tests.stress.running import CONTEXT

STEPS = 10_000
EVALUATIONS = 10_000


def train_and_measure(folder: Path, steps: int) -> None:
    """Random images; writes resident bytes after a tenth of the steps and after all."""
    from pytorch_lightning import Callback

    from gradmix.ssl.config import (
        AugmentConfig,
        Config,
        DataConfig,
        EncoderConfig,
        MethodConfig,
        MixConfig,
        OptimizerConfig,
    )
    from gradmix.ssl.data.images import ImageSet
    from gradmix.ssl.data.open_set import OpenSetData
    from gradmix.ssl.train import train

    torch.set_num_threads(1)

    class Measure(Callback):
        def on_train_batch_end(self, trainer, module, *rest):
            if module.steps in (steps // 10, steps):
                pages = int(Path("/proc/self/statm").read_text().split()[1])
                with open(folder / "resident", "a") as file:
                    print(pages * 4096, file=file)

    images = torch.randint(0, 256, (160, 3, 8, 8), dtype=torch.uint8)
    whole = ImageSet(torch.arange(160) % 4, 8, images)
    none = whole.select(torch.tensor([], dtype=torch.long))
    config = Config(
        run_dir=str(folder / "run"),
        epochs=steps // 10,
        batch_size=16,
        data=DataConfig("digits", image_size=8, augment=AugmentConfig(jitter=0, greyscale=0)),
        method=MethodConfig("joint", 1.0, 1.0),
        mix=MixConfig("gradmix", probability=0.25),
        encoder=EncoderConfig("resnet18", width=4),
        optimizer=OptimizerConfig("adam", base_lr=1e-4),
        checkpoint_seconds=5,
        trainer={"accelerator": "cpu"},
    )
    sys.stderr = open(folder / "log", "w")
    train(config, OpenSetData(whole, none, none, list("abcd"), [], [0, 1, 2, 3]), [Measure()])


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="resident memory is read from /proc")
def test_memory_does_not_grow(cases, tell, tmp_path):
    steps = max(200, cases(STEPS) // 100 * 100)
    process = CONTEXT.Process(target=train_and_measure, args=(tmp_path, steps))
    process.start()
    process.join()
    assert process.exitcode == 0, (tmp_path / "log").read_text()[-2000:]
    early, late = map(int, (tmp_path / "resident").read_text().split())
    tell(f"{steps} steps: {early / 2**20:.1f} MiB after a tenth, {late / 2**20:.1f} MiB at the end")
    assert late < 1.02 * early


@pytest.mark.parametrize("temperature", [0.05, 0.07, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
def test_losses_and_gradients_are_finite(dtype, temperature, cases, tell):
    """Of what a network can put out, normalised as in training: duplicates, zeros, and values near the type's end."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    rng = np.random.default_rng(0)
    ntxent, supcon = NTXentLoss(temperature), SupConLoss(temperature)
    largest = torch.finfo(dtype).max
    low, high = np.inf, -np.inf
    for _ in range(cases(EVALUATIONS)):
        pairs, width = int(rng.integers(1, 9)), int(rng.integers(1, 33))
        rows = torch.randn(2 * pairs, width, generator=generator)
        kind = rng.integers(6, size=2 * pairs)
        rows[kind == 1] = rows[0].clone()  # duplicates
        rows[kind == 2] = -rows[0]
        rows[kind == 3] = 0
        rows[kind == 4] = rows[kind == 4].sign() * largest
        rows[kind == 5] *= 10 ** rng.uniform(-30, 4)
        rows = rows.clamp(-largest, largest).to(dtype)
        z = F.normalize(rows.float(), dim=1).requires_grad_()
        kept = torch.rand(2 * pairs, generator=generator)
        labels = torch.randint(0, 3, (2 * pairs,), generator=generator)
        p = z.roll(1, 0)
        values = [ntxent(z), ntxent(z, p, kept), supcon(z, labels), supcon(z, labels, p, kept)]
        (gradient,) = torch.autograd.grad(sum(values), z)
        assert all(value.isfinite() for value in values), (rows, values)
        assert gradient.isfinite().all(), (rows, gradient)
        low, high = min(low, *(v.item() for v in values)), max(high, *(v.item() for v in values))
    tell(f"{4 * cases(EVALUATIONS)} losses from {low:.3g} to {high:.3g}, all finite, gradients too")
