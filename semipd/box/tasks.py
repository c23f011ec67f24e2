"""The questions that the model in the box was taught, shared by its training, its evaluation and the tests.

Every question has one right answer, computed here in plain Python. Questions are split by a hash of what
they ask: one in twenty is *held out*, never drawn for training, and is what evaluation asks. The split
depends on the content alone (17 + 25 and 25 + 17 are on the same side), so it needs no stored list.
Standard library only.
"""

import hashlib
import string
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from random import Random

HELD_OUT_ONE_IN = 20

_WORD_LIST = (
    "red blue green yellow orange purple pink brown black white gray gold silver violet indigo "
    "teal cyan lime navy cat dog fox bear wolf lion tiger horse mouse sheep goat duck goose eagle "
    "hawk owl crow robin whale shark apple pear plum peach grape lemon melon mango banana cherry "
    "berry fig kiwi olive onion carrot pepper tomato bean house door window table chair lamp "
    "clock mirror carpet shelf kitchen garden bridge tower castle river lake ocean mountain "
    "forest island desert valley beach storm cloud rain snow wind thunder summer winter spring "
    "autumn alice bob carol dave erin frank grace heidi ivan judy karl lena mike nina oscar paul "
    "quinn rosa sam tina one two three four five six seven eight nine ten hello world yes no good "
    "bad big small fast slow hot cold book paper pencil letter number music song dance guitar "
    "piano drum violin paint photo camera movie story bread butter cheese milk honey sugar salt "
    "coffee water juice soup salad pizza pasta rice cake cookie car bus train plane ship boat "
    "bike truck road street city village country planet star moon sun earth strawberry "
    "mississippi computer engine server model token memory block cache batch queue kernel python "
)
WORDS = tuple(_WORD_LIST.split())
SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "Answer briefly.",
    "You are a small model. Be precise.",
    "Help the user.",
)


@dataclass(frozen=True)
class Question:
    """One question and its only right answer. ``key`` is what the held-out split hashes."""

    kind: str
    text: str
    answer: str
    key: str

    @property
    def held_out(self) -> bool:
        return is_held_out(self.key)


@dataclass(frozen=True)
class Recall:
    """A list to remember and the questions about it, in order; values are looked up by name."""

    pairs: tuple[tuple[str, str], ...]
    asked: tuple[str, ...]
    phrases: tuple[str, ...]

    def turns(self) -> Iterator[Question]:
        """Yield the turns: the first holds the whole list and a question, the others only ask."""
        values = dict(self.pairs)
        opening = recall_opening(self.pairs)
        for name, phrase in zip(self.asked, self.phrases, strict=True):
            yield Question(
                "recall", opening + phrase.format(name), values[name], recall_key(self.pairs, name)
            )
            opening = ""


