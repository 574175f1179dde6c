"""What gradmix-score does: score image files with a saved detector."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from gradmix.eval.config import ScoreConfig
from gradmix.eval.counted import counted
from gradmix.eval.detectors.calibration import DRIFT, FEWEST, Calibration, discoveries, drift
from gradmix.eval.features.embeddings import Embeddings
from gradmix.eval.features.formats import read_embeddings
from gradmix.eval.scoring.score_file import add_discoveries, check_replaceable, encode, read_scores, write_scores
from gradmix.eval.scoring.scorer import Picture, Score, Scorer, find_images
from gradmix.eval.scoring.sheets import write_sheets
from gradmix.ssl.machine import pick_device
from gradmix.ssl.runs.files import write_atomically
from gradmix.ssl.runs.outputs import check_output, check_writable


def run_score(config: ScoreConfig) -> None:
    """Score image files into a file, and print what there is to say of them as a whole.

    Raises:
        ValueError: bad input, in one line; or some of the images can't be read, and the others are scored.
    """
    if (config.images is None) == (config.features is None):
        why = "missing" if config.images is None else "given beside features="
        raise ValueError(f"images: {why}; give images=PATH, or features=FILE for features of images")
    given = None if config.features is None else read_embeddings(Path(config.features).expanduser())
    paths = names_of(given) if config.images is None else find_images(config.images)
    files = [] if config.features is None else [str(Path(config.features).expanduser())]
    out = Path(config.out).expanduser()
    check_outputs(config, [*paths, *files])
    scorer = scorer_of(config)
    detector = scorer.detector
    if config.explain is not None and given is not None:
        raise ValueError("explain: needs images, features=FILE has none")
    features = None if given is None else given.projections if scorer.space == "projections" else given.features
    if given is not None and features is None:
        raise ValueError(f"features: {config.features} has no projections, which the detector looks at")
    counts = write_scores(scorer, paths, out, config.batch_size, progress=True, features=features, files=files)
    rows, unknown, unreadable = counts
    print(f"{out}: {counted(rows, 'image')}, {unknown} unknown, {unreadable} unreadable")
    if detector.threshold is None:
        print("no threshold was calibrated (data.holdout=0), so nothing is called unknown")
    elif detector.calibration_ is not None and rows > unreadable:
        summarise(detector.calibration_, out, config.false_discovery)
    if config.explain is not None:
        shown, sheets = write_sheets(scorer, paths, Path(config.explain).expanduser(), config.explain_limit)
        pictures = f"{counted(sheets, 'sheet')} with {counted(shown, 'image')}"
        print(f"{config.explain}: {pictures} beside the nearest training images")
    if unreadable:
        raise ValueError(f"images: {unreadable} of {rows} files can't be read; the error column of {out} says why")


def check_outputs(config: ScoreConfig, files: Sequence[str], write: bool = True) -> None:
    """
    Args:
        files: that are read.
        write: whether ``config.out`` is written.

    Raises:
        ValueError: what would be written is something that is read, or something else's.
    """
    images = Path(config.images or config.features or "").expanduser()
    folders = [Path(config.detector).expanduser(), *([images] if images.is_dir() else [])]
    out = Path(config.out).expanduser()
    if write:
        check_output("out", out, files, folders)
        check_replaceable(out)
        if out.suffix not in (".csv", ".jsonl") and not out.is_dir():
            raise ValueError(f"out: {out}: expected a name that ends in .csv, .jsonl")
    if config.explain is not None:  # written last
        check_output("explain", Path(config.explain).expanduser(), files, folders)
        check_writable("explain", Path(config.explain).expanduser())


def scorer_of(config: ScoreConfig) -> Scorer:
    """The detector, on the device and with the threshold that are asked for.

    Raises:
        ValueError: no detector, no such device, or it lacks what is asked for.
    """
    scorer = Scorer(config.detector, pick_device(config.device))
    if config.accept is not None or config.per_class is not None:
        scorer.detector.accept(config.accept, config.per_class)
    if config.false_discovery is not None and scorer.detector.calibration_ is None:
        raise ValueError(
            "false_discovery: the detector keeps no scores of held-out images; gradmix-eval run=... saves it anew"
        )
    if config.explain is not None:
        scorer.check_neighbours()
    return scorer


def names_of(given: Embeddings | None) -> list[str]:
    """What to call the images whose features are given."""
    assert given is not None
    return [f"row {row}" for row in range(len(given))] if given.paths is None else list(given.paths)


def scored(
    config: ScoreConfig, images: Sequence[Picture] | None, write: bool
) -> tuple[list[Score], float | None, float | None]:
    """For :func:`gradmix.score`: every image's score, the threshold, and the p-value up to which one is a discovery.

    Args:
        images: instead of those that ``config.images`` names.
        write: whether to write ``config.out``.
    """
    if images is None:
        if config.images is None or config.features is not None:
            raise ValueError(
                "features: gradmix-score features=FILE scores them; here detectors.load(folder).judge does"
            )
        images = find_images(config.images)
    check_outputs(config, [str(image) for image in images if isinstance(image, str | Path)], write)
    scorer = scorer_of(config)
    rows = list(scorer.score(images, config.batch_size, progress=True))
    if write:
        out = Path(config.out).expanduser()
        text = encode(list(map(asdict, rows)), out.suffix == ".jsonl", header=True)
        write_atomically(out, lambda path: path.write_bytes(text))
    limit = None
    if config.false_discovery is not None:
        p_values = np.array([row.p_value for row in rows if row.p_value is not None])
        limit = discoveries(p_values, config.false_discovery)
        if write:
            add_discoveries(out, limit)
    if config.explain is not None:
        write_sheets(scorer, images, Path(config.explain).expanduser(), config.explain_limit)
    return rows, scorer.detector.threshold, limit


def summarise(calibration: Calibration, out: Path, false_discovery: float | None) -> None:
    """Print what the scores say of these images as a whole."""
    scores, p_values = read_scores(out)
    if calibration.per_class:
        print(f"classes with a threshold of their own: {calibration.own_thresholds} of {calibration.classes}")
    if not calibration.enough:
        held_out = len(calibration.scores)
        print(f"too few held-out images, {held_out}, to promise that {calibration.accept:g} are accepted")
    if len(scores) >= FEWEST:
        distance, chance = drift(calibration.scores, scores)
        alike = "not like" if chance < DRIFT else "like"
        measured = f"Kolmogorov-Smirnov distance {distance:.2f}, p = {chance:.2g}"
        print(f"drift: as a whole these images score {alike} the held-out known ones ({measured})")
    if false_discovery is not None:
        limit = discoveries(p_values, false_discovery)
        add_discoveries(out, limit)
        share = f"on average at most {100 * false_discovery:g} % of them are known"
        found = int((p_values <= limit).sum())
        with_limit = f"{counted(found, 'image')} with a p_value of at most {limit:.2g}; {share}"
        print(f"discoveries: {with_limit if found else 'none'}")
