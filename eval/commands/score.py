"""gradmix-score: score image files with a saved detector."""

from gradmix.eval.commands import later
from gradmix.eval.commands.command_line import run_command
from gradmix.eval.config import ScoreConfig


def main() -> None:
    """gradmix-score."""
    run_command("score", "score image files with a saved detector.", ScoreConfig, later("score:run_score"))
