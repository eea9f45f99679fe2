"""What a run has found, for people: report.html, its plots, tables and progress in a terminal."""

from typing import TYPE_CHECKING

from moebert_kernels.lazy import getter

if TYPE_CHECKING:
    from moebert_kernels.compress.report.page import render_report, write_report
    from moebert_kernels.compress.report.summary import summarize
    from moebert_kernels.compress.report.terminal import StageBars, results_table

__all__ = ["StageBars", "render_report", "results_table", "summarize", "write_report"]

__getattr__ = getter(
    __name__,
    {
        "page": ["render_report", "write_report"],
        "terminal": ["StageBars", "results_table"],
        "summary": ["summarize"],
    },
)
