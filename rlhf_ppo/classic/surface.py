"""Methods of the classic trainer around `step()`: generation, dataloader, logging, saving."""

import inspect
import tempfile
import warnings
from collections.abc import Callable, Iterable, Mapping, Sized
from pathlib import Path
from typing import Any

import datasets
import torch
from huggingface_hub import HfApi
from torch import Tensor, nn
from torch.utils.data import DataLoader

from rlhf_ppo.classic.generate import generate_responses
from rlhf_ppo.classic.helpers import Rewards, reward_totals
from rlhf_ppo.classic.inner_methods import ClassicInnerMethods
from rlhf_ppo.learner.model_card import write_model_card

_EXTRA_COLUMNS = ("label", "query", "response")


class ClassicSurface(ClassicInnerMethods):
    """Methods of `PPOTrainer` besides `step` and `train`, with the names of the classic trainer."""

    compare_step: int = 0
    """Number of steps under `push_to_hub_if_best_kwargs`."""
    highest_reward: float = -float("inf")
    """Best mean score so far."""

    def generate(
        self,
        query_tensor: Tensor | list[Tensor],
        length_sampler: Callable[[], int] | None = None,
        batch_size: int = 4,
        return_prompt: bool = True,
        generate_ref_response: bool = False,
        **generation_kwargs: Any,
    ) -> Any:
        """Sample responses with the policy; keyword arguments are those of transformers' `generate`.

        Args:
            query_tensor: One Long [P], or a list of them, without padding.
            length_sampler: Called once per chunk of `batch_size` prompts; returns its `max_new_tokens`.
            batch_size: Prompts per chunk, if a list is given.
            return_prompt: Whether a response begins with its prompt.
            generate_ref_response: Also sample from the reference.

        Returns:
            A [1, L] tensor for a tensor, a list of 1-D tensors for a list; a pair (policy, reference) if asked for.
        """
        self.trackers.begin()  # of a loop of the user's own, which may use the tracker's package itself
        settings = {
            "length_sampler": length_sampler, "batch_size": batch_size, "return_prompt": return_prompt,
            **generation_kwargs,
        }  # fmt: skip
        sampling = self.precision.sampling(self.current_device)
        with sampling, self.gathered_parameters():
            responses = self._generate_batched(self.model, query_tensor, **settings)
        if not generate_ref_response:
            return responses
        sampling = self.precision.sampling(self.current_device)
        with sampling, self.gathered_parameters(of_reference=True), self.reference_context():
            ref_responses = self._generate_batched(self.reference_model, query_tensor, **settings)
        return responses, ref_responses

    def _generate_batched(self, model: nn.Module, query_tensors: Tensor | list[Tensor], **settings: Any) -> Any:
        """`generate` with a given model; the settings are those of `generate_responses`."""
        settings = {"device": self.current_device, "kv_budget_bytes": self.config.kv_budget_bytes, **settings}
        return generate_responses(model, self.tokenizer, query_tensors, **settings)

    def prepare_dataloader(
        self, dataset: torch.utils.data.Dataset[Any] | datasets.Dataset, data_collator: Callable[..., Any] | None = None
    ) -> DataLoader[Any]:
        """A dataloader of shuffled, complete batches of `config.batch_size`, without unused columns."""
        if isinstance(dataset, datasets.Dataset):
            dataset = self._remove_unused_columns(dataset)
        streamed = isinstance(dataset, torch.utils.data.IterableDataset)
        if isinstance(dataset, Sized) and not streamed and len(dataset) < self.config.batch_size:
            raise ValueError(
                f"expected at least batch_size={self.config.batch_size} rows, got a dataset of {len(dataset)}: the "
                "dataloader would have no batch, as incomplete ones are left out. Lower batch_size, or add rows."
            )
        loader = DataLoader(
            dataset,
            batch_size=self.config.batch_size,
            collate_fn=data_collator,
            shuffle=not streamed,
            drop_last=True,
        )
        prepared: DataLoader[Any] = self.accelerator.prepare(loader)
        return prepared

    def log_stats(
        self,
        stats: Mapping[str, Any],
        batch: Mapping[str, Any],
        rewards: Rewards,
        columns_to_log: Iterable[str] = ("query", "response"),
    ) -> None:
        """Log the statistics of a step to the tracker, from the main process; adds `env/reward_*`.

        Args:
            stats: The result of `step`.
            batch: Columns of the batch, texts among them.
            rewards: One score per sample, or one per response token, whose sum is logged: what `step` takes, and
                numbers, lists, NumPy arrays.
            columns_to_log: Columns of the table `game_log` (Weights & Biases only).
        """
        scores = torch.tensor(self.processes.gather_objects(reward_totals(rewards)))
        columns = list(columns_to_log)
        table: list[list[Any]] = []
        if self.config.log_with == "wandb":
            if missing := [column for column in columns if column not in batch]:
                raise ValueError(
                    f"Columns to log {columns} are not present in the batch {list(batch)}: {missing} missing"
                )
            table = [self.processes.gather_objects(list(batch[column])) for column in columns]
        if not self.accelerator.is_main_process:
            return
        if "query" not in batch and "response" not in batch:
            warnings.warn(
                "The game logs will not be logged because the batch does not contain the keys 'query' and 'response'.",
                UserWarning,
                stacklevel=2,
            )
        logs = {name: value.float() if isinstance(value, Tensor) else value for name, value in stats.items()}
        logs["env/reward_mean"] = float(scores.mean())
        logs["env/reward_std"] = float(scores.std()) if len(scores) > 1 else 0.0
        logs["env/reward_dist"] = scores.numpy()
        if table:
            logs["game_log"] = _wandb_table([*columns, "reward"], [*table, scores.tolist()])
        self.current_step += 1
        self.trackers.log(logs, self.current_step, own_rows=False)

    def save_pretrained(
        self,
        save_directory: str | Path,
        *,
        config: Any = None,
        repo_id: str | None = None,
        push_to_hub: bool = False,
        **hub_arguments: Any,
    ) -> None:
        """Save model, value head, tokenizer and a model card; the folder also loads as a plain causal LM.

        Args:
            config: Must be None: the model's own is saved.
            repo_id: Where to push; None: the name of the folder.
            hub_arguments: For `push_to_hub`.

        Raises:
            ValueError: Arguments that nothing would read.
        """
        if config is not None or (hub_arguments and not push_to_hub):
            unread = ["config"] * (config is not None) + list(hub_arguments)
            raise ValueError(
                f"save_pretrained would not read {', '.join(unread)}: the model's own config is saved, and the others "
                "are for an upload. Leave them out, or pass push_to_hub=True."
            )
        self._save_pretrained(save_directory)
        if push_to_hub:
            self.push_to_hub(repo_id or Path(save_directory).name, **hub_arguments)

    def _save_pretrained(self, save_directory: str | Path) -> None:
        super().save_pretrained(save_directory)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str = "Push model using huggingface_hub.",
        private: bool | None = None,
        token: str | bool | None = None,
        branch: str | None = None,
        create_pr: bool | None = None,
        allow_patterns: list[str] | str | None = None,
        ignore_patterns: list[str] | str | None = None,
        delete_patterns: list[str] | str | None = None,
    ) -> None:
        """Upload what `save_pretrained` writes, to a repository that is created if missing.

        Every process calls it where parameters are sharded. The arguments are those of huggingface_hub's
        `ModelHubMixin.push_to_hub`.
        """
        with tempfile.TemporaryDirectory() as folder:
            self._save_pretrained(folder)
            if not self.accelerator.is_main_process:
                return
            api = HfApi(token=token)
            api.upload_folder(
                repo_id=api.create_repo(repo_id, private=private, exist_ok=True).repo_id, folder_path=folder,
                commit_message=commit_message, revision=branch, create_pr=create_pr, allow_patterns=allow_patterns,
                ignore_patterns=ignore_patterns, delete_patterns=delete_patterns,
            )  # fmt: skip

    def create_model_card(self, path: str, model_name: str | None = None) -> None:
        """Write `README.md` with what was trained and how to load it."""
        write_model_card(Path(path), model_name)

    def _push_if_best(self, scores: Tensor) -> None:
        """Push the policy, before its update, if the mean of these scores is the best so far."""
        settings: Any = self.config.push_to_hub_if_best_kwargs
        if not settings:
            return
        if self.compare_step % self.config.compare_steps == 0:
            total, count = self.processes.reduce_sum(torch.stack([scores.sum(), scores.new_tensor(len(scores))]))
            mean = float(total / count)
            if mean > self.highest_reward:
                self.highest_reward = mean
                self.push_to_hub(**settings)
        self.compare_step += 1

    def _remove_unused_columns(self, dataset: datasets.Dataset) -> datasets.Dataset:
        if not self.config.remove_unused_columns:
            return dataset
        known = {*inspect.signature(self.model.forward).parameters, *_EXTRA_COLUMNS}
        known |= set(inspect.signature(self.model.pretrained_model.forward).parameters)
        unused = [column for column in dataset.column_names if column not in known]
        if len(unused) == len(dataset.column_names):
            raise ValueError(
                f"none of the dataset's columns {dataset.column_names} is an argument of the model or one of "
                f"{_EXTRA_COLUMNS}: the dataloader would be empty. Tokenize first, or set remove_unused_columns=False."
            )
        return dataset.remove_columns(unused)


def _wandb_table(columns: list[str], values: list[list[Any]]) -> Any:
    import wandb  # only there when the tracker is

    return wandb.Table(columns=columns, rows=[list(row) for row in zip(*values, strict=True)])
