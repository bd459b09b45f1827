"""Report of a run: plots, model card and HTML page, made from its run folder."""

from rlhf_ppo.loop.run_folder import RunFolder, RunFolderError, Sample, TokenTrace
from rlhf_ppo.report.live import serve_report
from rlhf_ppo.report.page import write_report

__all__ = ["RunFolder", "RunFolderError", "Sample", "TokenTrace", "serve_report", "write_report"]
