"""In place of torch: shows how threads were told to wait when it is imported, and ends the process."""

import os

CHOICES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
print(*(f"{name}={os.environ[name]}" for name in CHOICES if name in os.environ), flush=True)
os._exit(0)
