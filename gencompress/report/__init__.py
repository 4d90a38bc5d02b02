"""Artifact folders to report.html, report.md and report.json. Measures nothing; needs no torch."""

from gencompress.report.write import write_report

__all__ = ["write_report"]
