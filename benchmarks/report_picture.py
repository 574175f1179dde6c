"""The picture of a report on the front page: headline numbers, the map, the surest mistakes of one kind.

    gradmix-pretrain method=sphor run_dir=runs/demo
    python benchmarks/report_picture.py runs/demo       # writes docs/report.png

It needs chromium. The caption in README.md names the run's command.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image, ImageChops

PICTURE = Path(__file__).parent.parent / "docs/report.png"
MARGIN = 24
# Only these parts; of the mistakes six, beside the map.
STYLE = """<style>
main { max-width: 1240px; display: grid; grid-template-columns: 560px 1fr; column-gap: 40px; align-items: start; }
main > p, main > h1, main > nav, main > .headline { grid-column: 1 / -1; }
main > nav, section { display: none; }
#map, #mistakes { display: block; margin-top: 0; }
#mistakes .cards { grid-template-columns: 1fr 1fr; }
#mistakes h3 ~ h3, #mistakes .cards ~ *, #mistakes .card:nth-child(n + 7) { display: none; }
</style>"""


def main() -> None:
    page = (Path(sys.argv[1]) / "report.html").read_text().replace("</head>", STYLE + "</head>")
    with tempfile.TemporaryDirectory() as folder:
        changed, shot = Path(folder, "report.html"), Path(folder, "report.png")
        changed.write_text(page)
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=1280,1600"]
        command = ["chromium", *options, f"--screenshot={shot}", changed.as_uri()]
        subprocess.run(command, check=True, capture_output=True)
        picture = Image.open(shot).convert("RGB")
    paper = Image.new("RGB", picture.size, picture.getpixel((0, 0)))
    left, top, right, bottom = ImageChops.difference(picture, paper).getbbox()
    box = (left - MARGIN, top - MARGIN, right + MARGIN, bottom + MARGIN)
    picture.crop(box).quantize(128).save(PICTURE, optimize=True)
    print(f"written to docs/{PICTURE.name}, {PICTURE.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
