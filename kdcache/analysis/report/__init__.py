"""The report page: a comparison, its curves and its pictures as one HTML file without network or server."""

from kdcache.analysis.report.build import ReportOptions, make_report
from kdcache.analysis.report.page import write_report

__all__ = ["ReportOptions", "make_report", "write_report"]
