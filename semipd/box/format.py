"""How the model in the box writes text and conversations as ids.

Ids 0 to 255 are bytes, so any text round-trips and a digit is one token; four special tokens follow.
A message is ``<|role|>text<|end|>``; a plain question, without roles, is its text and a newline.
"""

from semipd.box.tasks import Question

END, USER, ASSISTANT, SYSTEM = 256, 257, 258, 259
SPECIAL_TOKENS = ("<|end|>", "<|user|>", "<|assistant|>", "<|system|>")
VOCABULARY = 256 + len(SPECIAL_TOKENS)
ROLES = {"user": USER, "assistant": ASSISTANT, "system": SYSTEM}
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('unknown role ' + message['role']) }}"
    "{% endif %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def encode_message(role: str, text: str) -> list[int]:
    """Ids of one message of a conversation."""
    return [ROLES[role], *text.encode(), END]


def encode_turn(question: Question, plain: bool = False) -> tuple[list[int], list[int]]:
    """Ids of what is asked and of what is answered; together, a turn of a conversation (or plain text)."""
    answered = [*question.answer.encode(), END]
    if not plain:
        return [*encode_message("user", question.text), ASSISTANT], answered
    # After a question mark the model begins the new line; elsewhere it cannot know that the text ended.
    if question.text.endswith("?"):
        return list(question.text.encode()), [*b"\n", *answered]
    return [*question.text.encode(), *b"\n"], answered
