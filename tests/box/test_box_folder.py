"""The shipped folder: transformers loads it, text round-trips, the template is the training format."""

import json
from pathlib import Path
from random import Random

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from semipd.box import format as box_format
from semipd.box import tasks as box_tasks

BOX = Path(box_tasks.__file__).parent


@pytest.mark.parametrize(
    "text",
    [
        "".join(map(chr, range(32, 127))),
        " two  spaces ",
        "line\nline\t",
        "naïve ✓ 日本語 🙂",
        "",
        "<|endish|>",
    ],
)
def test_any_text_round_trips_as_its_bytes(text: str) -> None:
    tokenizer = Tokenizer.from_file(str(BOX / "tokenizer.json"))
    ids = tokenizer.encode(text).ids
    assert ids == list(text.encode())
    assert tokenizer.decode(ids) == text


def test_special_tokens_have_their_ids() -> None:
    tokenizer = Tokenizer.from_file(str(BOX / "tokenizer.json"))
    assert [tokenizer.token_to_id(token) for token in box_format.SPECIAL_TOKENS] == [256, 257, 258, 259]
    assert tokenizer.get_vocab_size() == box_format.VOCABULARY


def test_the_chat_template_writes_what_training_wrote() -> None:
    tokenizer = AutoTokenizer.from_pretrained(BOX)
    rng = Random(1)
    messages = [{"role": "system", "content": "Answer briefly."}]
    expected = box_format.encode_message("system", "Answer briefly.")
    for kind in box_tasks.KINDS:
        question = box_tasks.draw(kind, rng)
        asked, answered = box_format.encode_turn(question)
        messages.append({"role": "user", "content": question.text})
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)[
            "input_ids"
        ]
        assert prompt == expected + asked
        messages.append({"role": "assistant", "content": question.answer})
        expected += asked + answered
    assert tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"] == expected


def test_a_conversation_that_breaks_the_format_is_refused_by_the_template() -> None:
    tokenizer = AutoTokenizer.from_pretrained(BOX)
    with pytest.raises(Exception, match="role"):
        tokenizer.apply_chat_template([{"role": "tool", "content": "x"}], tokenize=False)


def test_the_weights_are_about_a_million_in_bf16() -> None:
    model = AutoModelForCausalLM.from_pretrained(BOX, dtype="auto")
    assert model.dtype == torch.bfloat16
    assert 0.9e6 < sum(weight.numel() for weight in model.parameters()) < 1.5e6
    assert model.config.max_position_embeddings >= 4096
    assert model.generation_config.eos_token_id == box_format.END


def test_the_folder_is_small_and_says_what_it_is() -> None:
    assert sum(path.stat().st_size for path in BOX.iterdir()) < 4_000_000
    assert json.loads((BOX / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    card = " ".join((BOX / "README.md").read_text().split())
    assert "about a million parameters" in card and "nothing else" in card


@pytest.mark.parametrize("kind", box_tasks.KINDS)
def test_it_answers_held_out_questions(kind: str) -> None:
    """Where the shipped weights and the format part, every answer is wrong, not one in ten."""
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(BOX, dtype=torch.float32)
    rng = Random(2)
    right = 0
    for _ in range(30):
        question = box_tasks.draw(kind, rng, held_out=True)
        prompt, answer = box_format.encode_turn(question)
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + answer])).logits[0]
        right += logits[len(prompt) - 1 : -1].argmax(-1).tolist() == answer
    assert right >= 26
