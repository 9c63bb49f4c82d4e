"""Grammars on trial: what the engine may compile, what is refused, and what is stopped."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest
import pytest_asyncio

from serve.errors import BadRequest
from serve.grammars import GrammarTrial

pytestmark = pytest.mark.asyncio(loop_scope="module")
FIELDS = ("json", "regex", "choice", "grammar", "structural_tag")


def wanted(**given: Any) -> SimpleNamespace:
    """As much of vLLM's StructuredOutputsParams as is read."""
    return SimpleNamespace(**{**dict.fromkeys(FIELDS), **given})


def vocabulary() -> str:
    import xgrammar

    drawn = random.Random(0)
    words = {"".join(drawn.choices("abcdef xyz", k=drawn.randint(2, 9))) for _ in range(40_000)}
    tokens = ["</s>", *map(chr, range(32, 127)), *sorted(words)]
    told = xgrammar.TokenizerInfo(tokens, vocab_size=len(tokens), stop_token_ids=[0])
    return str(told.serialize_json())


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def trial() -> AsyncIterator[GrammarTrial]:
    made = GrammarTrial(vocabulary, largest=8000, seconds=1)
    yield made
    await made.close()


async def refusal(trial: GrammarTrial, **given: Any) -> BadRequest:
    with pytest.raises(BadRequest) as caught:
        await trial.check(wanted(**given))
    assert caught.value.param and "\n" not in str(caught.value)
    return caught.value


async def test_what_compiles_passes(trial: GrammarTrial) -> None:
    for given in (
        {"json": {"type": "object", "properties": {"a": {"type": "string"}}}},
        {"json": '{"type": "array", "items": {"type": "null"}, "minItems": 1000000}'},
        {"regex": "(a|b){1,100}"},
        {"choice": ['say "hi"', "back\\slash", "new\nline"]},
        {"grammar": 'root ::= root "a" | "b"'},
        {},
    ):
        await trial.check(wanted(**given))


async def test_what_is_no_schema_is_refused_with_the_compilers_reason(trial: GrammarTrial) -> None:
    assert 'Unsupported type "banana"' in str(await refusal(trial, json='{"type": "banana"}'))


async def test_what_never_ends_is_stopped_and_the_next_is_tried_again(trial: GrammarTrial) -> None:
    for given in ({"regex": "a?" * 2000}, {"grammar": "root ::= " + '[^"]? ' * 1000}):
        fault = await refusal(trial, **given)
        assert "QUANTSERVE_MAX_GRAMMAR_SECONDS" in str(fault)
        await trial.check(wanted(regex="[a-z]+"))


async def test_what_nothing_fits_is_refused(trial: GrammarTrial) -> None:
    for schema in ({"$ref": "#"}, {"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}):
        assert "nothing fits it" in str(await refusal(trial, json=schema))


async def test_a_verdict_is_remembered(trial: GrammarTrial) -> None:
    first = await refusal(trial, grammar='root ::= "a"\nroot ::= "b"')
    began = trial.tried
    again = await refusal(trial, grammar='root ::= "a"\nroot ::= "b"')
    assert str(again) == str(first) and "EBNF" in str(first)
    await trial.check(wanted(regex="[a-z]+"))
    await trial.check(wanted(regex="[a-z]+"))
    assert trial.tried <= began + 1


async def test_size_is_bounded_before_anything_is_tried() -> None:
    def never() -> str:
        raise AssertionError

    trial = GrammarTrial(never, largest=100, seconds=1)
    for given in ({"choice": ["x" * 10] * 20}, {"regex": "é" * 60}, {"json": {"a": "b" * 100}}):
        assert "at most 100 (QUANTSERVE_MAX_GRAMMAR_BYTES)" in str(await refusal(trial, **given))


async def test_without_a_vocabulary_nothing_is_tried() -> None:
    def none() -> str:
        raise ValueError("no tokenizer of a known kind")

    trial = GrammarTrial(none, largest=100, seconds=1)
    await trial.check(wanted(regex="a?" * 40))


async def test_a_client_that_leaves_does_not_leave_its_verdict_to_the_next(
    trial: GrammarTrial,
) -> None:
    await trial.check(wanted(regex="a"))
    leaving = asyncio.create_task(trial.check(wanted(regex="b?" * 2000)))
    await asyncio.sleep(0.05)
    leaving.cancel()
    await asyncio.wait({leaving})
    bad = await refusal(trial, grammar='root ::= "a" |')
    assert "grammar" in str(bad)
    await trial.check(wanted(json=json.dumps({"type": "string"})))


async def test_a_process_that_died_between_two_grammars_is_replaced(trial: GrammarTrial) -> None:
    await trial.check(wanted(regex="c"))
    process = trial._process
    assert process is not None
    process.kill()
    await process.wait()
    await trial.check(wanted(regex="d"))
    assert trial._process is not process


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def others() -> AsyncIterator[GrammarTrial]:
    """Of a server whose operator gave vLLM another compiler."""
    made = GrammarTrial(vocabulary, largest=8000, seconds=1, others=True)
    yield made
    await made.close()


async def test_what_takes_all_memory_in_another_compiler_of_vllms_is_refused(
    others: GrammarTrial,
) -> None:
    """xgrammar has done with it at once; llguidance takes memory for each of a billion items."""
    fault = await refusal(others, json={"type": "array", "minItems": 10**9})
    assert "too much memory" in str(fault)


async def test_what_the_engines_compiler_refuses_is_refused(
    trial: GrammarTrial, others: GrammarTrial
) -> None:
    """vLLM asks another whether it is right, and then the engine has only the first."""
    for given in (
        {"json": {"$ref": "#/$defs/a~1b", "$defs": {"a/b": {"type": "string"}}}},
        {"json": {"type": "array", "minItems": 1, "items": False}},
        {"regex": r"\p{L}+"},
    ):
        await refusal(trial, **given)
        await others.check(wanted(**given))
    tag = {"begin": "<a>", "schema": {"type": "object"}, "end": "</a>"}
    older = {"type": "structural_tag", "structures": [tag], "triggers": ["<a"]}
    await trial.check(wanted(structural_tag=json.dumps(older)))  # vLLM reads it its own way
