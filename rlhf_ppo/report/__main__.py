"""`python -m rlhf_ppo.report RUN_DIR`: write the report of a run."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rlhf_ppo.loop.run_folder import RunFolderError
from rlhf_ppo.report.page import write_report


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the report and print its path; exit status 1 and one line on stderr on failure."""
    parser = argparse.ArgumentParser(
        prog="python -m rlhf_ppo.report",
        description="Write plots/*.png, README.md (a model card) and report.html (one self-contained page) into the "
        "folder of a run, from the metrics, evaluation, samples and settings that training left there.",
    )
    parser.add_argument("run_dir", type=Path, help="the folder that training wrote into")
    parser.add_argument("--title", help="heading of the page (default: the name of the folder)")
    options = parser.parse_args(arguments)
    try:
        page = write_report(options.run_dir, title=options.title or options.run_dir.resolve().name)
    except (RunFolderError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    sys.stdout.write(f"{page}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
