"""What gradmix-score does: score image files with a saved detector."""

from pathlib import Path

from gradmix.eval.config import ScoreConfig
from gradmix.eval.scoring.score_file import write_scores
from gradmix.eval.scoring.scorer import Scorer, find_images
from gradmix.eval.scoring.sheets import write_sheets


def run_score(config: ScoreConfig) -> None:
    paths = find_images(config.images)
    scorer = Scorer(config.detector)
    out = Path(config.out).expanduser()
    rows, unknown, unreadable = write_scores(scorer, paths, out, config.batch_size, progress=True)
    print(f"{out}: {rows} images, {unknown} unknown, {unreadable} unreadable")
    if scorer.detector.threshold is None:
        print("no threshold was calibrated (data.holdout=0), so nothing is called unknown")
    if config.explain is not None:
        shown, sheets = write_sheets(scorer, paths, Path(config.explain).expanduser(), config.explain_limit)
        print(f"{config.explain}: {sheets} sheets with {shown} images and their nearest training images")
    if unreadable:
        raise ValueError(f"images: {unreadable} of {rows} files can't be read; the error column of {out} says why")
