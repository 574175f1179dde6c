"""What gradmix-score does: score image files with a saved detector."""

from pathlib import Path

from gradmix.eval.config import ScoreConfig
from gradmix.eval.scoring.score_file import check_replaceable, write_scores
from gradmix.eval.scoring.scorer import Scorer, find_images
from gradmix.eval.scoring.sheets import write_sheets
from gradmix.ssl.runs.outputs import check_output


def run_score(config: ScoreConfig) -> None:
    paths = find_images(config.images)
    out, detector, images = (Path(name).expanduser() for name in (config.out, config.detector, config.images))
    outputs = {"out": out} | ({} if config.explain is None else {"explain": Path(config.explain).expanduser()})
    for key, path in outputs.items():
        check_output(key, path, paths, [detector, *([images] if images.is_dir() else [])])
    check_replaceable(out)
    scorer = Scorer(config.detector)
    rows, unknown, unreadable = write_scores(scorer, paths, out, config.batch_size, progress=True)
    print(f"{out}: {rows} images, {unknown} unknown, {unreadable} unreadable")
    if scorer.detector.threshold is None:
        print("no threshold was calibrated (data.holdout=0), so nothing is called unknown")
    if config.explain is not None:
        shown, sheets = write_sheets(scorer, paths, Path(config.explain).expanduser(), config.explain_limit)
        print(f"{config.explain}: {sheets} sheets with {shown} images and their nearest training images")
    if unreadable:
        raise ValueError(f"images: {unreadable} of {rows} files can't be read; the error column of {out} says why")
