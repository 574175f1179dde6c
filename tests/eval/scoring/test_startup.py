"""Scoring, loading and detectors don't wait for what they don't need."""

import subprocess
import sys

import numpy as np
from PIL import Image

HEAVY = ("pytorch_lightning", "lightning_fabric", "torchmetrics", "kornia", "matplotlib", "sklearn", "scipy", "lightly")
COMMAND = "from gradmix.eval.commands.score import main; main()"
PYTHON = "import sys, gradmix; print(gradmix.score(*(word.split('=')[1] for word in sys.argv[1:3])))"
LOAD = "import sys, gradmix; gradmix.load(sys.argv[1].split('=')[1])"
DETECTORS = """
import numpy as np
from gradmix.eval.detectors import DETECTORS
features = np.random.default_rng(0).normal(size=(60, 4))
for name, kind in DETECTORS.items():
    if name != "gaussian_mixture":  # scikit-learn fits it
        kind().fit(features, np.arange(60) % 3).calibrate(features).score(features)
"""


STEPS = {"detectors": DETECTORS, "load": LOAD, "python": PYTHON, "command": COMMAND}  # one process does all


def test_only_what_is_needed_is_imported(digits_run, tmp_path):
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "one.png")
    then = "\nimport sys; print('IMPORTED by {}', [name for name in {!r} if name in sys.modules])\n"
    code = "".join(step + then.format(name, HEAVY) for name, step in STEPS.items())
    words = [f"detector={digits_run / 'detector'}", f"images={tmp_path / 'one.png'}"]
    result = subprocess.run([sys.executable, "-c", code, *words], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    told = [line for line in result.stdout.splitlines() if line.startswith("IMPORTED")]
    assert told == [f"IMPORTED by {name} []" for name in STEPS]
