"""Tables, plots and the HTML page of a run."""

from karui.report.write import PAGE as PAGE
from karui.report.write import RECORD as RECORD
from karui.report.write import read_run as read_run
from karui.report.write import write_report as write_report
