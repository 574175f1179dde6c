"""gradmix-embed: features of image files."""

from gradmix.eval.commands import later
from gradmix.eval.commands.command_line import run_command
from gradmix.eval.config import EmbedConfig


def main() -> None:
    """gradmix-embed."""
    run_command("embed", "features of image files, by any network.", EmbedConfig, later("embed:run_embed"))
