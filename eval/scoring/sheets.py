"""Why an image got its score, as pictures: each image beside its nearest training images."""

import os
import sys
import unicodedata
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.transforms.functional import to_pil_image

from gradmix.eval.scoring.scorer import UNKNOWN_NAME, Picture, Score, Scorer
from gradmix.ssl.runs.files import write_atomically

SIDE, GAP, CAPTION, MARGIN = 112, 10, 34, 14  # pixels: a picture, the space around it, its two lines of text
PER_PAGE = 8
NEAREST = 5  # training images beside each


def write_sheets(scorer: Scorer, images: Sequence[Picture], folder: Path, limit: int) -> tuple[int, int]:
    """Write ``sheet-001.png``, ... with one row per image: the image, then the ``NEAREST`` training images to it.
    Sheets of an earlier, longer scoring are removed. Where no training image is found, a line says so.

    Args:
        images: files that can't be read are left out.
        limit: at most so many images, the first ones.

    Returns:
        Numbers of images and of sheets.
    """
    k = min(NEAREST, len(scorer.check_neighbours().bank_))
    rows: list[list[Image.Image]] = []
    lost: list[str] = []
    shown = sheets = 0
    for image, score in zip(images, scorer.score(images, batch_size=PER_PAGE), strict=True):
        if not score.error:
            rows.append(_row(scorer, scorer.backbone.transform(image), score, k, lost))
            shown += 1
        if len(rows) == PER_PAGE or shown == limit:
            sheets += 1
            _write(folder, sheets, rows)
            rows = []
        if shown == limit:
            break
    if rows:
        sheets += 1
        _write(folder, sheets, rows)
    if shown and len(lost) == k * shown:
        print(f"explain: none of the training images were found (looked for {lost[0]})", file=sys.stderr)
    for old in folder.glob("sheet-*.png"):
        number = old.stem.removeprefix("sheet-")
        if number.isdecimal() and int(number) > sheets:
            old.unlink()
    return shown, sheets


def _write(folder: Path, number: int, rows: list[list[Image.Image]]) -> None:
    page = _page(rows)
    write_atomically(folder / f"sheet-{number:03d}.png", lambda temporary: page.save(temporary, "PNG"))


def _row(scorer: Scorer, image: Tensor, score: Score, k: int, lost: list[str]) -> list[Image.Image]:
    """The tiles of an image; names of training images that are not found are added to ``lost``."""
    distances, rows = scorer.neighbours(image[None], k)
    colour = (190, 30, 30) if score.prediction == UNKNOWN_NAME else (30, 120, 60)
    tiles = [_tile(image, os.path.basename(score.path), f"{score.prediction}, {score.score:.3f}".lstrip(", "), colour)]
    for distance, row in zip(distances[0].tolist(), rows[0].tolist(), strict=True):
        try:
            picture = scorer.training_image(row)
        except ValueError:
            picture = None  # the training images moved; their names still say something
            lost.append(scorer.training_name(row))
        name = os.path.basename(scorer.training_name(row)) if scorer.train_files else f"image {row}"
        tiles.append(_tile(picture, name, f"{scorer.training_class(row)}, {distance:.3f}".lstrip(", "), (90, 90, 90)))
    return tiles


def _tile(image: Tensor | None, name: str, value: str, colour: tuple[int, int, int]) -> Image.Image:
    tile = Image.new("RGB", (SIDE, SIDE + CAPTION), "white")
    draw, font = ImageDraw.Draw(tile), _font(10)
    if image is None:
        draw.rectangle((0, 0, SIDE - 1, SIDE - 1), outline=(200, 200, 200))
        draw.text((8, SIDE // 2 - 8), "not found", fill=(150, 150, 150), font=font)
    else:
        smooth = Image.Resampling.NEAREST if image.shape[-1] < SIDE else Image.Resampling.LANCZOS
        tile.paste(to_pil_image(image).resize((SIDE, SIDE), smooth))
    draw.text((0, SIDE + 2), _short(name, font), fill=(90, 90, 90), font=font)
    draw.text((0, SIDE + 17), _short(value, font), fill=colour, font=font)
    return tile


def _font(size: int) -> ImageFont.FreeTypeFont:
    """matplotlib's, which has far more letters than Pillow's own: that one has no umlauts."""
    import matplotlib  # only here: scoring without sheets need not wait for it

    return ImageFont.truetype(os.path.join(matplotlib.get_data_path(), "fonts/ttf/DejaVuSans.ttf"), size)


def _short(text: str, font: ImageFont.FreeTypeFont) -> str:
    """As much of a name as a tile is wide, without its middle."""
    text = unicodedata.normalize("NFC", text).replace("\n", " ")  # Macs write ä as two characters
    kept, short = len(text), text
    while font.getlength(short) > SIDE:
        kept -= 1
        short = f"{text[: kept // 2]}…{text[len(text) - (kept + 1) // 2 :]}"
    return short


def _page(rows: list[list[Image.Image]]) -> Image.Image:
    columns = len(rows[0])
    step = SIDE + GAP
    width = 2 * MARGIN + columns * step + GAP  # a wider gap after the scored image
    page = Image.new("RGB", (width, 2 * MARGIN + 18 + len(rows) * (step + CAPTION)), "white")
    draw, font = ImageDraw.Draw(page), _font(11)
    draw.text((MARGIN, MARGIN), "image, class, score", fill="black", font=font)
    draw.text((MARGIN + step + GAP, MARGIN), "nearest training images, class, distance", fill="black", font=font)
    for i, row in enumerate(rows):
        for j, tile in enumerate(row):
            page.paste(tile, (MARGIN + j * step + (GAP if j else 0), MARGIN + 18 + i * (step + CAPTION)))
    return page
