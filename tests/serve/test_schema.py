"""Bodies of any shape: understood, or refused by name, and never anything else."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from semipd.core.errors import Refused
from semipd.serve.conversation import messages_of
from semipd.serve.schema import (
    NEUTRAL,
    ChatBody,
    CompletionBody,
    body_schemas,
    parse,
    prompts_of,
)
from semipd.serve.service import params_of
from semipd.serve.structured import Structure

texts = st.text('ab"\\\ud83e\udd8aé\n', max_size=4)
values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)
names = st.sampled_from([*CompletionBody.__struct_fields__, *ChatBody.__struct_fields__, *NEUTRAL, "other"])


def refusal(data: bytes, kind: type[CompletionBody] | type[ChatBody]) -> Refused | None:
    """Why the body is refused, after all steps that do not need a model."""
    try:
        parsed = parse(data, kind)
        if isinstance(parsed, CompletionBody):
            assert all(prompts_of(parsed))
        else:
            messages_of(parsed.messages)
        params_of(parsed, Structure(parsed), parsed.max_tokens, 16)
    except Refused as refused:
        return refused
    return None


@settings(deadline=None)
@given(st.dictionaries(names, values, max_size=6))
def test_anything_is_understood_or_refused_by_name(body: dict[str, Any]) -> None:
    for kind in (CompletionBody, ChatBody):
        whole = {"prompt": "x", **body} if kind is CompletionBody else body
        refused = refusal(json.dumps(whole).encode(), kind)
        assert refused is None or refused.param in {*whole, "messages"}, refused


@settings(deadline=None)
@given(st.binary(max_size=60))
def test_bytes_are_json_or_refused(data: bytes) -> None:
    refused = refusal(data, CompletionBody)
    assert refused is None or str(refused)


def test_no_parameter_is_both_supported_and_not() -> None:
    """Neutral values are for what at least one of the two does not support."""
    supported = {*CompletionBody.__struct_fields__} & {*ChatBody.__struct_fields__}
    assert not supported & set(NEUTRAL)


def test_every_field_is_described() -> None:
    schemas = body_schemas()
    assert set(schemas["CompletionBody"]["properties"]) == set(CompletionBody.__struct_fields__)
    assert schemas["ChatBody"]["additionalProperties"] is False
