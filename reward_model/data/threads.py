"""Make rankings from trees of messages, as OpenAssistant publishes them."""

from collections.abc import Iterator, Mapping
from typing import Any

from reward_model.data.rows import BadRow, Row

_ROLES = {"prompter": "user", "assistant": "assistant", "user": "user", "system": "system"}


class MessageThreads:
    """Messages by their id; each message whose replies are ranked becomes a ranking."""

    def __init__(self) -> None:
        self.alone = 0
        """Messages with fewer than two ranked replies of the assistant, or with an unknown beginning."""
        self._messages: dict[str, dict[str, Any]] = {}

    def add(self, row: Row, where: str, group: str = "") -> None:
        """Add a message, or a whole tree, with the group it is held out with; a BadRow if text or role is missing."""
        if isinstance(row.get("prompt"), Mapping):
            self._add_tree(row["prompt"], None, where, group, levels=200)
        else:
            self._add(row, row.get("parent_id"), where, group)

    def rankings(self) -> Iterator[tuple[str, Row]]:
        """Yield (location, row) of a ranking for each message with two or more ranked replies."""
        replies: dict[str, list[dict[str, Any]]] = {}
        for message in self._messages.values():
            if message["role"] == "assistant" and message["rank"] is not None and not message["deleted"]:
                replies.setdefault(message["parent"], []).append(message)
        for parent, ranked in replies.items():
            path = self._path(parent)
            ranks = [message["rank"] for message in ranked]
            if path is None or len(ranked) < 2 or len(set(ranks)) < 2:
                self.alone += 1
                continue
            texts = [[{"role": "assistant", "content": message["text"]}] for message in ranked]
            first = ranked[0]
            ranking = {"prompt": path, "completions": texts, "ranks": ranks}
            yield first["where"], {**ranking, "source": first["lang"], "group": first["group"]}

    def _add_tree(self, node: Any, parent: str | None, where: str, group: str, *, levels: int) -> None:
        if not isinstance(node, Mapping) or not levels:
            raise BadRow(f"{where}: the tree must hold messages of at most 200 levels, got {node!r:.60}.")
        self._add(node, parent, where, group)
        for reply in node.get("replies") or []:
            self._add_tree(reply, node.get("message_id"), where, group, levels=levels - 1)

    def _add(self, row: Row, parent: Any, where: str, group: str) -> None:
        role, text = _ROLES.get(str(row.get("role"))), row.get("text")
        if role is None or not isinstance(text, str) or not text.strip():
            raise BadRow(
                f"{where}: a message needs 'text' and a 'role' of {sorted(_ROLES)}, got {text!r:.40} and "
                f"{row.get('role')!r:.40}."
            )
        rank = row.get("rank")
        if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int | float) or rank != rank):
            raise BadRow(f"{where}: field 'rank' must be a number, got {rank!r:.40}.")
        lang = row.get("lang")
        self._messages[str(row.get("message_id"))] = {
            "role": role, "text": text, "rank": rank, "parent": None if parent is None else str(parent),
            "deleted": row.get("deleted") is True, "where": where, "lang": lang if isinstance(lang, str) else None,
            "group": group,
        }  # fmt: skip

    def _path(self, key: str | None) -> list[dict[str, str]] | None:
        """The conversation that ends with message `key`; None if its beginning is not there."""
        turns: list[dict[str, str]] = []
        while key is not None:
            message = self._messages.get(key)
            if message is None or len(turns) > 1000:
                return None
            turns.append({"role": message["role"], "content": message["text"]})
            key = message["parent"]
        return turns[::-1] or None
