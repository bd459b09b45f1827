"""The type checker that `--jaxtyping-packages` applies to our modules while tests run."""

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
"""Beartype where an int may stand for a float, as in PEP 484 and in everybody's code."""
