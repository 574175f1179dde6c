"""Anything that a person or a stranger may give: values of keys, names of files and classes, images.

Each check is a strategy and what is true of every case it draws. test_anything.py looks at a few, stress at many.
"""

import csv
import io
import json
import os
import re
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from markupsafe import escape
from PIL import Image, ImageCms, ImageOps

from gradmix.eval.calls import configured
from gradmix.eval.commands import compare, evaluate, pretrain, score
from gradmix.eval.commands.command_line import run_command
from gradmix.eval.config import EvalConfig, ScoreConfig
from gradmix.ssl.config import Config
from gradmix.ssl.data.images import ImageSet, decode
from gradmix.ssl.data.listing import NO_CLASSES
from gradmix.ssl.data.names import UNKNOWN_NAME
from gradmix.ssl.data.views import Crops
from gradmix.ssl.keys import keys_of
from gradmix.ssl.networks.backbones import Backbone, ResNet
from gradmix.ssl.train import check

COMMANDS = {"pretrain": pretrain, "eval": evaluate, "score": score, "compare": compare}


def holds(strategy: st.SearchStrategy, true_of: Callable, examples: int) -> None:
    """Draw the same cases every time and look at each. One that fails is not made smaller, which would take minutes."""

    @settings(
        max_examples=examples,
        derandomize=True,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def look(case):
        true_of(case)

    look()


def in_one_line(error: BaseException | str) -> None:
    text = str(error).strip()
    assert text and len(text.splitlines()) == 1, text


# Values of keys

SCHEMAS = {"pretrain": Config, "eval": EvalConfig, "score": ScoreConfig}
ENOUGH = {
    "pretrain": {"data": "digits", "method": "simclr", "mix": "gradmix", "run_dir": "run"},
    "eval": {"run": "run"},
    "score": {"detector": "detector", "images": "images"},
}
NUMBERS = st.one_of(
    st.integers(-3, 300),
    st.sampled_from([2**31, 2**32, 2**63, -(2**63), 10**40, 1e-320, -0.0, 1e308]),
    st.floats(),
)
WORDS = st.one_of(
    st.text(max_size=20),
    st.sampled_from(
        ["", "null", "true", "nan", "inf", "1e3", "0x10", "~", "???", "${seed}", "${oc.env:HOME}", "[", "{a:"]
    ),
    st.sampled_from(
        ["auto", "cpu", "skip", "error", "crop", "adam", "deep_knn", "deep_knn@projections", "1%", "a" * 5000]
    ),
)
LEAVES = st.one_of(st.none(), st.booleans(), NUMBERS, WORDS)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
ANY_KEY = st.sampled_from([(command, key) for command, schema in SCHEMAS.items() for key in keys_of(schema)])


def value_is_taken_or_refused(case: tuple) -> None:
    """``gradmix.pretrain(KEY=VALUE)``, up to where images would be read."""
    (command, key), value = case
    try:
        config = configured(command, SCHEMAS[command], {**ENOUGH[command], key: value})
        if command == "pretrain":
            check(config)
    except ValueError as error:
        in_one_line(error)


def argument_is_taken_or_refused(case: tuple) -> None:
    """``gradmix-pretrain KEY=TEXT``, up to where images would be read."""
    (command, key), text = case
    arguments = [f"{name}={one}" for name, one in ENOUGH[command].items() if name != key]

    def run():
        run_command(command, "", SCHEMAS[command], check if command == "pretrain" else lambda config: None)

    with TemporaryDirectory() as folder:
        code, _, err = typed(folder, f"gradmix-{command}", [*arguments, f"{key}={text}"], run)
        assert code in (0, 2) and "Traceback" not in err, (code, err)
        assert code == 0 or len(err.strip().splitlines()) == 1, err
        assert not os.listdir(folder)


def typed(folder: str | Path, name: str, arguments: list[str], main: Callable) -> tuple[int, str, str]:
    """A command in this process, in a folder: exit code, output, errors."""
    before, argv, full = os.getcwd(), sys.argv, os.environ.pop("HYDRA_FULL_ERROR", None)
    out, err = io.StringIO(), io.StringIO()
    os.chdir(folder)
    sys.argv, code = [name, *arguments], 0
    try:
        with redirect_stdout(out), redirect_stderr(err):
            main()
    except SystemExit as stop:
        code = stop.code or 0
    finally:
        os.chdir(before)
        sys.argv = argv
        os.environ.pop("HYDRA_FULL_ERROR", None)
        if full is not None:
            os.environ["HYDRA_FULL_ERROR"] = full
    return code, out.getvalue(), err.getvalue()


TEXTS = st.one_of(WORDS, NUMBERS.map(str), VALUES.map(lambda value: json.dumps(value).replace('"', "'")))
# What can be an argument of a process: no NUL.
KEYS_AND_VALUES = st.tuples(ANY_KEY, VALUES)
KEYS_AND_TEXTS = st.tuples(ANY_KEY, TEXTS.filter(lambda text: "\0" not in text and _encodes(text)))


def _encodes(text: str) -> bool:
    try:
        os.fsencode(text)
    except UnicodeEncodeError:
        return False
    return True


# Names of classes and files

SPECIAL = [
    "=1+1",
    "@a",
    "-",
    "'",
    '"',
    "a,b",
    "a\nb",
    "\r",
    "\x1b[31m",
    "\u202e",
    "<b>",
    "&amp;",
    "%s",
    "{}",
    "${a}",
    "~",
    "#",
    "a#1+2#",
]


def visible(name: bytes) -> bool:
    return not name.startswith(b".") and os.fsdecode(name) not in NO_CLASSES


TEXT_NAMES = st.one_of(
    st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=60).map(
        str.encode
    ),
    st.sampled_from([name.encode() for name in SPECIAL]),
).filter(lambda name: visible(name) and name != UNKNOWN_NAME.encode())
ANY_NAMES = st.binary(min_size=1, max_size=200).map(lambda name: name.replace(b"/", b"_").replace(b"\0", b"_"))
NAMES = st.one_of(
    st.tuples(
        st.lists(TEXT_NAMES, min_size=3, max_size=3, unique=True),
        st.lists(TEXT_NAMES, min_size=4, max_size=4, unique=True),
    ),
    st.tuples(
        st.lists(ANY_NAMES.filter(visible), min_size=3, max_size=3, unique=True),
        st.lists(ANY_NAMES.filter(visible), min_size=4, max_size=4, unique=True),
    ),
)
TINY = ("epochs=1", "batch_size=4", "encoder.width=1", "data.image_size=8", "data.holdout=0.25", "data.workers=0")
QUIET = (
    "knn_k=1",
    "knn_every=0",
    "pictures_every=0",
    "trainer.accelerator=cpu",
    "detectors=[deep_knn]",
    "method=supcon",
)


