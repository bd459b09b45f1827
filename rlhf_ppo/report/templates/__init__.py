"""The templates of the report page and of the model card, and how they are filled in."""

import re
from pathlib import Path
from typing import Any

import jinja2


def render(template_name: str, /, **values: Any) -> str:
    """Fill in a template. In HTML every value is escaped; in Markdown `cell` makes a value safe for a table."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=lambda template: template is not None and template.endswith(".html.j2"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["cell"] = _cell
    return environment.get_template(template_name).render(**values)


def _cell(value: object) -> str:
    """Text on one line that no character of it can end the table cell or start markup."""
    return re.sub(r"([\\|`*_<>\[\]])", r"\\\1", " ".join(str(value).split()))
