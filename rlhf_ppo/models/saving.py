"""Save a language model with its generation config as it is."""

import copy
import os
from typing import Any


def save_language_model(model: Any, folder: str | os.PathLike[str], **kwargs: Any) -> None:
    """`model.save_pretrained(folder, **kwargs)`, whatever the model's generation config says.

    transformers loads a config with sampling settings and without `do_sample`, as Llama 2's is, and refuses to save it
    once a setting was changed: the trained weights would be lost for it.
    """
    own = getattr(model, "generation_config", None)
    if own is None:
        model.save_pretrained(folder, **kwargs)
        return
    kind = type(own)
    written = copy.copy(own)
    written.__class__ = type(kind.__name__, (kind,), {"validate": lambda *_, **__: None})
    model.generation_config = written
    try:
        model.save_pretrained(folder, **kwargs)
    finally:
        model.generation_config = own