def is_text(name: bytes) -> bool:
    try:
        return bool(name.decode())
    except UnicodeDecodeError:
        return False


def names_are_kept_or_refused(case: tuple[list[bytes], list[bytes]]) -> None:
    """Train, evaluate, score, report, compare with these names; what is not UTF-8 is refused before training."""
    classes, files = case
    with TemporaryDirectory() as place:
        folder, rng = Path(place), np.random.default_rng(0)
        for name in classes:
            os.makedirs(os.path.join(os.fsencode(folder), b"images", name))
            for file in files:
                path = os.path.join(os.fsencode(folder), b"images", name, file + b".png")
                Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(path, "PNG")
        (folder / "strangers").mkdir()
        Image.new("RGB", (8, 8)).save(folder / "strangers" / "a.png")
        fine = all(map(is_text, [*classes, *files])) and UNKNOWN_NAME.encode() not in classes
        arguments = [
            "data=imagefolder",
            "data.root=images",
            "data.unknown_root=strangers",
            *TINY,
            *QUIET,
            "run_dir=run",
        ]
        code, _, err = typed(folder, "gradmix-pretrain", arguments, pretrain.main)
        if not fine:
            assert code == 2 and not (folder / "run/training.json").exists(), (code, err)
            return in_one_line(err)
        assert code == 0, err
        every = [
            ("eval", ["run=run"]),
            ("score", ["detector=run/detector", "images=images", "out=scores.csv", "explain=sheets"]),
            ("score", ["detector=run/detector", "images=images", "out=scores.jsonl"]),
            ("compare", ["run"]),
        ]
        for name, arguments in every:
            code, out, err = typed(folder, f"gradmix-{name}", arguments, COMMANDS[name].main)
            assert code == 0, err
            assert not re.search("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\u202e]", out + err.replace("\r", ""))
        known = sorted(map(os.fsdecode, classes))
        paths = sorted(f"images/{os.fsdecode(name)}/{os.fsdecode(file)}.png" for name in classes for file in files)
        rows = [json.loads(line) for line in (folder / "scores.jsonl").read_bytes().decode().split("\n")[:-1]]
        assert sorted(row["path"] for row in rows) == paths
        assert {row["prediction"] for row in rows} <= {*known, UNKNOWN_NAME} and not any(row["error"] for row in rows)
        with open(folder / "scores.csv", encoding="utf-8", newline="") as file:
            cells = list(csv.DictReader(file))
        assert [row["path"] for row in cells] == [row["path"] for row in rows]  # none begins as a formula does
        assert all(not row["prediction"].startswith(tuple("=+-@\t\r")) for row in cells)
        page = (folder / "run/report.html").read_bytes().decode()
        assert all(str(escape(name)) in page for name in known), [
            name for name in known if str(escape(name)) not in page
        ]


