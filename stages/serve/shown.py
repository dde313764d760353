"""What a client sees of one answer: the model's text as the guard lets it go, and the log-probabilities of what was let go as it is."""

from __future__ import annotations

from dataclasses import dataclass, field

from stages.serve.guard.outgoing import Watch
from stages.serve.jobs import Job
from stages.serve.steering import TokenLogprob


@dataclass(kw_only=True)
class Shown:
    """One answer on its way out; the thread that makes the answer writes it."""

    watch: Watch
    logprobs: list[TokenLogprob] = field(default_factory=list)
    """Of tokens that were let go; those of a masked part are withheld, and so is the token in which it begins or ends."""
    over: bool = False
    """The client has been told that it is the end."""

    def __post_init__(self) -> None:
        self._said = 0
        self._spans: list[tuple[int, int]] = []
        self._told = 0

    @property
    def text(self) -> str:
        """All that was let go."""
        return self.watch.text

    def push(self, job: Job, piece: str) -> str:
        """Take what the model said; returns what may be shown now."""
        self._count(job, piece)
        given = self.watch.push(piece)
        self._tell(job)
        return given

    def finish(self, job: Job) -> str:
        """The model says no more; returns the rest."""
        self._count(job, "")
        given = self.watch.finish()
        self._tell(job)
        return given

    def _count(self, job: Job, piece: str) -> None:
        """Note where the text of each token stands; tokens that came out together share their place."""
        before = self._said
        self._said += len(piece)
        if job.logprobs:  # not of a stop text, which is no part of the answer
            self._spans += [(before, self._said)] * (min(job.text.made_of(self._said), len(job.logprobs)) - len(self._spans))

    def _tell(self, job: Job) -> None:
        if self.watch.refused:
            return
        for begin, end in self._spans[self._told :]:
            if end > self.watch.settled:
                break
            if not any(start < end and begin < last for start, last in self.watch.masked):
                self.logprobs.append(job.logprobs[self._told])
            self._told += 1
