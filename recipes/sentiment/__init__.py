"""What the sentiment recipe stands on: fetched assets, review parts, small language models and independent judges.

A folder beside the recipe rather than a library: a script launched from `recipes/` imports it as `sentiment`.
"""

import os

SHORT_SPIN = {"GOMP_SPINCOUNT": "1000", "KMP_BLOCKTIME": "1"}
"""GNU's libgomp: rounds of waiting before a thread sleeps; LLVM's and Intel's libomp: milliseconds."""


def spin_shortly() -> None:
    """Set `SHORT_SPIN` unless the user has chosen how threads wait."""
    if not os.environ.keys() & {"OMP_WAIT_POLICY", *SHORT_SPIN}:
        os.environ.update(SHORT_SPIN)
