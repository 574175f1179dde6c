"""gradmix-pretrain: train, then evaluate."""

from gradmix.eval.commands import later
from gradmix.eval.commands.command_line import run_command
from gradmix.ssl.config import Config


def main() -> None:
    """gradmix-pretrain."""
    run_command("pretrain", "train a backbone, then evaluate it.", Config, later("pretrain:run_pretrain"))
