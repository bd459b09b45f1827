"""`python -m rlhf_ppo`: the command `rlhf-ppo`."""

import sys

from rlhf_ppo.cli import main

sys.exit(main())
