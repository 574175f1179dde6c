"""gradmix-eval: evaluate a run again."""

from gradmix.eval.commands import later
from gradmix.eval.commands.command_line import run_command
from gradmix.eval.config import EvalConfig


def main() -> None:
    """gradmix-eval."""
    run_command(
        "eval",
        "evaluate a run again, or a checkpoint or features from elsewhere.",
        EvalConfig,
        later("evaluate:run_eval"),
    )
