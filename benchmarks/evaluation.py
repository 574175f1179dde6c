"""What a linear probe costs: 20 settings over one, and the cached protocol over a loop that runs the backbone.

    python benchmarks/evaluation.py            # prints; --save writes results/evaluation.json; about two minutes

scikit-learn's 1,797 digits at 32 x 32 through an untrained ResNet-18 with the ImageNet stem (512 features; the smallest
backbone that people probe, so that the loop is as cheap as it gets). All probes see the same images:

- ``one``: the cached probe with one setting: trained on a part to say its held-out accuracy, then on everything.
- ``twenty``: the same with the default 20 settings, of which the held-out part chooses one.
- ``extraction``: the features, once.
- ``loop``: a linear classifier whose backbone runs on augmented images every epoch, one setting, as lightly, solo-learn
  and SupContrast do. Measured over a few epochs and multiplied to 90, for all epochs cost the same.

Times are paired: every repeat runs all of them once; the median is printed. The last claim compares the accuracy with
scikit-learn's LogisticRegression on the same features at the strength that the probe chose.
"""

import argparse
import statistics

import numpy as np
import torch
from machine import device_here, hardware, in_turns, save
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from gradmix.eval.classifiers.finetune import ImageProbe
from gradmix.eval.classifiers.linear import LinearProbe
from gradmix.eval.config import ProbeConfig
from gradmix.eval.features.extraction import extract
from gradmix.ssl.config import AugmentConfig
from gradmix.ssl.data.images import ImageSet, from_array
from gradmix.ssl.networks.backbones import Backbone, ResNet

EPOCHS, MEASURED_EPOCHS = 90, 2


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--save", action="store_true")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    device = device_here()
    torch.manual_seed(0)
    digits = load_digits()
    pixels = from_array((digits.images * (255 / 16)).round().astype(np.uint8), 32)
    train = torch.from_numpy(np.random.default_rng(0).random(len(pixels)) < 2 / 3)
    labels = torch.from_numpy(digits.target).long()
    images, test = (ImageSet(labels[part], 32, pixels[part]) for part in (train, ~train))
    backbone = Backbone(ResNet("resnet18"), 32).to(device)
    features, test_features = (extract(backbone, part, device) for part in (images, test))

    twenty = LinearProbe(device=device)
    settings = ProbeConfig(epochs=MEASURED_EPOCHS)
    steps = {
        "one": lambda: LinearProbe(lr=1, weight_decay=1e-3, device=device).fit(features, images.labels),
        "twenty": lambda: twenty.fit(features, images.labels),
        "extraction": lambda: extract(backbone, images, device),
        "loop": lambda: ImageProbe("augmented", settings, AugmentConfig()).fit(backbone, images, 10),
    }
    seconds = in_turns(steps, arguments.repeats, device)
    seconds["loop"] = [value * EPOCHS / MEASURED_EPOCHS for value in seconds["loop"]]
    median = {name: round(statistics.median(values), 3) for name, values in seconds.items()}

    def ratio(numerator: list[str], denominator: list[str]) -> float:
        """Median over repeats of a ratio of sums of steps."""
        rows = zip(*(seconds[name] for name in seconds), strict=True)
        rows = [dict(zip(seconds, row, strict=True)) for row in rows]
        return round(statistics.median(sum(r[n] for n in numerator) / sum(r[d] for d in denominator) for r in rows), 3)

    claims = {
        "20 settings over one, heads alone": (ratio(["twenty"], ["one"]), 2.0),
        "20 settings over one, with extraction": (ratio(["twenty", "extraction"], ["one", "extraction"]), 2.0),
        "20 settings cached over one in the loop": (ratio(["twenty", "extraction"], ["loop"]), 1.0),
    }
    scaler = StandardScaler().fit(features)
    theirs = LogisticRegression(C=1 / (twenty.weight_decay_ * len(features)), max_iter=2000)
    theirs.fit(scaler.transform(features), images.labels)
    accuracy = {
        "cached probe": float((twenty.predict(test_features) == test.labels).double().mean()),
        "scikit-learn": float(theirs.score(scaler.transform(test_features), test.labels)),
    }
    result = {"hardware": hardware(device, "scikit-learn"), "repeats": arguments.repeats, "images": len(images)}
    print(" ".join(f"{key}={value}" for key, value in result["hardware"].items()))
    for name, value in median.items():
        print(f"  {name:<12}{value:>10.2f} s" + (f"  ({EPOCHS} epochs)" if name == "loop" else ""))
    for name, (value, most) in claims.items():
        print(f"  {name:<42}{value:>8.3f}  {'holds' if value <= most else 'MISSED'}: at most {most}")
    print(f"  accuracy, %: {', '.join(f'{name} {100 * value:.2f}' for name, value in accuracy.items())} ({twenty})")
    result |= {"seconds": median, "accuracy": accuracy}
    result["claims"] = [
        {"what": name, "ratio": value, "at_most": most, "holds": value <= most}
        for name, (value, most) in claims.items()
    ]
    if arguments.save:
        save("evaluation", result)


if __name__ == "__main__":
    main()
