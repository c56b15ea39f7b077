"""The router's reply to an event, as its parts write it: actions, notices, and whom to blame where the policy is at fault."""

from __future__ import annotations

from pdlab.core.blame import blamed
from pdlab.core.policy import Policy
from pdlab.core.types import Action, Notice, UsageError
from pdlab.core.view import Cluster, Instance


class RouterReply:
    """`actions` are those of the event in hand, in order; each event begins a new list."""

    def __init__(self, policy: Policy, cluster: Cluster) -> None:
        self.policy, self.cluster = policy, cluster
        self.actions: list[Action] = []
        self._noticed: set[str] = set()

    def can(self, what: str, hook: str, *instances: Instance) -> bool:
        """Can each of them do what the policy's hook asks for? Who cannot is named, once."""
        unable = next((x for x in instances if not x.can(what)), None)
        if unable is not None:
            self.notice(f"{hook}: {unable.name} (engine {unable.spec.engine}) cannot {what}")
        return unable is None

    def notice(self, why: str) -> None:
        text = f"policy {type(self.policy).__name__}.{why}, so nothing is done"
        if text not in self._noticed:
            self._noticed.add(text)
            self.actions.append(Notice(text))

    def blame(self, hook: str, request_id: int | None, error: BaseException | str) -> UsageError:
        who, what = blamed(self.policy, hook, error)
        request = "" if request_id is None else f" for request {request_id}"
        return UsageError(f"{who}{request} at t={self.cluster.now:.6f} s {what}")
