"""The page: a comparison, its curves and its pictures as one HTML file that needs neither network nor server."""

from kdcache.evaluate.report.make import ReportOptions, make_report
from kdcache.evaluate.report.page import write_report

__all__ = ["ReportOptions", "make_report", "write_report"]
