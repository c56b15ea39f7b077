"""What the parts of the simulated world share: its instances, the requests on their way, and the one way to tell the router."""

from __future__ import annotations

import simpy

from pdlab.core.sequence import Sequence
from pdlab.core.teller import Teller
from pdlab.core.types import AnyEvent, Left, Refused, Stage
from pdlab.sim.calls import call_later
from pdlab.sim.due_call import DueCall
from pdlab.sim.job import Job
from pdlab.sim.worker import SimInstance


class Scene:
    """`asking_s`: until the router has an instance's answer; `detect_s`: until it knows that nobody answers any more. Whoever makes a scene
    gives it its `teller`."""

    teller: Teller

    def __init__(self, env: simpy.Environment, asking_s: float, detect_s: float) -> None:
        self.env = env
        self.asking_s, self.detect_s = asking_s, detect_s
        self.instances: dict[str, SimInstance] = {}  # the present incarnation of each
        self.jobs: dict[int, Job] = {}  # by request id, which is its index in the workload
        self.silent_until_s: dict[str, float] = {}  # instances whose reports are lost
        self.late_until_s: dict[str, tuple[float, float]] = {}  # whose reports are late: until when, by how much
        self.longer: dict[str, tuple[float, float]] = {}  # instances that are slow: SimInstance.longer and decode_longer
        self.deaths: dict[SimInstance, dict[int, int]] = {}  # who was killed, and nobody knows: what clients have of what it served

    def tell(self, event: AnyEvent) -> None:
        """Give an event to the router, and perform what it answers, in order; within another event's actions, after these."""
        self.teller.tell(event, self.env._now)

    def slow_down(self, name: str, longer: float, decode_longer: float) -> None:
        """`SimInstance.slow_down` of an instance, and of its later incarnations."""
        self.longer[name] = longer, decode_longer
        self.instances[name].slow_down(longer, decode_longer)

    def asked(self, instance: SimInstance) -> None:
        """Something is asked of one that has died, and who asks will know."""
        if instance in self.deaths:
            call_later(self.env, self.detect_s, lambda _: self.is_known(instance))

    def is_known(self, instance: SimInstance, *, died: bool = True) -> None:
        """That it has died, or lost its place; nothing where that is known already."""
        sent = self.deaths.pop(instance, None)
        if sent is not None:
            self.tell(Left(instance.name, instance.spec.incarnation, sent, died))

    def refuse(self, job: Job, d: SimInstance) -> None:
        """That instance has no room: known when it has been asked."""
        call_later(self.env, self.asking_s, self._refused, (job, job.attempt, d))

    def _refused(self, event: DueCall) -> None:
        job, attempt, d = event.value
        if d.alive and job.attempt == attempt and not job.done:
            self.tell(Refused(job.request.id, attempt, d.name))

    def drop(self, job: Job, instance: SimInstance, seq: Sequence) -> None:
        """Take a sequence off an instance, at the next step boundary if it may be in the step under way."""
        instance.jobs.pop(job, None)
        if instance.alive:
            instance.abort(seq)

    def client_tokens(self, job: Job) -> int:
        """Tokens of this attempt that its client has."""
        seq = job.active
        if seq is None:
            return 0
        if job.dseq is None and not seq.decodes_here and job.samples_anew:
            return 0  # the prefill instance's token is dropped
        where = job.d if job.d is not None else job.p
        made = where.made_by_now(seq) if where is not None else seq.made
        if job.dseq is not None and job.stage < Stage.LEASED:
            return 0  # reserved, but the prompt is not computed yet
        return made
