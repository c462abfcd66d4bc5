"""HTML reports of training runs."""

from ultramem.report.page import write_report

__all__ = ["write_report"]
