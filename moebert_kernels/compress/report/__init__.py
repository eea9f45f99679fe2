"""What a run has found, for people: report.html, its plots, tables and progress in a terminal."""

from typing import TYPE_CHECKING

from moebert_kernels.lazy import exports

if TYPE_CHECKING:
    from moebert_kernels.compress.report.page import render_report as render_report
    from moebert_kernels.compress.report.page import write_report as write_report
    from moebert_kernels.compress.report.summary import summarize as summarize
    from moebert_kernels.compress.report.terminal import StageBars as StageBars
    from moebert_kernels.compress.report.terminal import results_table as results_table

__all__, __getattr__ = exports(
    __name__,
    {
        "page": ["render_report", "write_report"],
        "terminal": ["StageBars", "results_table"],
        "summary": ["summarize"],
    },
)
