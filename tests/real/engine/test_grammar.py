"""Structured outputs in the engine: what comes is what the grammar says, whatever else is asked, whoever else runs, wherever it began."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pdlab.core.types import UsageError
from pdlab.real.engine.grammar import GrammarError, Grammars
from pdlab.real.engine.load import load
from pdlab.real.engine.messages import Receive, Sampling, Source, StructuredOutputs, Vocabulary
from pdlab.real.engine.options import EngineOptions
from pdlab.real.engine.sampler import SamplerRow, sample
from pdlab.real.models.gguf_file import default_model
from pdlab.real.models.tokenizer import Tokenizer
from tests.support import served
from tests.support.engine_driver import Driver
from tests.support.engine_nodes import Node, node, submit, until

BYTES = Vocabulary([bytes([byte]) for byte in range(256)] + [b"<eos>", b"<start>", b"<end>"], [256, 257, 258], (served.EOS,))
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 5}, "age": {"type": "integer", "minimum": 0, "maximum": 150}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
PERSON = StructuredOutputs(json=json.dumps(SCHEMA), disable_any_whitespace=True)
TAG_CONTENT = {"type": "json_schema", "json_schema": {"enum": [1, 2]}}
PROMPT = list(b"Who is it?")


@pytest.fixture(scope="module")
def bytes_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return served.make(tmp_path_factory.mktemp("bytes"))


def driver_of(model: Path, **options: object) -> Driver:
    given = {"block_tokens": 4, "kv_blocks": 400, "max_batch_tokens": 64, "max_seqs": 16, "threads": 1, **options}
    engine = load(EngineOptions(model=str(model), eos_ids=(served.EOS,), **given)).engine  # type: ignore[arg-type]
    engine.grammars = Grammars(BYTES)
    return Driver(engine)


def text(tokens: list[int]) -> str:
    return bytes(token for token in tokens if token < 256).decode("utf-8", "strict")


def is_person(tokens: list[int]) -> bool:
    assert tokens[-1] == served.EOS, text(tokens)
    person = json.loads(text(tokens))
    return set(person) == {"name", "age"} and isinstance(person["name"], str) and 0 <= person["age"] <= 150


@pytest.mark.parametrize("temperature", [0.0, 1.0, 2.0])
def test_every_candidate_is_what_the_schema_says(temperature: float, bytes_model: Path) -> None:
    d = driver_of(bytes_model)
    d.submit(0, PROMPT, Sampling(max_tokens=300, temperature=temperature, seed=3, best_of=4, logprobs=2, structured=PERSON))
    d.run()
    assert [d.finish[0, i] for i in range(4)] == ["stop"] * 4
    assert all(is_person(d.tokens[0, i]) for i in range(4))
    if temperature:
        assert len({text(d.tokens[0, i]) for i in range(4)}) > 1
    for output in d.outputs[0, 0]:
        assert output.logprobs is not None and output.top is not None
        assert len(output.top[0]) == 2  # the model's own likeliest, whatever the grammar allows


CASES = [
    (StructuredOutputs(regex=r"[a-f]{3}/\d{2}"), r"[a-f]{3}/[0-9]{2}"),
    (StructuredOutputs(choice=("yes", "no, never", 'a "quote"')), r'yes|no, never|a "quote"'),
    (StructuredOutputs(grammar='root ::= "x" ([0-9] | "é"){2,4} "!"'), r"x[0-9é]{2,4}!"),
    (StructuredOutputs(grammar='start: "x" DIGITS "!"\nDIGITS: /[0-9]{2,4}/'), r"x[0-9]{2,4}!"),
    (StructuredOutputs(grammar='%llguidance {"no_forcing": false}\nstart: "forced" /[0-9]/'), r"forced[0-9]"),
]


@pytest.mark.parametrize(("structured", "pattern"), CASES, ids=["regex", "choice", "gbnf", "lark", "forcing"])
def test_other_grammars(structured: StructuredOutputs, pattern: str, bytes_model: Path) -> None:
    d = driver_of(bytes_model)
    d.submit(0, PROMPT, Sampling(max_tokens=60, temperature=0.0, structured=structured))
    d.submit(1, PROMPT, Sampling(max_tokens=60, seed=1, structured=structured))
    d.run()
    for id in (0, 1):
        assert d.finish[id, 0] == "stop"
        assert re.fullmatch(pattern, text(d.tokens[id, 0]))


def triggered(content: Mapping[str, Any] = TAG_CONTENT, **more: Any) -> StructuredOutputs:
    """As xgrammar writes a structural tag now."""
    tags = [{"type": "tag", "begin": "<f>", "content": content, "end": "</f>"}]
    return StructuredOutputs(structural_tag=json.dumps({"format": {"type": "triggered_tags", "triggers": ["<"], "tags": tags, **more}}))


def test_any_json_object_and_a_structural_tag(bytes_model: Path) -> None:
    tag = {"structures": [{"begin": "<f>", "schema": {"enum": [1, 2]}, "end": "</f>"}], "triggers": ["<"]}
    d = driver_of(bytes_model)
    bias = {ord("}"): 60.0, ord('"'): 5.0}
    d.submit(0, PROMPT, Sampling(max_tokens=200, temperature=0.0, logit_bias=bias, structured=StructuredOutputs(json_object=True)))
    begin = {ord("<"): 100.0}
    for id, tagged in ((1, StructuredOutputs(structural_tag=json.dumps(tag))), (2, triggered())):
        d.submit(id, PROMPT, Sampling(max_tokens=40, temperature=0.0, logit_bias=begin, ignore_eos=True, structured=tagged))
    d.run()
    assert d.tokens[2, 0] == d.tokens[1, 0]
    assert isinstance(json.loads(text(d.tokens[0, 0])), dict)
    assert re.match(r"<f>[12]</f><f>[12]", text(d.tokens[1, 0]))


def test_others_in_the_batch_get_the_tokens_they_get_alone(bytes_model: Path) -> None:
    free = [Sampling(max_tokens=40, temperature=0.0), Sampling(max_tokens=40, seed=8)]
    alone = []
    for sampling in free:
        d = driver_of(bytes_model)
        d.submit(0, PROMPT, sampling)
        d.run()
        alone.append(d.tokens[0, 0])
    d = driver_of(bytes_model)
    for id, sampling in enumerate(free):
        d.submit(id, PROMPT, sampling)
    d.submit(2, PROMPT, Sampling(max_tokens=300, seed=1, structured=PERSON))
    d.run()
    assert [d.tokens[0, 0], d.tokens[1, 0]] == alone
    assert is_person(d.tokens[2, 0])


def test_steps_in_a_row_without_asking_the_scheduler_follow_the_grammar(bytes_model: Path) -> None:
    d = driver_of(bytes_model)
    d.submit(0, PROMPT, Sampling(max_tokens=300, temperature=0.0, structured=PERSON))
    asked = 0
    while not d.engine.idle:
        d.step()
        asked += 1
    assert is_person(d.tokens[0, 0])
    assert asked < len(d.tokens[0, 0]) / 3, "the batch was not repeated"


def test_preempted_sequences_go_on_where_they_were(bytes_model: Path) -> None:
    def outputs(**options: object) -> tuple[list[list[int]], int]:
        d = driver_of(bytes_model, **options)
        for id in range(6):
            d.submit(id, [id] * 20, Sampling(max_tokens=80, seed=id, structured=StructuredOutputs(regex=r"([a-z]{7},){5}")), cached=False)
        d.run()
        return [d.tokens[id, 0] for id in range(6)], d.engine.scheduler.preemptions

    roomy, none = outputs()
    tight, some = outputs(kv_blocks=40)
    assert none == 0 and some > 0
    assert tight == roomy


def test_limits_and_stops_hold_beside_a_grammar(bytes_model: Path) -> None:
    d = driver_of(bytes_model)
    yes = StructuredOutputs(choice=("yes",))
    asked = {
        0: Sampling(max_tokens=2, temperature=0.0, structured=yes),
        1: Sampling(max_tokens=20, min_tokens=10, temperature=0.0, structured=yes),  # the grammar ends first
        2: Sampling(max_tokens=20, min_tokens=10, temperature=0.0, structured=StructuredOutputs(regex="a*")),
        3: Sampling(max_tokens=20, ignore_eos=True, temperature=0.0, structured=yes),
        4: Sampling(max_tokens=12, ignore_eos=True, temperature=0.0, structured=StructuredOutputs(regex="a*")),
        5: Sampling(max_tokens=20, stop_token_ids=(ord("e"),), temperature=0.0, structured=yes),
        6: Sampling(max_tokens=20, temperature=0.0, logit_bias={ord("y"): -100.0}, repetition_penalty=2.0, structured=yes),
        7: Sampling(max_tokens=20, top_k=1, min_p=0.9, top_p=0.1, seed=1, structured=yes),
    }
    for id, sampling in asked.items():
        d.submit(id, PROMPT, sampling)
    d.run()
    found = {id: (text(d.tokens[id, 0]), d.finish[id, 0]) for id in asked}
    assert found[0] == ("ye", "length")
    assert found[1] == found[3] == found[6] == found[7] == ("yes", "stop")
    assert found[5] == ("ye", "stop")
    assert found[4] == ("a" * 12, "length")
    assert len(found[2][0]) >= 10


def test_a_grammar_that_gets_lost_ends_its_request_alone(bytes_model: Path) -> None:
    d = driver_of(bytes_model)
    d.submit(0, PROMPT, Sampling(max_tokens=30, temperature=0.0))
    d.submit(1, PROMPT, Sampling(max_tokens=30, temperature=0.0, structured=StructuredOutputs(regex="[a-z]{30}")))
    d.step()
    d.engine.groups[1][0].row.grammar.count(ord("7"))  # type: ignore[union-attr]
    d.run()
    assert d.finish == {(0, 0): "length", (1, 0): "error"}
    assert d.outputs[1, 0][-1].error == "the grammar does not allow token 55 here"
    d.submit(2, PROMPT, Sampling(max_tokens=3, temperature=0.0, structured=StructuredOutputs(regex="[a-z]{3}")))
    d.run()
    assert d.finish[2, 0] in ("length", "stop")


def test_without_a_vocabulary_it_is_refused(bytes_model: Path) -> None:
    d = driver_of(bytes_model)
    d.engine.grammars = None
    d.submit(0, PROMPT, Sampling(max_tokens=3, structured=PERSON))
    d.run()
    assert d.outputs[0, 0][-1].error == "structured outputs need the vocabulary, which this engine was not told"


# ---------------------------------------------------------------- from one engine to another


def _alone(model: Path, sampling: Sampling) -> list[int]:
    d = driver_of(model)
    d.submit(0, PROMPT, sampling)
    d.run()
    return d.tokens[0, 0]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_it_goes_on_at_another_engine(temperature: float, bytes_model: Path) -> None:
    """After prefill elsewhere, in the middle, and anew without any KV."""
    sampling = Sampling(max_tokens=300, temperature=temperature, seed=5, structured=PERSON)
    expected = _alone(bytes_model, sampling)
    assert is_person(expected)
    options = EngineOptions(model=str(bytes_model), block_tokens=4, kv_blocks=400, threads=1, eos_ids=(served.EOS,))
    with node("p", options) as p, node("d", options) as d:
        for one in (p, d):
            one.engine.grammars = Grammars(BYTES)
        p.tell(submit(0, PROMPT, sampling, decodes_here=False))
        until(lambda: p.finish(0) == "held", p, d)
        (first,) = p.tokens(0)
        assert first == expected[0]
        held = p.kv_service.lending.lent
        (lease,) = held
        kv = p.kv_service.exchange.lease(0)
        d.tell(Receive(submit(1, PROMPT, sampling), [first], Source(p.descriptor, lease, kv.blocks, kv.kv_tokens)))
        d.tell(Receive(submit(2, PROMPT, sampling), expected[:9], Source(b"", "", [], 0)))
        until(lambda: d.finish(1) and d.finish(2), p, d)
        assert d.tokens(1) == expected[1:]
        assert d.tokens(2) == expected[9:]
        _breaks_off(d, sampling)


def _breaks_off(d: Node, sampling: Sampling) -> None:
    """Tokens that the grammar cannot have made."""
    d.tell(Receive(submit(3, PROMPT, sampling), [ord("?")], Source(b"", "", [], 0)))
    until(lambda: d.finish(3), d)
    assert d.error(3) == "the grammar does not allow token 63 here"


# ---------------------------------------------------------------- the mask


LETTERS = Vocabulary([b"a", b"b", b"c", b"ab", b"<eos>"], [4], (4,))


@given(st.lists(st.sampled_from(["a", "b", "c", None]), min_size=1, max_size=6), st.integers(0, 99), st.sampled_from([0.0, 0.5, 1.0]))
def test_rows_with_a_grammar_get_a_token_it_allows_and_the_others_are_as_without(
    grammars: list[str | None], seed: int, temperature: float
) -> None:
    compiled = Grammars(LETTERS)
    logits = torch.randn(len(grammars), 7, generator=torch.Generator().manual_seed(seed))  # a padded vocabulary

    def row(letter: str | None) -> SamplerRow:
        matcher = None if letter is None else compiled.matcher(StructuredOutputs(regex=f"{letter}+"))
        return SamplerRow(Sampling(temperature=temperature), random.Random(seed), (4,), grammar=matcher)

    before = logits.clone()
    rows = [row(letter) for letter in grammars]
    free = sample(logits, [row(None) for _ in grammars])
    for letter, one, without in zip(grammars, sample(logits, rows), free, strict=True):
        if letter is None:
            assert one.token == without.token
        else:
            assert LETTERS.tokens[one.token].decode() == letter
    assert torch.equal(logits, before)


def test_no_special_token_is_text_for_the_embedded_models_vocabulary() -> None:
    try:
        tokenizer = Tokenizer.load(default_model())
    except UsageError as missing:
        pytest.skip(str(missing))
    tokens = [tokenizer.piece_bytes(id) for id in range(tokenizer.vocab)]
    grammars = Grammars(Vocabulary(tokens, sorted(tokenizer.special_ids), tuple(sorted(tokenizer.eos_ids))))
    said = json.dumps({"name": "Zoë 😀 \\ é", "age": 36}, ensure_ascii=False)
    matcher = grammars.matcher(StructuredOutputs(json=json.dumps({**SCHEMA, "properties": {"name": {"type": "string"}, "age": {}}})))
    words = np.zeros(grammars.words, np.int32)
    for token in tokenizer.encode(said, special=False):
        matcher.fill(words)
        allowed = set(np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little")).tolist())
        assert token in allowed
        assert not allowed & tokenizer.special_ids
        matcher.count(token)
    matcher.fill(words)
    assert set(np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little")).tolist()) == set(tokenizer.eos_ids)


@pytest.mark.parametrize(
    ("structured", "reason"),
    [
        (StructuredOutputs(json="{"), "truncated"),
        (StructuredOutputs(json="[1]"), "object"),
        (StructuredOutputs(json='{"type": "objekt"}'), "Invalid type: objekt"),
        (StructuredOutputs(json='{"not": {}}'), 'Unimplemented keys: ["not"]'),
        (StructuredOutputs(json='{"$ref": "#/$defs/x"}'), "does not exist"),
        (StructuredOutputs(json='{"a":' * 3000 + "1" + "}" * 3000), "deep"),
        (StructuredOutputs(regex="(a"), "unclosed group"),
        (StructuredOutputs(regex="(?=a)b"), "look-around"),
        (StructuredOutputs(grammar='start: "a" other'), 'unknown name: "other"'),
        (StructuredOutputs(grammar="hello"), "Expected ::="),
        (StructuredOutputs(grammar="start: start"), "allows no text"),
        (StructuredOutputs(structural_tag="{}"), "structures"),
        (StructuredOutputs(structural_tag='{"format": {}}'), "format must be triggered_tags, not 'None'"),
        (StructuredOutputs(structural_tag='{"format": {"type": "any_text"}}'), "format must be triggered_tags, not 'any_text'"),
        (triggered(at_least_one=True), "at_least_one is not had here"),
        (triggered(content={"type": "regex"}), "the content of tag '<f>' must be a json_schema, not 'regex'"),
        (triggered(excludes=["x"]), "unknown field `excludes`"),
        (StructuredOutputs(structural_tag='{"format": {"type": "triggered_tags"}}'), "needs structures"),
        (StructuredOutputs(structural_tag='{"structures": [{"begin": "<f>", "end": ""}], "triggers": ["<g"]}'), "none of the triggers"),
        (StructuredOutputs(choice=()), "names no"),
    ],
)
def test_what_is_no_grammar_is_told_in_one_line(structured: StructuredOutputs, reason: str) -> None:
    with pytest.raises(GrammarError, match=re.escape(reason)) as caught:
        Grammars(BYTES).matcher(structured)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


def test_options_of_json() -> None:
    loose = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"properties": {"c": {}}}}}
    grammars = Grammars(BYTES)

    def takes(text: str, **options: object) -> bool:
        matcher = grammars.matcher(StructuredOutputs(json=json.dumps(loose), **options))  # type: ignore[arg-type]
        for token in text.encode():
            matcher.count(token)
        return not matcher.error

    assert takes('{ "a": 1, "x": 2}')
    assert not takes('{ "a"', disable_any_whitespace=True)
    assert takes('{   "a"') and not takes('{   "a"', whitespace_pattern=" ") and takes('{ "a"', whitespace_pattern=" ")
    assert not takes('{"a": 1, "x"', disable_additional_properties=True)
    assert takes('{"a": 1, "b": {"c": 1}}', disable_additional_properties=True)
    assert not takes('{"b": {"d"', disable_additional_properties=True)
    assert not takes('{"a":' + " " * 65)
