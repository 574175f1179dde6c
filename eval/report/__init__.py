"""report.html: one file that explains a run, and opens without a network."""

from gradmix.eval.report.report import write_report

__all__ = ["write_report"]
