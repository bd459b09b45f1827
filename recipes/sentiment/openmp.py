"""Threads that wait for each other spin only shortly.

OpenMP reads this from the environment once, while torch is loaded. By default a waiting thread spins for milliseconds;
beside other jobs it spins on the core that the thread it waits for needs. The packages' commands do the same in
`rlhf_ppo.utils.openmp`, which cannot be imported without torch.
"""

import os

SHORT_SPIN = {"GOMP_SPINCOUNT": "1000", "KMP_BLOCKTIME": "1"}
"""GNU's libgomp: rounds of waiting before a thread sleeps; LLVM's and Intel's libomp: milliseconds."""


def spin_shortly() -> None:
    """Set `SHORT_SPIN` unless the user has chosen how threads wait."""
    if not os.environ.keys() & {"OMP_WAIT_POLICY", *SHORT_SPIN}:
        os.environ.update(SHORT_SPIN)
