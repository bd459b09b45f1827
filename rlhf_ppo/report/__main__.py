"""`python -m rlhf_ppo.report RUN_DIR`: write the report of a run, or serve it while the run trains."""

import argparse
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from rlhf_ppo.loop.run_folder import RunFolder
from rlhf_ppo.report.live import DEFAULT_ADDRESS, serve_report
from rlhf_ppo.report.page import write_report


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the report and print its path, or serve it; exit status 1 and one line on stderr on failure."""
    parser = argparse.ArgumentParser(
        prog="python -m rlhf_ppo.report",
        description="Write plots/*.png, README.md (a model card) and report.html (one self-contained page) into the "
        "folder of a run, from the metrics, evaluation, samples and settings that training left there.",
    )
    parser.add_argument("run_dir", type=Path, help="the folder that training wrote into")
    parser.add_argument("--title", help="heading of the page (default: the name of the folder)")
    parser.add_argument("--live", action="store_true", help="serve the page until Ctrl-C instead; nothing is written")
    parser.add_argument(
        "--live-address", metavar="HOST:PORT", help=f"serve it there (default: {DEFAULT_ADDRESS}, or a free port)"
    )
    options = parser.parse_args(arguments)
    title = options.title or options.run_dir.resolve().name
    try:
        RunFolder.open(options.run_dir)
        if options.live or options.live_address:
            with serve_report(options.run_dir, title=title, address=options.live_address) as url:
                sys.stdout.write(f"live report: {url} (Ctrl-C ends it)\n")
                sys.stdout.flush()
                wait_for_interrupt()
        page = write_report(options.run_dir, title=title)
    except KeyboardInterrupt:
        return 0
    except (ValueError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    sys.stdout.write(f"{page}\n")
    return 0


def wait_for_interrupt() -> None:
    """Wait until Ctrl-C raises KeyboardInterrupt."""
    threading.Event().wait()


if __name__ == "__main__":
    raise SystemExit(main())
