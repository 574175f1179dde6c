"""docs/photographs.png: views cut from the middle square of a photograph beside views cut from the photograph.

python benchmarks/views_picture.py PHOTOGRAPHS.tar [--out docs/photographs.png]
"""

import argparse
import tempfile
from pathlib import Path

import matplotlib
import numpy as np
import torch
from photographs import unpack
from PIL import Image

from gradmix.ssl.data.images import decode
from gradmix.ssl.data.listing import list_images
from gradmix.ssl.data.views import cut

SIZE, PHOTOGRAPHS, SHARE = 224, 3, 0.45  # pixels; how many are shown; side of a view, of the middle square's


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("photographs", type=Path)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent.parent / "docs/photographs.png")
    arguments = parser.parse_args()
    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.patches import Rectangle

    titles = ("photograph and its middle square", "a fifth of the square", "the same of the file", "the border")
    figure, rows = pyplot.subplots(PHOTOGRAPHS, 4, figsize=(9, 2.1 * PHOTOGRAPHS), dpi=100)
    with tempfile.TemporaryDirectory() as folder:
        files = list_images(unpack(arguments.photographs, Path(folder)))
        chosen = [file for file in files if Image.open(file).size == (500, 375)]
        for number, (row, file) in enumerate(zip(rows, chosen[:: len(chosen) // PHOTOGRAPHS], strict=False)):
            photograph = Image.open(file).convert("RGB")
            pixels = torch.from_numpy(np.array(photograph)).permute(2, 0, 1)
            side = photograph.height
            left = (photograph.width - side) // 2
            middle, of_square = round(side * (1 - SHARE) / 2), round(SIZE * (1 - SHARE) / 2)
            small, large = round(SIZE * SHARE), round(side * SHARE)
            square = decode(file, SIZE)
            shown = (
                np.asarray(photograph),
                cut(square, (of_square, of_square, small, small), SIZE).permute(1, 2, 0),
                cut(pixels, (left + middle, middle, large, large), SIZE).permute(1, 2, 0),
                cut(pixels, (0, middle, large, large), SIZE).permute(1, 2, 0),
            )
            for axes, image, title in zip(row, shown, titles, strict=True):
                axes.imshow(image)
                axes.set_axis_off()
                if number == 0:
                    axes.set_title(title, fontsize=8)
            row[0].add_patch(Rectangle((left, 0), side - 1, side - 1, fill=False, edgecolor="white", linewidth=1.5))
    figure.tight_layout()
    figure.savefig(arguments.out)
    Image.open(arguments.out).convert("RGB").save(arguments.out, optimize=True)


if __name__ == "__main__":
    main()
