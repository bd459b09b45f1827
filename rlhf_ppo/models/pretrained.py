"""Language models with a value head: load, run, save. Saved folders also load as plain transformers models."""

import os
import tempfile
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from huggingface_hub import CommitInfo, HfApi
from jaxtyping import Float, Int
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from rlhf_ppo.models import adapters, critic, loading
from rlhf_ppo.models.dropout import EvalMode
from rlhf_ppo.models.saving import save_language_model
from rlhf_ppo.models.value_head import (
    HUB_ARGUMENTS,
    VALUE_HEAD_PREFIX,
    ValueHead,
    find_file,
    load_value_head,
    read_value_head,
    write_value_head,
)

Wrapper = TypeVar("Wrapper", bound="PreTrainedModelWrapper")
Forward = tuple[Tensor, Tensor | None, Tensor] | tuple[Tensor, Tensor | None, Tensor, Any]

WRAPPER_MODULES = ("pretrained_model", "v_head", "score", "critic")


class PreTrainedModelWrapper(nn.Module):
    """A language model (`pretrained_model`) with a value head (`v_head`) on its last hidden states.

    Attributes that the wrapper lacks are read from the language model: `wrapper.device`, `wrapper.generation_config`.

    Args:
        pretrained_model: A transformers model with output embeddings, or a PEFT model around one.
        score_module: Score head of a reward adapter, see `from_pretrained`.
        rm_adapter_name: Name of that adapter.
        value_head_arguments: For `ValueHead`.

    Raises:
        ValueError: The model has no output embeddings, has a prompt-learning adapter, or is offloaded.
    """

    transformers_parent_class: ClassVar[Any] = AutoModelForCausalLM
    lm_head_namings: ClassVar[tuple[str, ...]] = ("lm_head", "embed_out", "output_projection")
    supported_args: ClassVar[tuple[str, ...]] = (
        "summary_dropout_prob",
        "v_head_init_strategy",
        "v_head_initializer_range",
    )
    is_encoder_decoder: ClassVar[bool] = False
    pretrained_model: Any
    config: Any
    score: nn.Linear
    policy_adapter_name: str | None
    critic: nn.Module | None  # see `rlhf_ppo.models.critic`

    def __init__(
        self,
        pretrained_model: loading.LanguageModel,
        *,
        score_module: nn.Linear | None = None,
        rm_adapter_name: str | None = None,
        **value_head_arguments: Any,
    ) -> None:
        super().__init__()
        loading.check_language_model(pretrained_model)
        self.pretrained_model = pretrained_model
        self.config = pretrained_model.config
        self.is_peft_model = isinstance(pretrained_model, PeftModel)
        self.is_loaded_in_8bit, self.is_loaded_in_4bit = loading.quantized_bits(pretrained_model)
        self.is_sequential_parallel = len(set(loading.device_map_of(pretrained_model).values())) > 1
        self.policy_adapter_name = self.pretrained_model.active_adapter if self.is_peft_model else None
        self.supports_rm_adapter = score_module is not None
        self.rm_adapter_name = rm_adapter_name
        self.value_head_was_loaded, self.critic = False, None
        self.v_head = ValueHead(self.config, **loading.without_dtype(value_head_arguments))
        output_device = pretrained_model.get_output_embeddings().weight.device
        if output_device.type != "meta":
            self.v_head.to(output_device)
        if score_module is not None:
            self.score = score_module
        self.register_load_state_dict_post_hook(loading.strip_wrapper_prefix)  # type: ignore[no-untyped-call]
        self._takes_position_ids = not self.is_encoder_decoder and loading.takes_position_ids(pretrained_model)

    @classmethod
    def from_pretrained(
        cls: type[Wrapper],
        pretrained_model_name_or_path: Any,
        *model_args: Any,
        peft_config: Any = None,
        reward_adapter: Any = None,
        reward_adapter_name: str = "reward_adapter",
        is_trainable: bool = False,
        **kwargs: Any,
    ) -> Wrapper:
        """Load a language model and the value head saved with it, or a fresh one.

        Args:
            pretrained_model_name_or_path: A hub name, a folder (of a model, of this class, or of an adapter), a
                transformers model or a PEFT model.
            model_args: Passed on to the model's `from_pretrained`.
            peft_config: Config of a fresh adapter that is trained instead of the model's own weights.
            reward_adapter: Folder or hub name of a reward model's adapter on the same base: `compute_reward_score`.
            reward_adapter_name: Its name.
            is_trainable: Whether an adapter loaded from a folder or the hub is trained further. Its starting state is
                then the reference, see `rlhf_ppo.models.reference`.
            kwargs: Arguments of `ValueHead`; `load_in_8bit`, `load_in_4bit`; and those of the model's
                `from_pretrained`, whose `dtype` is float32 by default.

        Raises:
            ValueError: PPO cannot train the model; each message names the remedy.
        """
        source = pretrained_model_name_or_path
        if reward_adapter is not None:
            adapters.check_reward_source(reward_adapter)
        head_arguments = {name: kwargs.pop(name) for name in cls.supported_args if name in kwargs}
        hub = {name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs}
        language_model = loading.load_language_model(
            cls.transformers_parent_class, source, *model_args, peft_config=peft_config, is_trainable=is_trainable,
            arguments=kwargs,
        )  # fmt: skip
        score = None
        if reward_adapter is not None:
            if not isinstance(language_model, PeftModel):
                raise ValueError(
                    f"reward_adapter can only be used with a PeftModel, got {type(language_model)}: the reward model's "
                    "adapter needs a base shared with the policy's. Pass `peft_config=LoraConfig(...)` too."
                )
            token = {"token": kwargs["token"]} if kwargs.get("token") is not None else {}
            score = adapters.add_reward_adapter(language_model, reward_adapter, reward_adapter_name, **token)
        model = cls(language_model, score_module=score, rm_adapter_name=reward_adapter_name, **head_arguments)
        if isinstance(source, str | os.PathLike):
            model._load_saved_parts(source, hub, is_trainable=is_trainable, variant=kwargs.get("variant"))
        return model

    def _load_saved_parts(
        self, source: str | os.PathLike[str], hub: dict[str, Any], *, is_trainable: bool, variant: str | None
    ) -> None:
        """Load the saved value head and, if training continues, the adapter saved as reference."""
        tensors = read_value_head(source, variant=variant, **hub)
        if tensors is not None:
            load_value_head(self.v_head, tensors, source=source)
            self.value_head_was_loaded = True
        subfolder = os.path.join(hub.get("subfolder") or "", adapters.REFERENCE_ADAPTER)  # noqa: PTH118
        saved = find_file(source, "adapter_config.json", **{**hub, "subfolder": subfolder})
        if self.is_peft_model and is_trainable and saved is not None:
            adapters.load_reference_adapter(self.pretrained_model, os.fspath(saved.parent))
        critic.attach_saved_critic(self, os.path.join(source, hub.get("subfolder") or ""))  # noqa: PTH118

    def __getattr__(self, name: str) -> Any:
        """Read public attributes (and FSDP's `_no_split_modules`) that the wrapper lacks from the language model."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "pretrained_model" or (name.startswith("_") and name != "_no_split_modules"):
                raise
            return getattr(self.pretrained_model, name)

    def forward(
        self,
        input_ids: Int[Tensor, "batch time"] | None = None,
        past_key_values: Any = None,
        attention_mask: Tensor | None = None,
        return_past_key_values: bool = False,
        **kwargs: Any,
    ) -> Forward:
        """Logits for the next token, the language model's loss, and the value after each token.

        Args:
            input_ids: Tokens.
            past_key_values: Cache of earlier tokens.
            attention_mask: 1 at tokens, 0 at padding; position ids follow from it, so padding may be on the left.
            return_past_key_values: Whether to append the cache to the result.
            kwargs: Passed on to the language model; `labels` makes it compute its loss.

        Returns:
            Logits [batch, time, vocabulary], float32 at least; loss or None; values [batch, time]; any cache requested.
        """
        past = {} if past_key_values is None else {loading.cache_argument(self.pretrained_model): past_key_values}
        output = self._run(input_ids, attention_mask, **past, **kwargs)
        hidden = (output.decoder_hidden_states if self.is_encoder_decoder else output.hidden_states)[-1]
        values = self.v_head(hidden.to(self.v_head.summary.weight.device)).squeeze(-1)
        logits = output.logits
        if self.is_sequential_parallel:
            logits = logits.to(values.device)
        if logits.dtype in (torch.float16, torch.bfloat16):
            logits = logits.float()
        if return_past_key_values:
            return logits, output.get("loss"), values, output.get("cache", output.get("past_key_values"))
        return logits, output.get("loss"), values

    def _run(self, input_ids: Tensor | None, attention_mask: Tensor | None, **kwargs: Any) -> Any:
        """Run the language model with hidden states, with position ids that do not count padding."""
        if self._takes_position_ids and attention_mask is not None and input_ids is not None:
            kwargs.setdefault("position_ids", loading.position_ids_from_mask(attention_mask)[:, -input_ids.shape[1] :])
        kwargs |= {"output_hidden_states": True, "return_dict": True}
        return self.pretrained_model(input_ids=input_ids, attention_mask=attention_mask, **kwargs)

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, Any] | None = None) -> None:
        """Enable gradient checkpointing: recompute activations in the backward pass (in training mode)."""
        loading.set_gradient_checkpointing(self.pretrained_model, "enable", gradient_checkpointing_kwargs)

    def gradient_checkpointing_disable(self) -> None:
        """Disable gradient checkpointing."""
        loading.set_gradient_checkpointing(self.pretrained_model, "disable")

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The language model's own `generate`."""
        return self.pretrained_model.generate(*args, **kwargs)

    def compute_reward_score(
        self, input_ids: Int[Tensor, "batch time"], attention_mask: Tensor | None = None, **kwargs: Any
    ) -> Float[Tensor, "batch time labels"]:
        """Scores of the reward adapter after each token; the score of a text is that at its last token.

        The active adapter, the `requires_grad` flags and the training mode are restored afterwards.

        Raises:
            ValueError: The model was loaded without `reward_adapter`.
        """
        if not self.supports_rm_adapter or self.rm_adapter_name is None:
            raise ValueError(
                "This model does not support reward modeling adapter: it was loaded without one, so there is nothing "
                "to score with. Pass `reward_adapter='folder'` to from_pretrained."
            )
        model = self.pretrained_model
        with EvalMode(model), adapters.active_adapter(model, self.rm_adapter_name), torch.no_grad():
            output = self._run(input_ids, attention_mask, **kwargs)
            scores: Tensor = self.score(output.hidden_states[-1].to(self.score.weight.dtype))
        return scores

    def state_dict(self, *args: Any, prefix: str = "", **kwargs: Any) -> Any:
        """The language model's entries without prefix, and `v_head.*`: a plain transformers model can load it."""
        state = self.pretrained_model.state_dict(*args, prefix=prefix, **kwargs)
        head = self.v_head.state_dict(prefix=prefix + VALUE_HEAD_PREFIX, keep_vars=kwargs.get("keep_vars", False))
        state.update(head)
        return state

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        """Add the prefix `pretrained_model.` that `state_dict()` leaves out."""
        for name in [name for name in state_dict if name.startswith(prefix)]:
            key = name.removeprefix(prefix)
            if key.split(".", 1)[0] not in WRAPPER_MODULES:
                state_dict[f"{prefix}pretrained_model.{key}"] = state_dict.pop(name)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], *, state_dict: dict[str, Tensor] | None = None, **kwargs: Any
    ) -> None:
        """Write a folder that loads as this class and as a plain transformers model (or PEFT adapter).

        The value head is saved in the model's safetensors as `v_head.*`; with an adapter, in a separate
        `pytorch_model.bin`.

        Args:
            save_directory: Created if missing. Of an earlier policy saved there, nothing is loaded any more.
            state_dict: Instead of `self.state_dict()`, for weights gathered from several processes.
            kwargs: Passed on to the language model's `save_pretrained`, such as `max_shard_size`.
        """
        state = dict(self.state_dict() if state_dict is None else state_dict)
        if kwargs.get("is_main_process", True):
            critic.forget_earlier_parts(self, Path(save_directory))
        if not self.is_peft_model:
            save_language_model(self.pretrained_model, save_directory, state_dict=state, **kwargs)
            return
        if kwargs.get("is_main_process", True):
            write_value_head(Path(save_directory), state)
        selected = adapters.adapters_to_save(self.pretrained_model, str(self.policy_adapter_name))
        settings = {"selected_adapters": selected, **kwargs}
        self.pretrained_model.save_pretrained(os.fspath(save_directory), state_dict=state, **settings)

    def push_to_hub(
        self, repo_id: str, commit_message: str = "Upload model with value head", **kwargs: Any
    ) -> CommitInfo:
        """Upload the output of `save_pretrained(**kwargs)` to `repo_id`, created if missing (`private`, `token`)."""
        api = HfApi(token=kwargs.pop("token", None))
        repo_id = api.create_repo(repo_id, private=kwargs.pop("private", None), exist_ok=True).repo_id
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, **kwargs)
            return api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=commit_message)


class AutoModelForCausalLMWithValueHead(PreTrainedModelWrapper):
    """A causal language model with a value head."""


class AutoModelForSeq2SeqLMWithValueHead(PreTrainedModelWrapper):
    """An encoder-decoder language model with a value head on its decoder."""

    transformers_parent_class = AutoModelForSeq2SeqLM
    is_encoder_decoder = True


SUPPORTED_ARCHITECTURES = (AutoModelForCausalLMWithValueHead, AutoModelForSeq2SeqLMWithValueHead)
