"""A detector as one ONNX file, run by ONNX Runtime: the scores and decisions of gradmix-score."""

import json
import shutil

import numpy as np
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file

from gradmix.eval.classifiers import linear
from gradmix.eval.detectors import DETECTORS
from gradmix.eval.runs import portable
from gradmix.eval.runs.export import write_onnx
from gradmix.eval.scoring.scorer import Scorer, save_scorer
from gradmix.ssl.config import DataConfig
from gradmix.ssl.data.open_set import load_data

pytestmark = pytest.mark.skipif(torch.__version__ < "2.11", reason="torch before 2.11 writes no ONNX of these")
SPACES = [("features", name) for name in portable.SCORES] + [("projections", "class_knn"), ("projections", "vim")]


@pytest.fixture(scope="module")
def images():
    """A thousand digits, known and unknown."""
    data = load_data(DataConfig(name="digits", image_size=16, split=0), 0)
    return torch.cat([data.test.images, data.train.images])[:1000], data


def run(path, images):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    parts = [session.run(None, {"images": (part.float() / 255).numpy()}) for part in images.split(300)]
    return [np.concatenate(part) for part in zip(*parts, strict=True)], session


def compare(score, position, unknown, verdict):
    """The largest difference of the scores, relative to how far they lie apart; decisions must agree."""
    spread = verdict.score.std()
    clear = np.abs(verdict.score - verdict.threshold) > 1e-4 * spread  # else the last digits decide
    np.testing.assert_array_equal(unknown[clear], (verdict.score > verdict.threshold)[clear])
    assert (~clear).sum() < 5 and 0 < unknown.sum() < len(unknown)
    if verdict.closest is None:
        assert (position == -1).all()
    else:
        assert (position != verdict.closest).mean() < 0.002  # a vote can be near a tie
    return np.abs(score - verdict.score).max() / spread


class Several(torch.nn.Module):
    """Detectors on the features and the projections of one network: one file, as writing one takes long."""

    def __init__(self, portables):
        super().__init__()
        self.portables = torch.nn.ModuleList(portables)
        self.backbone = portables[0].backbone
        self.head = next(one.head for one in portables if one.head is not None)

    def forward(self, images):
        features = self.backbone(images)
        projections = torch.nn.functional.normalize(self.head(features), dim=1)
        seen = (features if one.head is None else projections for one in self.portables)
        return tuple(part for one, look in zip(self.portables, seen, strict=True) for part in one.judge(look))


def test_every_detector_has_the_same_scores_and_decisions(digits_run, images, tmp_path, monkeypatch):
    monkeypatch.setattr(linear, "LEAST_STEPS", 200)
    images, data = images
    sets = {name: load_file(digits_run / f"features/{name}.safetensors") for name in ("train", "held_out")}
    scorers = []
    for space, name in SPACES:
        labels = None if (space, name) == ("projections", "vim") else sets["train"]["labels"]
        detector = DETECTORS[name]().fit(sets["train"][space], labels).calibrate(sets["held_out"][space], 0.9)
        folder = tmp_path / f"{name}-{space}"
        save_scorer(folder, detector, digits_run, data, space)
        scorers.append(Scorer(folder))
    portables = [portable.Portable(scorer) for scorer in scorers]
    names = [f"{place}-{what}" for place in range(len(portables)) for what in ("score", "class", "unknown")]
    write_onnx(Several(portables).eval(), scorers[0].backbone.image_size, names, tmp_path / "all.onnx")
    found, _ = run(tmp_path / "all.onnx", images)
    looks = {scorer.space: scorer.look(images) for scorer in scorers}
    for place, scorer in enumerate(scorers):
        answers = found[3 * place : 3 * place + 3]
        assert compare(*answers, scorer.detector.judge(looks[scorer.space])) < 1e-3, scorer.detector.NAME


def test_the_command(digits_run, images, command, tmp_path, monkeypatch):
    shutil.copytree(digits_run / "detector", tmp_path / "detector")
    result = command("detector", "export", "detector", "out=scorer.onnx", "per_class=true", "accept=0.7")
    assert result.code == 0 and "scorer.onnx: written" in result.out, result.err
    scorer = Scorer(tmp_path / "detector")
    scorer.detector.accept(0.7, True)
    assert scorer.detector.calibration_.own_thresholds > 2
    found, session = run(tmp_path / "scorer.onnx", images[0])
    assert compare(*found, scorer.detector.judge(scorer.look(images[0]))) < 1e-3
    said = session.get_modelmeta().custom_metadata_map
    assert json.loads(said["classes"]) == scorer.classes and json.loads(said["image_size"]) == 16
    assert [path.name for path in tmp_path.glob("*.onnx*")] == ["scorer.onnx"]  # all is inside
    monkeypatch.setattr(portable, "MOST_ROWS", 100)
    for arguments, said in (
        (("export", "detector", "out=x.onnx"), "646 training features are too many for an ONNX file, at most 100"),
        (("export", "detector"), "out: missing"),
        (("export", "detector", "out=detector/x.onnx"), "lies in detector, which is read"),
        (("export", "detector", "out=x.onnx", "class=a"), "class: gradmix-detector export takes none"),
    ):
        result = command("detector", *arguments)
        assert result.code == 2 and said in result.err and len(result.err.splitlines()) == 1, result.err
