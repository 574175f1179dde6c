"""gradmix-detector: what is in a saved detector; more images for it, or a class less."""

import os
import sys

from gradmix.eval.commands import later
from gradmix.eval.commands.command_line import quote, run_command
from gradmix.eval.config import DetectorConfig

ACTIONS = ("info", "add", "remove", "export")
SUMMARY = """look into a saved detector, make one with more images or a class less, or an ONNX file.

gradmix-detector info DETECTOR
gradmix-detector add DETECTOR images=FOLDER class=NAME out=NEW
gradmix-detector remove DETECTOR class=NAME out=NEW
gradmix-detector export DETECTOR out=scorer.onnx"""


def main() -> None:
    """gradmix-detector."""
    sys.argv[1:] = as_keys(sys.argv[1:])
    if line := os.environ.get("COMP_LINE"):  # Tab: the words so far
        name, *words = line.split(" ")
        os.environ["COMP_LINE"] = " ".join([name, *as_keys(words)])
    run_command("detector", SUMMARY, DetectorConfig, later("detector:run_detector"))


def as_keys(words: list[str]) -> list[str]:
    """The command's own first words, ``add DETECTOR``, and ``class=``, as KEY=VALUE."""
    if words and words[0] in ACTIONS:
        words = [f"action={words[0]}", *words[1:]]
        if len(words) > 1 and words[1] and "=" not in words[1] and not words[1].startswith("-"):
            words[1] = f"detector={words[1]}"
    return [f"class_name={quote(word[6:])}" if word.startswith("class=") else word for word in words]
