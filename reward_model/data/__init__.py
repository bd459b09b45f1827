"""Read preference data from files and datasets of any layout into `Comparison`s.

A row has `chosen` and `rejected`, with or without `prompt`, as text or chat messages; or `completions` with `ranks` or
`scores`; or the columns of a public dataset, which `layouts` converts.
"""

from reward_model.data.comparisons import BadRow, Comparison, Row, as_comparisons, parse_row

__all__ = ["BadRow", "Comparison", "Row", "as_comparisons", "parse_row"]
