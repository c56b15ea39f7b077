"""Which column of a file is what: by the names of a published format, by names that everybody uses, or as the user says.

    workload: {source: my.csv, columns: {arrival_s: timestamp, prompt_tokens: input_tokens, output_tokens: answer}}

Names count alike whatever their case, spaces, dots and underscores. In JSON a name may be a path, such as `usage.prompt_tokens`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches

from pdlab.core.types import UsageError
from pdlab.workload.times import Unit, named_unit

REQUIRED = ("arrival_s", "prompt_tokens", "output_tokens")
LABELS = ("priority", "ttft_slo_s", "tpot_slo_s", "n", "best_of", "session", "tenant", "offline")
TURNS = ("session_id", "delay_s")
ROLES = (*REQUIRED, "gap_s", "hash_ids", *TURNS, *LABELS)
"""What a column can be; `gap_s`, the time since the row above, takes arrival_s' place; `after` and `hash_tokens` are of pdlab's own
format."""

# What is known by itself. Of several columns, those of an earlier row are meant; two of one row are for the user to choose from.
_ALIASES: dict[str, tuple[str, ...]] = {
    "arrival_s": (
        "arrivals arrivaltime arrival arrivaltimestamp arrivedat arrivalat arrivals requestarrivaltime requestarrivedat",
        "requesttime requesttimestamp requestat requeststart requeststarttime requeststarted submittime submittedat receivedat sentat",
        "starttime starttimes starttimestamp starttimeunix startedat start created createdat createdtime",
        "timestamp ts time datetime date timestamps times t",
    ),
    "prompt_tokens": (
        "prompttokens",
        "inputtokens numprefilltokens numprompttokens numinputtokens contexttokens prefilltokens requesttokens prompttokencount "
        "inputtokencount tokensprompt tokensin nprompttokens ninputtokens promptntokens inputntokens prompttoken inputtoken querytokens "
        "requestnumprefilltokens numtokensprompt numtokensinput",
        "promptlens inputlens",
        "promptlen promptlength inputlen inputlength prefilllen prefilllength promptsize promptsizes prefillsize inputsize "
        "inputsequencelength isl inputseqlen promptseqlen prompttokenslen",
    ),
    "output_tokens": (
        "outputtokens",
        "completiontokens generatedtokens numdecodetokens numoutputtokens numcompletiontokens numgeneratedtokens numgenerationtokens "
        "decodetokens responsetokens answertokens generationtokens outputtokencount completiontokencount responsetokencount "
        "generatedtokencount candidatestokencount tokenscompletion tokensout noutputtokens ncompletiontokens ngeneratedtokens "
        "outputtoken completiontoken gentokens requestnumdecodetokens numtokensoutput",
        "outputlens",
        "outputlen outputlength completionlen completionlength responselen responselength decodelen decodelength generationlen "
        "generationlength generatedlen generatedlength genlen outputsize decodesize tokensize tokensizes outputsequencelength "
        "osl outputseqlen",
    ),
    "gap_s": ("interarrivaltime interarrivaldelay interarrival interarrivals requestinterarrivaldelay",),
    "hash_ids": ("hashids blockhashes blockids prefixhashes",),
    "session_id": ("sessionid session conversationid",),
    "delay_s": ("delay thinktime",),
}
_KNOWN = {role: [tier.split() for tier in tiers] for role, tiers in _ALIASES.items()}


@dataclass(frozen=True, slots=True)
class Form:
    """A format: what it calls its columns. `time_unit`: of numbers too small for a year; `hash_tokens` behind an id of a prefix;
    `shuffled`: rows stand in the order in which requests ended; `failures`: a row without lengths is a request that failed."""

    name: str
    columns: Mapping[str, str]
    json: bool
    time_unit: Unit = "s"
    hash_tokens: int | None = None
    shuffled: bool = False
    failures: bool = False
    known_by: tuple[str, ...] = ()  # further names that only this one has


def _form(name: str, arrival_s: str, prompt_tokens: str, output_tokens: str, *, json: bool = False) -> Form:
    return Form(name, {"arrival_s": arrival_s, "prompt_tokens": prompt_tokens, "output_tokens": output_tokens}, json)


_TURNS = {"hash_ids": "hash_ids", "session_id": "session_id", "delay_s": "delay"}
_MOONCAKE = _form("mooncake", "timestamp", "input_length", "output_length").columns
_AIPERF = ("metadata.request_start_ns", "metrics.input_sequence_length.value", "metrics.output_sequence_length.value")
FORMS = {
    form.name: form
    for form in (
        _form("azure", "TIMESTAMP", "ContextTokens", "GeneratedTokens"),
        _form("burstgpt", "Timestamp", "Request tokens", "Response tokens"),
        _form("vidur", "arrived_at", "num_prefill_tokens", "num_decode_tokens"),
        _form("splitwise", "arrival_timestamp", "prompt_size", "token_size"),
        Form("bailian", {**_MOONCAKE, "hash_ids": "hash_ids"}, True, hash_tokens=16, known_by=("chat_id",)),
        Form("mooncake", {**_MOONCAKE, **_TURNS}, True, "ms"),
        Form("guidellm", {role: role for role in REQUIRED}, True, shuffled=True, failures=True),
        Form("aiperf", dict(zip(REQUIRED, _AIPERF, strict=True)), True, "ns", shuffled=True, failures=True),
    )
}


@dataclass(frozen=True, slots=True)
class Wanted:
    """What the user says of a file. `columns`: role to name; `time_unit` of its numbers; `hash_tokens` behind an id; `replaced`: roles
    that the file may lack, since something else takes their place."""

    columns: Mapping[str, str] = field(default_factory=dict)
    time_unit: Unit | None = None
    hash_tokens: int | None = None
    replaced: Collection[str] = ()


def plain(name: str) -> str:
    """A name without all that people spell in different ways."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


