"""Check the name of a model: the path of a folder, or a name on the model hub."""

from pathlib import Path


def is_missing_folder(name: str) -> bool:
    """Whether `name` is a path, which no name on the hub looks like, and no folder is there."""
    is_path = name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name
    return is_path and not Path(name).expanduser().is_dir()


def check_model_name(name: str) -> None:
    """Raise ValueError if `name` is a path at which there is no folder."""
    if is_missing_folder(name):
        raise ValueError(
            f"there is no model folder {name}: nothing can be loaded. Give a folder that `save_pretrained` wrote, or a "
            "name on the model hub, such as gpt2 or owner/name."
        )
