"""Multi-turn sessions: a turn's prompt is everything said so far plus something new, and it comes when the last answer has been read.

    sessions: {turns: 5, think_s: 10, system_prompt_tokens: 500, groups: 4}

`rate` counts requests, so sessions begin at rate / turns. `prompt` is what a turn adds. Each of the `groups` has a system prompt of its
own that all its sessions begin with; 0 tokens means none.
"""

from __future__ import annotations

from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Sessions(BaseModel):
    """`turns` is the mean of a geometric distribution, or with `fixed_turns` the number of every session; think times are exponential."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    turns: Annotated[float, Field(ge=1)] = 4.0
    fixed_turns: bool = False
    think_s: NotNegative = 10.0
    system_prompt_tokens: Annotated[int, Field(ge=0)] = 0
    groups: Annotated[int, Field(ge=1)] = 1
    max_context_tokens: Annotated[int, Field(ge=1)] = 32768


Columns = tuple[NDArray[np.float64], NDArray[np.int32], NDArray[np.int32], NDArray[np.int32], list[tuple[int, ...]]]


def unroll(
    sessions: Sessions,
    starts_s: NDArray[np.float64],
    turns: NDArray[np.int32],
    added: NDArray[np.int32],
    outputs: NDArray[np.int32],
    count: int,
    hash_tokens: int,
    rng: np.random.Generator,
) -> Columns:
    """Turn sessions into `count` requests: (arrival_s, prompt, output, after, hashes), first turns in order of arrival, each followed by its
    session's later turns; a session ends early where its context would exceed `max_context_tokens`. `added` and `outputs` are drawn
    upon turn by turn."""
    arrival_s: list[float] = []
    prompts: list[int] = []
    answers: list[int] = []
    after: list[int] = []
    hashes: list[tuple[int, ...]] = []
    groups = rng.integers(0, sessions.groups, len(starts_s))
    think_s = rng.exponential(sessions.think_s, count) if sessions.think_s else np.zeros(count)
    system_units = sessions.system_prompt_tokens // hash_tokens
    for session, start_s in enumerate(starts_s.tolist()):
        context, chain = sessions.system_prompt_tokens, [_unit(int(groups[session]), i, shared=True) for i in range(system_units)]
        for turn in range(int(turns[session])):
            row = len(prompts)
            if row == count:
                break
            prompt = context + int(added[row])
            context = prompt + int(outputs[row])
            if context > sessions.max_context_tokens and turn:
                break
            chain += [_unit(session, i, shared=False) for i in range(len(chain), context // hash_tokens)]
            arrival_s.append(float(think_s[row]) if turn else start_s)
            prompts.append(prompt)
            answers.append(int(outputs[row]))
            after.append(row - 1 if turn else -1)
            hashes.append(tuple(chain))
    return (
        np.array(arrival_s),
        np.array(prompts, np.int32),
        np.array(answers, np.int32),
        np.array(after, np.int32),
        hashes,
    )


def _unit(owner: int, index: int, *, shared: bool) -> int:
    """A name for the `index`-th unit of a session's context, or of a group's system prompt."""
    return (owner << 24 | index) << 1 | shared
