"""What a run leaves behind for people: the run folder, its plots, the model card and the report page."""

from rlhf_ppo.loop.run_folder import RunFolder, RunFolderError, Sample, TokenTrace
from rlhf_ppo.report.page import write_report

__all__ = ["RunFolder", "RunFolderError", "Sample", "TokenTrace", "write_report"]
