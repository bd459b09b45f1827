"""What a run leaves behind for people: the run folder, its plots, the model card and the report page."""

from rlhf_ppo.report.page import write_report
from rlhf_ppo.report.run_folder import RunFolder, RunFolderError, Sample, TokenTrace

__all__ = ["RunFolder", "RunFolderError", "Sample", "TokenTrace", "write_report"]
