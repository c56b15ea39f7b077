"""Multi-turn sessions: a turn's prompt is everything said so far plus something new, and it comes when the last answer has been read.

    sessions: {turns: 5, think_s: 10, system_prompt_tokens: 500, groups: 4}

`rate` counts requests, so sessions begin at rate / turns; where `max_context_tokens` ends many of them early, it is less. `prompt` is
what a turn adds. Each of the `groups` has a system prompt of its own that all its sessions begin with; 0 tokens means none.
"""

from __future__ import annotations

from array import array
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from pdlab.core.strict import Strict
from pdlab.workload.chains import Chains
from pdlab.workload.lengths import MOST, Tokens

NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Sessions(Strict):
    """`turns` is the mean of a geometric distribution, or with `fixed_turns` the number of every session; think times are exponential."""

    turns: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 4.0
    fixed_turns: bool = False
    think_s: NotNegative = 10.0
    system_prompt_tokens: Annotated[int, Field(ge=0, le=MOST)] = 0
    groups: Annotated[int, Field(ge=1)] = 1
    max_context_tokens: Tokens = 32768

    @property
    def mean_turns(self) -> float:
        return round(self.turns) if self.fixed_turns else self.turns


Columns = tuple[NDArray[np.float64], NDArray[np.int32], NDArray[np.int32], NDArray[np.int32], Chains]


def unroll(
    sessions: Sessions,
    starts_s: NDArray[np.float64],
    added: NDArray[np.int32],
    outputs: NDArray[np.int32],
    hash_tokens: int,
    rng: np.random.Generator,
) -> Columns:
    """Turn sessions into as many requests as `added` and `outputs`, [n], have: (arrival_s, prompt, output, after, hashes).

    A session's turns stand together, sessions in the order of their starts, of which n are always enough. A session ends early where its
    context would exceed `max_context_tokens`; its first turn is always there.
    """
    count = len(added)
    think_s = rng.exponential(sessions.think_s, count) if sessions.think_s else np.zeros(count)
    turns = np.full(len(starts_s), int(sessions.mean_turns)) if sessions.fixed_turns else rng.geometric(1 / sessions.turns, len(starts_s))
    system_units = sessions.system_prompt_tokens // hash_tokens
    groups = (rng.integers(0, sessions.groups, len(starts_s)) * system_units).tolist()
    times_s, prompts, after, hashes = array("d"), array("i"), array("i"), Chains()
    news, answers, thinks = added.tolist(), outputs.tolist(), think_s.tolist()
    row, unnamed = 0, sessions.groups * system_units  # ids below belong to the system prompts
    for start_s, group, most in zip(starts_s.tolist(), groups, turns.tolist(), strict=True):
        if row == count:
            break
        context = sessions.system_prompt_tokens
        for turn in range(min(most, count - row)):
            prompt = context + news[row]
            context = prompt + answers[row]
            if context > sessions.max_context_tokens and turn:
                break
            times_s.append(thinks[row] if turn else start_s)
            prompts.append(prompt)
            after.append(row - 1 if turn else -1)
            own_units = context // hash_tokens - system_units
            hashes.append_runs(((group, system_units), (unnamed, own_units)))
            row += 1
        unnamed += own_units
    return np.array(times_s), np.array(prompts, np.int32), outputs, np.array(after, np.int32), hashes