def form_of(names: Sequence[str], *, json: bool) -> Form | None:
    """The published format that has these columns."""
    lower = {name.lower() for name in names}
    for form in FORMS.values():
        paths = (*(form.columns[role] for role in REQUIRED), *form.known_by)
        if form.json is json and all(path.partition(".")[0].lower() in lower for path in paths):
            return form
    lengths = {"input_length", "output_length"} <= lower
    turns = lower & {"hash_ids", "session_id", "delay"}
    if lengths and turns and (json or "timestamp" in lower):
        return FORMS["mooncake"]  # in JSON, turns whose times are all delays; its columns in CSV
    return None


def known_columns(names: Sequence[str], taken: Mapping[str, str] | None = None) -> dict[str, str]:
    """Role to name, of the names that everybody uses, but for what is `taken` already. Raises UsageError, without a place, where two mean
    the same."""
    taken = taken or {}
    free, columns = [name for name in names if name not in taken.values()], {}
    for role, tiers in _KNOWN.items():
        for tier in () if role in taken else tiers:
            there = [name for name in free if any(spelled in tier for spelled in _spellings(name))]
            if len(there) > 1:
                raise UsageError(f"{' and '.join(there)} could both be {role}; say which with columns: {{{role}: {there[0]}}}")
            if there:
                columns[role] = there[0]
                break
    return columns


def _spellings(name: str) -> Iterator[str]:
    """A name, without the unit at its end, and the end of its path."""
    for part in (name, name.rpartition(".")[2]):
        yield plain(part)
        yield plain(named_unit(part)[0])


def parse_columns(words: Sequence[str]) -> dict[str, str]:
    """ROLE=NAME, several with commas between, as `pdlab trace --columns` takes them. Raises UsageError."""
    columns = {}
    for word in (part for words_ in words for part in words_.split(",")):
        role, equals, name = word.partition("=")
        if not equals or not name.strip():
            raise UsageError(f"--columns {word}: must be ROLE=NAME, such as arrival_s=timestamp")
        columns[role.strip()] = name.strip()
    if mistake := wrong_roles(columns):
        raise UsageError(f"--columns {mistake}")
    return columns


def wrong_roles(columns: Mapping[str, str]) -> str | None:
    """What is said of a role that there is none of."""
    for role in columns:
        if role not in ROLES:
            near = get_close_matches(role.lower(), ROLES, n=1, cutoff=0.5)
            return f"{role}: no column is that; {f'nearest is {near[0]}; ' if near else ''}there are {', '.join(ROLES)}"
    return None
