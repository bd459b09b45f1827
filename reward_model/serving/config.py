"""`ServeConfig`: address, token and limits of the reward server; without torch, so that its help is shown at once."""

import os
from dataclasses import dataclass, field

from reward_model.utils.options import ModelOptions
from rlhf_ppo.utils.access import is_loopback
from rlhf_ppo.utils.field_types import check_fields


@dataclass(frozen=True, kw_only=True)
class ServeConfig(ModelOptions):
    """Reward model to serve, address, token and limits."""

    host: str = "127.0.0.1"
    """Address to listen on; any but loopback needs a token."""
    port: int = 8018
    """Port to listen on."""
    token: str | None = field(default=None, repr=False)
    """Secret that requests must send as `Authorization: Bearer ...`; None takes REWARD_MODEL_TOKEN from the
    environment, and without that asks for none (loopback only)."""
    max_samples: int = 1024
    """Most samples in one request."""
    max_bytes: int = 16_000_000
    """Largest request body."""
    max_waiting: int = 256
    """Most requests that wait for the model at once; further ones are told to ask again later (429)."""
    caution: float = 0.0
    """Standard deviations over its members to subtract from an ensemble's score."""

    def __post_init__(self) -> None:
        check_fields(self)
        if not is_loopback(self.host) and not self.secret:
            raise ValueError(
                f"host={self.host!r} can be reached from other machines, but there is no token: anyone could use the "
                "model. Set --token or REWARD_MODEL_TOKEN, or listen on 127.0.0.1."
            )
        for name in ("max_samples", "max_bytes", "max_waiting"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}.")

    @property
    def secret(self) -> str | None:
        """The token, from the setting or the environment; arguments of a process can be read by every user."""
        return self.token or os.environ.get("REWARD_MODEL_TOKEN")
