"""Our detectors' scores beside those of OpenOOD's own code, on the same features and the same linear head.

    git clone https://github.com/Jingkang50/OpenOOD
    python benchmarks/openood_scores.py OpenOOD     # prints; some seconds

Features: scikit-learn's digits through a random layer with a ReLU; 0 to 5 are known. Theirs run on float64 features,
without a GPU and without the rest of OpenOOD. The largest difference is a share of our scores' standard deviation,
after ours were moved and scaled onto theirs; AUROC's is of known against unknown images.

tests/eval/detectors/test_pytorch_ood.py does the same with pytorch-ood.
"""

import argparse
import contextlib
import importlib
import io
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from gradmix.eval import detectors as ours

CLASSES, WIDTH = 6, 48


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("openood", type=Path, help="a checkout of OpenOOD")
    theirs = import_parts(parser.parse_args().openood)
    torch.set_default_dtype(torch.float64)
    train, labels, queries, unknown = digits()
    network = Network(train, labels)
    head = network.fc.weight.detach(), network.fc.bias.detach()
    loaders = dict.fromkeys(("train", "val"), Batches(train, labels))
    print(f"{len(train)} features of {WIDTH} dimensions, {len(queries)} to score\n")
    print(f"{'':<14}{'difference':>14}{'AUROC, %':>12}{'difference':>14}")
    for name, (detector, postprocessor, shaper) in pairs(theirs).items():
        given = {"head": head} if "head_" in detector.ARRAYS else {}
        score = np.asarray(detector.fit(train.numpy(), labels.numpy(), **given).score(queries.numpy()), np.float64)
        net = network if shaper is None else shaper(network)
        score = score**2 if name == "deep_knn" else score  # theirs is
        with torch.no_grad(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            postprocessor.setup(net, loaders, None)
            if hasattr(postprocessor, "precision"):  # made float32
                postprocessor.precision = postprocessor.precision.double()
            confidence = -np.asarray(postprocessor.postprocess(net, queries)[1], np.float64)
        slope, offset = np.polyfit(score, confidence, 1)
        apart = np.abs((confidence - offset) / slope - score).max() / score.std()
        auroc = [100 * roc_auc_score(unknown, one) for one in (score, confidence)]
        print(f"{name:<14}{apart:>14.1e}{auroc[0]:>12.2f}{auroc[0] - auroc[1]:>14.4f}")


def pairs(theirs: Callable) -> dict:
    """By name: ours, their postprocessor, and their network around it, where it has one."""

    def postprocessor(module: str, name: str, **arguments: object) -> object:
        values = SimpleNamespace(postprocessor_args=SimpleNamespace(**arguments), postprocessor_sweep=None)
        config = SimpleNamespace(postprocessor=values, dataset=SimpleNamespace(name="six"))
        return getattr(theirs(f"postprocessors.{module}_postprocessor"), name)(config)

    theirs("postprocessors.info").num_classes_dict["six"] = CLASSES
    return {
        "msp": (ours.MSP(), theirs("postprocessors.base_postprocessor").BasePostprocessor(None), None),
        "max_logit": (ours.MaxLogit(), postprocessor("maxlogit", "MaxLogitPostprocessor"), None),
        "energy": (ours.Energy(), postprocessor("ebo", "EBOPostprocessor", temperature=1), None),
        "gen": (ours.GEN(), postprocessor("gen", "GENPostprocessor", gamma=0.1, M=100), None),
        "react": (
            ours.ReAct(90.0),
            postprocessor("react", "ReactPostprocessor", percentile=90),
            theirs("networks.react_net").ReactNet,
        ),
        "ash": (
            ours.ASH(65.0),
            postprocessor("ash", "ASHPostprocessor", percentile=65),
            theirs("networks.ash_net").ASHNet,
        ),
        "scale": (
            ours.Scale(85.0),
            postprocessor("scale", "ScalePostprocessor", percentile=85),
            theirs("networks.scale_net").ScaleNet,
        ),
        "deep_knn": (ours.DeepKNN(5), postprocessor("knn", "KNNPostprocessor", K=5), None),
        "mahalanobis": (ours.Mahalanobis(), postprocessor("mds", "MDSPostprocessor"), None),
        "vim": (ours.ViM(20), postprocessor("vim", "VIMPostprocessor", dim=20), None),
        "nnguide": (ours.NNGuide(10), postprocessor("nnguide", "NNGuidePostprocessor", K=10, alpha=1.0), None),
        "fdbd": (ours.FDBD(), postprocessor("fdbd", "fDBDPostprocessor", distance_as_normalizer=True), None),
        "nci": (ours.NCI(0.001), postprocessor("nci", "NCIPostprocessor", alpha=0.001), None),
    }


def import_parts(checkout: Path) -> Callable[[str], types.ModuleType]:
    """Single modules of OpenOOD, by name: importing it as a whole takes all that any of its methods needs."""
    for name in ("openood", "openood.postprocessors", "openood.networks", "openood.utils"):
        package = types.ModuleType(name)
        package.__path__ = [str(checkout / name.replace(".", "/"))]
        sys.modules[name] = package
    sys.modules["openood.utils.comm"] = types.ModuleType("openood.utils.comm")
    sys.modules["openood.utils"].comm = sys.modules["openood.utils.comm"]
    Tensor.cuda = lambda self, *_, **__: self
    return lambda name: importlib.import_module(f"openood.{name}")


def digits() -> tuple[Tensor, Tensor, Tensor, np.ndarray]:
    """Training features and labels; features to score, and which of them are unknown."""
    images, labels = load_digits(return_X_y=True)
    weight = torch.randn(64, WIDTH, generator=torch.Generator().manual_seed(0)) / 8
    features = torch.relu(torch.from_numpy(images / 16) @ weight + 0.3).float().double()
    known = labels < CLASSES
    queries = torch.cat([features[known][1::2], features[~known]])
    unknown = np.arange(len(queries)) >= len(features[known][1::2])
    return features[known][::2], torch.from_numpy(labels[known][::2]), queries, unknown


class Network(nn.Module):
    """What OpenOOD asks of a network, for one that is given features: the head of the nearest class mean."""

    def __init__(self, train: Tensor, labels: Tensor) -> None:
        super().__init__()
        means = torch.stack([train[labels == label].mean(dim=0) for label in range(CLASSES)])
        self.fc = nn.Linear(WIDTH, CLASSES)
        self.fc.weight.data = 2 * means
        self.fc.bias.data = -(means**2).sum(dim=1)

    def forward(self, features: Tensor, return_feature: bool = False, *_: object) -> Tensor | tuple[Tensor, Tensor]:
        features = features.double().clone()  # they make float32 of it, and prune in place
        return (self.fc(features), features) if return_feature else self.fc(features)

    def get_fc(self) -> tuple[np.ndarray, np.ndarray]:
        return self.fc.weight.detach().numpy(), self.fc.bias.detach().numpy()

    def get_fc_layer(self) -> nn.Linear:
        return self.fc


class Batches:
    """All at once, as OpenOOD's loaders give it."""

    def __init__(self, features: Tensor, labels: Tensor) -> None:
        self.batch, self.dataset, self.batch_size = {"data": features, "label": labels}, features, len(features)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        yield self.batch

    def __len__(self) -> int:
        return 1


if __name__ == "__main__":
    main()