def is_held_out(key: str) -> bool:
    """Whether ``key`` is on the held-out side of the split. Depends on nothing but the key."""
    digest = hashlib.blake2b(key.encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") % HELD_OUT_ONE_IN == 0


def draw(kind: str, rng: Random, held_out: bool = False, **sizes: int) -> Question:
    """Draw a question of ``kind`` (one of ``KINDS``) from the asked side of the split.

    ``sizes`` are the generator's own bounds, for instance ``largest=999`` for sums.
    """
    generator = GENERATORS[kind]
    while True:
        question = generator(rng, **sizes)
        if question.held_out == held_out:
            return question


def add(rng: Random, largest: int = 99) -> Question:
    """A sum of two numbers from 0 to ``largest``."""
    left, right = rng.randint(0, largest), rng.randint(0, largest)
    phrase = rng.choice(("What is {} + {}?", "What is {} + {}?", "{} + {} = ?", "{}+{}", "Add {} and {}."))
    key = f"add:{min(left, right)}+{max(left, right)}"
    return Question("add", phrase.format(left, right), str(left + right), key)


def subtract(rng: Random, largest: int = 99) -> Question:
    """A difference of two numbers from 0 to ``largest``; it may be negative."""
    left, right = rng.randint(0, largest), rng.randint(0, largest)
    phrase = rng.choice(
        ("What is {} - {}?", "What is {} - {}?", "{} - {} = ?", "{}-{}", "Subtract {1} from {0}.")
    )
    return Question("subtract", phrase.format(left, right), str(left - right), f"subtract:{left}-{right}")


def copy(rng: Random, longest: int = 16) -> Question:
    """A string of at most ``longest`` characters to repeat."""
    text = some_text(rng, longest)
    phrase = rng.choice(("Copy: {}", "Copy: {}", "Repeat: {}", "Repeat after me: {}"))
    return Question("copy", phrase.format(text), text, f"copy:{text}")


def reverse(rng: Random, longest: int = 12) -> Question:
    """A string of at most ``longest`` characters without spaces to write backwards."""
    text = some_text(rng, longest, spaces=False)
    phrase = rng.choice(("Reverse: {}", "Reverse: {}", "Spell {} backwards."))
    return Question("reverse", phrase.format(text), text[::-1], f"reverse:{text}")


def sort(rng: Random, longest: int = 10) -> Question:
    """Two to ``longest`` digits to sort in ascending order."""
    digits = "".join(rng.choices(string.digits, k=rng.randint(2, longest)))
    phrase = rng.choice(("Sort: {}", "Sort: {}", "Sort the digits {}."))
    return Question("sort", phrase.format(digits), "".join(sorted(digits)), f"sort:{digits}")


def count(rng: Random, longest: int = 11) -> Question:
    """How often a letter occurs in a string of at most ``longest`` lower-case letters."""
    if rng.random() < 0.3:
        text = rng.choice(WORDS)[:longest]
    else:
        alphabet = rng.sample(string.ascii_lowercase, rng.randint(2, 7))
        text = "".join(rng.choices(alphabet, k=rng.randint(1, longest)))
    letter = rng.choice(text) if rng.random() < 0.85 else rng.choice(string.ascii_lowercase)
    phrase = rng.choice(("How many {} in {}?", "How many {} in {}?", "How many {}'s are in {}?"))
    return Question("count", phrase.format(letter, text), str(text.count(letter)), f"count:{letter}:{text}")


def recall_question(rng: Random, pairs: int = 12) -> Question:
    """One question about a list of at most ``pairs`` names and values."""
    return next(recall(rng, rng.randint(1, pairs), 1).turns())


def recall(rng: Random, pairs: int, questions: int, held_out: bool | None = None) -> Recall:
    """A list of ``pairs`` distinct names with values, and ``questions`` about names drawn from it.

    ``held_out`` says which side of the split the questions come from; None is either.
    """
    while True:
        drawn = recall_from(rng, random_pairs(rng, pairs), questions, held_out)
        if drawn:
            return drawn


def recall_of_length(rng: Random, characters: int, questions: int = 1) -> Recall:
    """Held-out questions; the first, with its list, has at most ``characters`` (>= 40), nearly that."""
    longest_question = len("What is mississippi?")
    while True:
        listed = random_pairs(rng, max(1, characters // 8))
        while len(recall_opening(listed)) + longest_question > characters:
            listed = listed[:-1]
        drawn = recall_from(rng, listed, questions, held_out=True)
        if drawn:
            return drawn


def recall_from(
    rng: Random, listed: tuple[tuple[str, str], ...], questions: int, held_out: bool | None
) -> Recall | None:
    """Questions about a given list; None when none of its names is on the wanted side of the split."""
    names = [name for name, _ in listed if held_out in (None, is_held_out(recall_key(listed, name)))]
    if not names:
        return None
    rounds = (rng.sample(names, len(names)) for _ in range(questions))
    asked = tuple(islice(chain.from_iterable(rounds), questions))
    phrases = tuple(rng.choice(("What is {}?", "What is {}?", "And {}?")) for _ in range(questions - 1))
    return Recall(listed, asked, ("What is {}?", *phrases)[:questions])


def random_pairs(rng: Random, number: int) -> tuple[tuple[str, str], ...]:
    """Distinct names with a value each."""
    return tuple((name, some_value(rng)) for name in distinct_names(rng, number))


def recall_opening(pairs: Sequence[tuple[str, str]]) -> str:
    """The words that give a list to remember."""
    return "Remember: " + ", ".join(f"{name}={value}" for name, value in pairs) + ". "


def recall_key(pairs: Sequence[tuple[str, str]], name: str) -> str:
    """What the split hashes for a question about ``name`` and this list."""
    return f"recall:{recall_opening(pairs)}{name}"


def distinct_names(rng: Random, number: int) -> list[str]:
    """Names for a list, all different: known words, made-up ones of 3 to 5 letters, or single letters."""
    words = rng.choice((0.0, 0.3, 0.9)) if number <= len(WORDS) // 2 else 0.2
    sizes = rng.choice(((3, 4, 4, 5), (1, 1, 2), (1, 2, 3, 4))) if number <= 12 else (3, 4, 4, 5)
    names: dict[str, None] = {}
    while len(names) < number:
        if rng.random() < words:
            names[rng.choice(WORDS)] = None
        else:
            names["".join(rng.choices(string.ascii_lowercase, k=rng.choice(sizes)))] = None
    return list(names)


def some_value(rng: Random) -> str:
    """A value to remember: mostly three digits, sometimes one, two or four."""
    digits = rng.choice((1, 2, 3, 3, 3, 3, 3, 4))
    return str(rng.randrange(10 ** (digits - 1) if digits > 1 else 0, 10**digits))


def some_text(rng: Random, longest: int, spaces: bool = True) -> str:
    """Words or random characters, 1 to ``longest`` of them, that neither begin nor end with a space."""
    style = rng.random()
    if style < 0.25:
        return rng.choice(WORDS)[:longest]
    if style < 0.4 and spaces:
        return " ".join(rng.choices(WORDS, k=rng.randint(2, 3)))[:longest].strip()
    alphabet = rng.choice(
        (
            string.ascii_lowercase,
            string.ascii_lowercase,
            string.ascii_letters,
            string.digits,
            string.ascii_lowercase + string.digits,
            "".join(rng.sample(string.ascii_lowercase, 3)),
        )
    )
    return "".join(rng.choices(alphabet, k=rng.randint(1, longest)))


GENERATORS: dict[str, Callable[..., Question]] = {
    "add": add,
    "subtract": subtract,
    "copy": copy,
    "reverse": reverse,
    "sort": sort,
    "count": count,
    "recall": recall_question,
}
KINDS = tuple(GENERATORS)