# Images

MODES = {
    "PNG": ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"],
    "JPEG": ["1", "L", "RGB", "CMYK"],
    "BMP": ["1", "L", "P", "RGB", "RGBA"],
    "GIF": ["1", "L", "P", "RGB"],
    "TIFF": ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "F", "I", "I;16"],
    "WEBP": ["L", "RGB", "RGBA"],
    "PPM": ["1", "L", "RGB", "I;16"],
    "JPEG2000": ["L", "LA", "RGB", "RGBA", "I;16"],
}
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
IMAGES = st.sampled_from([(kind, mode) for kind, modes in MODES.items() for mode in modes]).flatmap(
    lambda pair: st.fixed_dictionaries(
        {
            "kind": st.just(pair[0]),
            "mode": st.just(pair[1]),
            "size": st.tuples(st.integers(1, 40), st.integers(1, 40)),
            "seed": st.integers(0, 99),
            "turned": st.integers(0, 9),
            "icc": st.sampled_from([None, b"", b"nonsense", SRGB]),
            "frames": st.integers(1, 3),
            "transparency": st.sampled_from([None, 0]),
            "cut": st.sampled_from([None, None, None, 0.5, 0.9]),
        }
    )
)
SIDE = 24


def pixels_of(case: dict, frame: int = 0) -> Image.Image:
    rng, (width, height) = np.random.default_rng(case["seed"] + frame), case["size"]
    ramp = np.linspace(0, 1, width)[None, :] * np.linspace(0.3, 1, height)[:, None]
    noise = 0.9 * ramp + 0.1 * rng.random((height, width))
    if case["mode"] == "F":
        return Image.fromarray(noise.astype(np.float32))
    if case["mode"] == "I":
        return Image.fromarray((noise * 255).astype(np.int32))
    if case["mode"] == "I;16":
        return Image.fromarray((noise * 65535).astype(np.uint16))
    grey = (noise * 255).astype(np.uint8)
    colours = Image.fromarray(np.stack([grey, 255 - grey, np.roll(grey, 3)], axis=2))
    if case["mode"] == "LAB":
        return Image.merge("LAB", colours.split())
    return colours.convert("RGBA").convert(case["mode"]) if case["mode"] == "LA" else colours.convert(case["mode"])


