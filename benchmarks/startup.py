"""What scoring one image costs beside what nobody can save: importing torch and torchvision, and the network itself.

    python benchmarks/startup.py [DETECTOR]

Processor time of whole processes, the smallest of several that take turns. Without a detector's folder a small one is
trained first. Exit code 1 where the ratio is above LIMIT.
"""

import csv
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

LIMIT = 1.3
REPEATS = 5
IMPORTS = "import torch, torchvision"
SCORE = "from gradmix.eval.commands.score import main; main()"
# What is left of scoring when everything is imported.
NETWORK = """
import contextlib, io, time
from gradmix.eval.commands.work.score import run_score
from gradmix.eval.commands import command_line, score
from gradmix.eval.config import ScoreConfig
import sys
config = ScoreConfig(**dict(word.split("=", 1) for word in sys.argv[1:]))
begin = time.process_time()
with contextlib.redirect_stdout(io.StringIO()):
    run_score(config)
print(time.process_time() - begin)
"""


def seconds(code: str, *arguments: str) -> tuple[float, str]:
    """Processor time of a Python process, and what it printed."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    out = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True, env=environment
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, out.stdout


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        detector = sys.argv[1] if len(sys.argv) > 1 else f"{folder}/run/detector"
        if len(sys.argv) == 1:
            train = "from gradmix.eval.commands.pretrain import main; main()"
            seconds(train, "epochs=1", "trainer.accelerator=cpu", "detectors=[deep_knn]", f"run_dir={folder}/run")
        Image.new("RGB", (500, 375), "orange").save(f"{folder}/one.jpg")
        words = (f"detector={detector}", f"images={folder}/one.jpg", f"out={folder}/scores.csv")
        times: dict[str, list[float]] = {"imports": [], "network": [], "score": []}
        for _ in range(REPEATS):
            times["imports"].append(seconds(IMPORTS)[0])
            times["network"].append(float(seconds(NETWORK, *words)[1]))
            Path(f"{folder}/scores.csv").unlink()
            times["score"].append(seconds(SCORE, *words)[0])
            with open(f"{folder}/scores.csv") as file:
                assert len(list(csv.DictReader(file))) == 1
    best = {name: min(values) for name, values in times.items()}
    ratio = best["score"] / (best["imports"] + best["network"])
    print(f"import torch, torchvision {best['imports']:.2f} s, the network's own time {best['network']:.2f} s")
    print(f"gradmix-score on one image {best['score']:.2f} s: {ratio:.2f} times as long (limit {LIMIT})")
    sys.exit(ratio > LIMIT)


if __name__ == "__main__":
    main()
