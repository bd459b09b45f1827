"""The value head: one linear map from the last hidden state of a language model to V(s_t)."""

import json
import logging
import os
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.utils.hub import cached_file

logger = logging.getLogger(__name__)

VALUE_HEAD_PREFIX = "v_head."
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
HUB_ARGUMENTS = ("cache_dir", "local_files_only", "proxies", "revision", "subfolder", "token")


class ValueHead(nn.Module):
    """V(s_t) from the hidden state after token t: dropout, then the linear layer `summary` with one output.

    Args:
        config: Config of the language model, with the width of its last hidden state and possibly a default for
            `summary_dropout_prob`.
        summary_dropout_prob: Dropout before the linear layer, in training mode; None: the config's, else 0.1.
        v_head_init_strategy: None keeps torch's default for a linear layer; "normal" samples the weight from
            N(0, `v_head_initializer_range`²) and sets the bias to 0; "orthogonal" samples a random direction of that
            length (Engstrom et al. 2020).
        v_head_initializer_range: Standard deviation of "normal", gain of "orthogonal"; 0 starts V at 0 everywhere
            (Ziegler et al. 2019).

    Raises:
        ValueError: The strategy is unknown.
    """

    def __init__(
        self,
        config: PretrainedConfig,
        *,
        summary_dropout_prob: float | None = None,
        v_head_init_strategy: str | None = None,
        v_head_initializer_range: float = 0.2,
    ) -> None:
        super().__init__()
        if v_head_init_strategy not in (None, "normal", "orthogonal"):
            raise ValueError(
                f"v_head_init_strategy must be None, 'normal' or 'orthogonal', got {v_head_init_strategy!r}: the value "
                "head would start from the wrong weights. Pass None for torch's default, or one of the others with "
                "`v_head_initializer_range`."
            )
        if summary_dropout_prob is None:
            summary_dropout_prob = getattr(config, "summary_dropout_prob", 0.1)
        self.dropout = nn.Dropout(summary_dropout_prob or 0.0)
        self.summary = nn.Linear(last_hidden_size(config), 1)
        if v_head_init_strategy == "normal":
            nn.init.normal_(self.summary.weight, mean=0.0, std=v_head_initializer_range)
            nn.init.zeros_(self.summary.bias)
        elif v_head_init_strategy == "orthogonal":
            nn.init.orthogonal_(self.summary.weight, gain=v_head_initializer_range)
            nn.init.zeros_(self.summary.bias)

    def forward(self, hidden: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch 1"]:
        """Values in the head's dtype: a float32 head on a bfloat16 trunk computes in float32."""
        values: Tensor = self.summary(self.dropout(hidden).to(self.summary.weight.dtype))
        return values


def last_hidden_size(config: PretrainedConfig) -> int:
    """Width of the output embeddings' input: the decoder's last hidden state, after any projection (OPT-350m)."""
    decoder = getattr(config, "decoder", None)
    text: Any = decoder if hasattr(decoder, "hidden_size") else config.get_text_config()
    return int(getattr(text, "word_embed_proj_dim", None) or text.hidden_size)


def read_value_head(
    source: str | os.PathLike[str], *, variant: str | None = None, **hub_arguments: Any
) -> dict[str, Tensor] | None:
    """Read the tensors of a value head saved in a folder or hub repository; None if there is none.

    Tries safetensors first, then TRL's classic `pytorch_model.bin` (with `weights_only=True`), sharded or not; reads
    only the value head's tensors. In a hub repository only the first kind of weight file is searched, so that no second
    copy of a large model is downloaded.

    Args:
        source: A folder, or the name of a hub repository.
        variant: Part of the file names, as of `from_pretrained`, such as "fp16".
        hub_arguments: `cache_dir`, `revision`, `token`, ... for a hub repository.
    """
    weight_files: tuple[str, ...] = WEIGHT_FILES
    if variant is not None:
        weight_files = tuple(f"{stem}.{variant}.{kind}" for stem, _, kind in (n.rpartition(".") for n in WEIGHT_FILES))
    if find_file(source, "adapter_config.json", **hub_arguments) is not None:
        weight_files = WEIGHT_FILES[2:] + WEIGHT_FILES[:2]  # `model.safetensors` beside an adapter is of another policy
    for filename in weight_files:
        path = find_file(source, filename, **hub_arguments)
        if path is None:
            continue
        files = _shards(source, path, **hub_arguments) if filename.endswith(".json") else [path]
        tensors = {name: tensor for file in files for name, tensor in _read_head_tensors(file).items()}
        if tensors:
            return tensors
        if not Path(source).is_dir():
            return None
    return None


def find_file(source: str | os.PathLike[str], filename: str, **hub_arguments: Any) -> Path | None:
    """The local path of `filename` in a folder or hub repository (downloaded if necessary), or None."""
    hub = {name: value for name, value in hub_arguments.items() if name in HUB_ARGUMENTS and value is not None}
    path = cached_file(
        source,
        filename,
        **hub,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return None if path is None else Path(path)


def load_value_head(head: ValueHead, tensors: dict[str, Tensor], *, source: object) -> None:
    """Copy saved tensors into `head`; a ValueError if they have another architecture or width."""
    expected = {name: tuple(tensor.shape) for name, tensor in head.state_dict().items()}
    got = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if got != expected:
        raise ValueError(
            f"The value head saved in {source} has the tensors {got}, this model needs {expected}: it belongs to "
            "another model or library. Load the language model alone "
            "(AutoModelForCausalLM.from_pretrained) and pass that object, to start from a fresh value head."
        )
    head.load_state_dict(tensors)


def write_value_head(folder: Path, state: dict[str, Tensor]) -> None:
    """Write the value head's entries of `state` to `pytorch_model.bin`, where TRL's classic API looks for them, too."""
    folder.mkdir(parents=True, exist_ok=True)
    head = {name: tensor.detach().cpu() for name, tensor in state.items() if name.startswith(VALUE_HEAD_PREFIX)}
    torch.save(head, folder / "pytorch_model.bin")


def _shards(source: str | os.PathLike[str], index: Path, **hub_arguments: Any) -> list[Path]:
    """The files of a sharded checkpoint that hold the value head."""
    weight_map: dict[str, str] = json.loads(index.read_text())["weight_map"]
    names = sorted({file for name, file in weight_map.items() if VALUE_HEAD_PREFIX in name})
    for name in names:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ValueError(
                f"{index} names {name!r}, outside of its folder: a model's files must be in the index's folder. Do not "
                "use this folder, or correct the index."
            )
    paths = [find_file(source, name, **hub_arguments) for name in names]
    return [path for path in paths if path is not None]


def _read_head_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors of `path` whose names contain "v_head.", without the prefix up to there."""
    if path.suffix == ".safetensors":
        with safe_open(path, framework="pt") as file:
            named = {name: file.get_tensor(name) for name in file.keys() if VALUE_HEAD_PREFIX in name}  # noqa: SIM118
    else:
        named = torch.load(path, map_location="cpu", weights_only=True)
    return {name.split(VALUE_HEAD_PREFIX, 1)[1]: tensor for name, tensor in named.items() if VALUE_HEAD_PREFIX in name}