def write_image(case: dict, path: Path) -> None:
    """Save it as drawn; what this format can't have is left out."""
    exif = Image.Exif()
    exif[0x0112] = case["turned"]
    options: dict = {"exif": exif.tobytes()} if case["kind"] in ("PNG", "JPEG", "TIFF", "WEBP") else {}
    if case["icc"] is not None and case["kind"] in ("PNG", "JPEG", "TIFF", "WEBP"):
        options["icc_profile"] = case["icc"]
    if case["transparency"] is not None and case["kind"] in ("PNG", "GIF") and case["mode"] in ("L", "P"):
        options["transparency"] = case["transparency"]
    if case["frames"] > 1 and case["kind"] in ("GIF", "PNG", "TIFF", "WEBP"):
        options |= {"save_all": True, "append_images": [pixels_of(case, f) for f in range(1, case["frames"])]}
    content = io.BytesIO()
    try:
        pixels_of(case).save(content, case["kind"], **options)
    except (OSError, ValueError, KeyError, SystemError):
        assume(False)
    whole = content.getvalue()
    path.write_bytes(whole if case["cut"] is None else whole[: int(case["cut"] * len(whole))])


def seen_by(case: dict, path: Path) -> np.ndarray | None:
    """``[H, W, 3]`` as Pillow by itself has it, upright, its white 255; None: there is no such thing."""
    if case["mode"] == "I" and case["kind"] == "TIFF":
        return None
    try:
        with Image.open(io.BytesIO(path.read_bytes())) as image:  # Pillow maps a TIFF that it opens itself, turned
            image.load()
            upright = ImageOps.exif_transpose(image)
            grey = np.asarray(upright) if upright.mode[0] in "IF" else None
            white = 1 if upright.mode == "F" else 65535
            if grey is not None:
                return np.repeat((grey / white * 255).clip(0, 255)[:, :, None], 3, axis=2)
            return np.asarray(upright.convert("RGB")).astype(float)
    except (OSError, ValueError, SyntaxError, EOFError):
        return None


BACKBONE = Backbone(ResNet("resnet18", 1, "small"), SIDE, "squash")


def image_is_the_same_everywhere_or_refused(case: dict) -> None:
    """Evaluation, training squares, training views and ``transform`` see what Pillow sees; or each names the file."""
    with TemporaryDirectory() as place:
        path = Path(place) / "image"
        write_image(case, path)
        expected = seen_by(case, path)
        sides = (SIDE, SIDE) if expected is None else expected.shape[:2]
        whole = Crops(2, (1.0, 1.0), (sides[1] / sides[0],) * 2)
        reads = {
            "evaluation": lambda: decode(path, SIDE, "squash"),
            "training": lambda: ImageSet(torch.tensor([0]), SIDE, files=[str(path)], fit="squash")[0][0],
            "transform": lambda: BACKBONE.transform(str(path)),
            "views": lambda: whole.of(str(path), SIDE, np.random.default_rng(0))[0],
        }
        if expected is None:
            for name, read in reads.items():
                try:
                    read()
                except ValueError as error:
                    in_one_line(error)
                    assert str(error).startswith(f"{path}: not a readable image"), (name, error)
                else:
                    raise AssertionError(f"{name} reads what Pillow does not")
            return
        images = {name: read() for name, read in reads.items()}
        assert torch.equal(images["evaluation"], images["training"])
        assert torch.equal(images["evaluation"], images["transform"])
        assert images["evaluation"].shape == images["views"].shape == (3, SIDE, SIDE)
        target = torch.from_numpy(expected).permute(2, 0, 1)[None]
        target = torch.nn.functional.interpolate(target, (SIDE, SIDE), mode="bilinear", antialias=True)[0]
        for name in ("evaluation", "views"):
            far = (images[name] - target).abs().max()
            assert far <= 4, (name, far)  # rounding, twice in Pillow's resizing


CHECKS = {
    "values of keys": (KEYS_AND_VALUES, value_is_taken_or_refused),
    "arguments": (KEYS_AND_TEXTS, argument_is_taken_or_refused),
    "names": (NAMES, names_are_kept_or_refused),
    "images": (IMAGES, image_is_the_same_everywhere_or_refused),
}
