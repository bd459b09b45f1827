"""PEFT adapters of a policy: activate one, add a reference adapter, add a reward model's adapter."""

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeAlias

import torch
from peft import (
    PeftConfig,
    PeftModel,
    get_peft_model_state_dict,
    load_peft_weights,
    set_peft_model_state_dict,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from rlhf_ppo.utils.model_names import check_model_name
from rlhf_ppo.utils.moved_names import forward_old_names

_Context: TypeAlias = AbstractContextManager[None]

REFERENCE_ADAPTER = "reference"


@contextmanager
def preserve_requires_grad(model: nn.Module) -> Iterator[None]:
    """Context manager: on exit, restore every `requires_grad` flag; PEFT sets them when it activates an adapter."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


@contextmanager
def active_adapter(model: PeftModel, name: str) -> Iterator[None]:
    """Context manager: while active, `name` is the active adapter; on exit, the previous one."""
    previous = model.active_adapter
    if previous == name:
        yield
        return
    with preserve_requires_grad(model):
        model.set_adapter(name)
    try:
        yield
    finally:
        with preserve_requires_grad(model):
            model.set_adapter(previous)


@contextmanager
def no_adapter(model: PeftModel) -> Iterator[None]:
    """Context manager: while active, adapters are off and the model computes as its base."""
    with preserve_requires_grad(model), model.disable_adapter():
        yield


class _ReentrantActiveAdapter:
    """`active_adapter` as a context manager that can be entered several times."""

    def __init__(self, model: PeftModel, name: str) -> None:
        self.model, self.name = model, name
        self.entered: list[_Context] = []

    def __enter__(self) -> None:
        self.entered.append(active_adapter(self.model, self.name))
        self.entered[-1].__enter__()

    def __exit__(self, *error: Any) -> None:
        self.entered.pop().__exit__(*error)


def checkpoint_context_fn(model: PeftModel) -> Callable[[], tuple[_Context, _Context]]:
    """`context_fn` for `torch.utils.checkpoint`: recompute a layer under the adapter of its forward pass.

    By the backward pass another adapter may be active: without this, a checkpointed pass of the critic would be
    recomputed with the policy's adapter and give wrong gradients without an error.
    """
    return lambda: (nullcontext(), _ReentrantActiveAdapter(model, str(model.active_adapter)))


def is_trained_adapter(model: PeftModel, name: str) -> bool:
    """Whether an adapter is already trained: a fresh LoRA adapter has B = 0, so it equals the base model.

    Adapters of other kinds than LoRA count as trained.
    """
    suffixes = (f"lora_B.{name}.weight", f"lora_embedding_B.{name}")
    lora_b = [parameter for key, parameter in model.named_parameters() if key.endswith(suffixes)]
    return not lora_b or any(bool(parameter.any()) for parameter in lora_b)


def merged_model(model: PeftModel, name: str) -> Any:
    """A copy of the base of `model` with the adapter `name` merged into its weights.

    An LM head that shares its weight with the embedding gets one of its own where the adapter changes it.
    """
    merged: Any = copy.deepcopy(model)
    base = merged.get_base_model()
    head, embedding = base.get_output_embeddings(), base.get_input_embeddings()
    inner = [getattr(part, "get_base_layer", lambda part=part: part)() for part in (head, embedding)]
    if inner[0].weight is inner[1].weight and any(isinstance(part, BaseTunerLayer) for part in (head, embedding)):
        inner[0].weight = nn.Parameter(inner[0].weight.detach().clone())
    plain = merged.merge_and_unload(adapter_names=[name])
    if plain.get_output_embeddings().weight is not plain.get_input_embeddings().weight:
        plain.config.get_text_config(decoder=True).tie_word_embeddings = plain.config.tie_word_embeddings = False
    return plain


def adapter_parameters(model: PeftModel, name: str) -> dict[str, nn.Parameter]:
    """The parameters of the adapter `name`, by their names in `model`."""
    return {key: parameter for key, parameter in model.named_parameters() if f".{name}." in f"{key}."}


def trained_base_parameters(model: PeftModel) -> list[str]:
    """Names of trained parameters outside of all adapters: training them changes the base model, too."""
    adapter_ids = {
        id(parameter) for name in model.peft_config for parameter in adapter_parameters(model, name).values()
    }
    named = model.named_parameters()
    return [key for key, parameter in named if parameter.requires_grad and id(parameter) not in adapter_ids]


def describe_trainable_parameters(model: nn.Module) -> str:
    """A sentence with the number of trained and of all parameters; 4-bit weights are counted unpacked."""
    counts = [(_count(parameter), parameter.requires_grad) for parameter in model.parameters()]
    trained, total = sum(count for count, is_trained in counts if is_trained), sum(count for count, _ in counts)
    return f"{trained:,} of {total:,} parameters are trained ({trained / total:.2%})"


def _count(parameter: nn.Parameter) -> int:
    count = int(getattr(parameter, "ds_numel", parameter.numel()))  # ZeRO-3 leaves an empty tensor in place
    # bitsandbytes packs two 4-bit numbers into a byte of its storage.
    return 2 * count * parameter.element_size() if type(parameter).__name__ == "Params4bit" else count


def adapters_to_save(model: PeftModel, policy: str) -> list[str]:
    """Names of the adapters saved with a policy: its own, and its reference adapter."""
    return [name for name in model.peft_config if name in (policy, REFERENCE_ADAPTER)]


def changes_base(config: PeftConfig) -> bool:
    """Whether PEFT changes the base's weights as it adds such an adapter: PiSSA, OLoRA, CorDA, LoftQ and the like."""
    start = getattr(config, "init_lora_weights", True)
    return isinstance(start, str) and start.lower() not in ("eva", "gaussian", "mica", "orthogonal")


def with_plain_start(config: PeftConfig) -> Any:
    """A copy of an adapter's config, which leaves the base as it is."""
    config = copy.deepcopy(config)
    if changes_base(config):
        config.init_lora_weights = True  # type: ignore[attr-defined]
    return config


def add_reference_adapter(model: PeftModel, source: str) -> None:
    """Add a frozen copy of the adapter `source` under the name "reference"."""
    config = with_plain_start(model.peft_config[source])
    config.inference_mode = True
    with preserve_requires_grad(model):
        model.add_adapter(REFERENCE_ADAPTER, config)
        weights = get_peft_model_state_dict(model, adapter_name=source)
        set_peft_model_state_dict(model, weights, adapter_name=REFERENCE_ADAPTER)
    freeze_adapter(model, REFERENCE_ADAPTER)


def match_vocabulary(base: Any, source: str, **hub_arguments: Any) -> None:
    """Resize the token embeddings of `base` to those in the adapter `source`, if it was saved with embeddings.

    Tokens that were added before training are in the adapter's folder, not in the base model's.
    """
    tables = [base.get_input_embeddings(), base.get_output_embeddings()]
    names = [f".{name}." for name, module in base.named_modules() if any(module is table for table in tables)]
    weights: dict[str, Tensor] = load_peft_weights(source, device="cpu", **hub_arguments)
    sizes = [
        len(tensor)
        for key, tensor in weights.items()
        if key.endswith(".weight") and "lora" not in key and any(name in f".{key}" for name in names)
    ]
    if sizes and max(sizes) != len(tables[0].weight):
        base.resize_token_embeddings(max(sizes), mean_resizing=False)


def load_reference_adapter(model: PeftModel, folder: str) -> None:
    """Load the adapter saved in `folder` as the frozen adapter "reference"."""
    with preserve_requires_grad(model):
        model.load_adapter(folder, REFERENCE_ADAPTER, is_trainable=False)
    freeze_adapter(model, REFERENCE_ADAPTER)


def freeze_adapter(model: PeftModel, name: str) -> None:
    """Set `requires_grad` to False for the adapter `name`."""
    for parameter in adapter_parameters(model, name).values():
        parameter.requires_grad_(False)


def check_reward_source(source: object) -> None:
    """Raise ValueError unless `source` is a folder or may be a name on the hub."""
    if not isinstance(source, str):
        raise ValueError(
            "The `reward_adapter` argument should be a string representing the name of local path or the Hub id "
            f"to the Reward Modeling adapter, got {type(source)}: nothing can be loaded. "
            "Save the reward model's adapter and pass its folder."
        )
    check_model_name(source)


def add_reward_adapter(model: PeftModel, source: str, name: str, **hub_arguments: Any) -> nn.Linear:
    """Add a reward model's adapter under `name`, frozen, and return its score head.

    Args:
        model: Has the policy's adapter, which stays active.
        source: Folder or hub name of the adapter of a sequence classifier on the same base model.
        hub_arguments: For `huggingface_hub`, such as `token`.

    Raises:
        ValueError: The folder has no score head, or weights of the base that are not the policy's.
    """
    config = PeftConfig.from_pretrained(source, **hub_arguments)
    _check_one_base(model, config)
    config.inference_mode = True
    config.modules_to_save = None  # a causal model has no place for the classifier's head: it is returned
    weights: dict[str, Tensor] = load_peft_weights(source, device="cpu", **hub_arguments)
    head_weights = {key: tensor for key, tensor in weights.items() if "score" in key.split(".")}
    head_state = {key.rsplit(".", 1)[-1]: tensor for key, tensor in head_weights.items()}
    if "weight" not in head_state:
        raise ValueError(
            f"The reward adapter in {source} has no score head, got the tensors {sorted(weights)[:4]} ...: nothing "
            "could turn its hidden states into rewards. Train it as a sequence classifier "
            "(LoraConfig(task_type='SEQ_CLS')), which saves `score` with the adapter."
        )
    weights = {key: tensor for key, tensor in weights.items() if key not in head_weights}
    adapter_weights = _without_shared_weights(model, weights, source)
    with preserve_requires_grad(model):
        model.add_adapter(name, config)
        set_peft_model_state_dict(model, adapter_weights, adapter_name=name)
    freeze_adapter(model, name)
    n_labels, width = head_state["weight"].shape
    score = nn.Linear(width, n_labels, bias="bias" in head_state, dtype=head_state["weight"].dtype)
    score.load_state_dict(head_state)
    device = next(model.parameters()).device
    return score.requires_grad_(False).to(torch.device("cpu") if device.type == "meta" else device)


def _check_one_base(model: PeftModel, config: PeftConfig) -> None:
    named = [("reward adapter", config), *(("policy's adapter", each) for each in model.peft_config.values())]
    for whose, each in named:
        if changes_base(each):
            raise ValueError(
                f"expected adapters that leave the base as it is, got a {whose} with init_lora_weights="
                f"{getattr(each, 'init_lora_weights', None)!r}: a part of the base's weights is in that adapter, so "
                "the reward model would give other scores here. Train the adapter with init_lora_weights=True, or load "
                "the reward model separately."
            )


def _without_shared_weights(model: PeftModel, weights: dict[str, Tensor], source: str) -> dict[str, Tensor]:
    """`weights` without those that the base has, too: loading them would change the policy.

    An adapter on a base with an added padding token is saved with the token embeddings, one row longer.

    Raises:
        ValueError: They are not the base's.
    """
    base = {name.replace(".base_layer", ""): tensor for name, tensor in model.state_dict().items()}
    shared = {key: base[plain] for key in weights if (plain := key.replace(".base_layer", "")) in base}
    for key, own in shared.items():
        rows = min(len(own), len(weights[key]))
        if not torch.equal(own[:rows].cpu(), weights[key][:rows].to(own.dtype)):
            raise ValueError(
                f"expected a reward adapter on the policy's base as it is, got one in {source} with another {key}: it "
                "would replace the policy's own. Train the reward model without `modules_to_save` and on the policy's "
                "base, or load it separately."
            )
    return {key: tensor for key, tensor in weights.items() if key not in shared}


forward_old_names(__name__)
