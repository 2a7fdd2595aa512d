"""Changed texts: as fragments, corrupted by degrees, or with another question or the opposite judgement."""

from __future__ import annotations

import random
import re
import string
from collections.abc import Callable, Iterable, Sequence

FUNCTION_WORDS = frozenset(
    "a an the of to in on at for and or is are was were be been by with as that this it its from he she his her they "
    "their i you we not has have had but which who".split()
)


def roughen(text: str, lower: bool) -> str:
    """A text without final punctuation and with a small first letter, or all in small letters.

    Queries and titles look like that, running text does not: an encoder that never read any maps them all together.

    Args:
        text: A sentence; one of punctuation alone stays as it is.
        lower: Small letters throughout.
    """
    bare = text.rstrip(string.punctuation + " ")
    if not bare:
        return text
    return bare.lower() if lower else bare[0].lower() + bare[1:]


def content_words(texts: Iterable[str]) -> list[str]:
    """Small-letter content words, as often as they occur; the words that a corruption puts in."""
    words = (word for text in texts for word in text.split())
    return [w for w in words if w.isalpha() and w.islower() and w not in FUNCTION_WORDS]


def corrupt(sentence: str, pool: Sequence[str], rng: random.Random, most: int = 3) -> list[str]:
    """Up to `most` graded corruptions, from nearly the same to half of it, none equal to another or the sentence.

    A content word out; one replaced; half of them replaced; two exchanged; a `not` put in; content words alone; either
    half. In half of the cases all are written like fragments.

    Args:
        sentence: At least two words, else there is none.
        pool: Words to put in.
        rng: Chooses.
        most: Of them.
    """
    words = sentence.split()
    content = [n for n, word in enumerate(words) if word.lower().strip(".,;:!?") not in FUNCTION_WORDS]

    def changed(change: Callable[[int, str], str | None]) -> str:
        return " ".join(new for n, word in enumerate(words) if (new := change(n, word)) is not None)

    found: list[str] = []
    if len(content) >= 3:
        out = rng.choice(content)
        found.append(changed(lambda n, word: None if n == out else word))
        if pool:
            one, half = rng.choice(content), set(rng.sample(content, max(2, len(content) // 2)))
            found.append(changed(lambda n, word: rng.choice(pool) if n == one else word))
            found.append(changed(lambda n, word: rng.choice(pool) if n in half else word))
        a, b = rng.sample(content, 2)
        found.append(changed(lambda n, word: words[b] if n == a else words[a] if n == b else word))
        verb = next((n for n, word in enumerate(words) if word.lower() in ("is", "are", "was", "were")), None)
        if verb is not None:
            found.append(" ".join([*words[: verb + 1], "not", *words[verb + 1 :]]))
    found.append(changed(lambda n, word: word if n in content else None))
    middle = len(words) // 2
    found += [" ".join(words[:middle]), " ".join(words[middle:])]
    if rng.random() < 0.5:
        found = [text.lower().rstrip(".!?") for text in found]
    found = [text for text in dict.fromkeys(found) if text and text != sentence]
    return rng.sample(found, min(most, len(found)))


# --- what a topic does not tell ---------------------------------------------------------------------------------

QUESTIONS = (
    "who", "what", "when", "where", "why", "how", "which", "how many", "how much", "how long", "which person",
    "which city", "which country", "what year", "what kind of thing", "what number",
)  # fmt: skip
"""What a question may begin with."""

_VERB = "is|are|was|were|am|do|does|did|can|could|will|would|has|have|had|should|shall|may|might|must"
_QUESTION = re.compile(
    r"(?:how (?:many|much|long|far|old|often|big|tall|large|high)|who|whom|whose|what|which|when|where|why|how)\b"
    rf"(?:(?: [\w'-]+){{0,3}}?(?= (?:{_VERB})\b))?",
    re.IGNORECASE,
)

_JUDGEMENTS = (  # words that can stand for each other, good and bad ones
    (
        "good great nice excellent wonderful amazing perfect fantastic brilliant superb pleasant impressive fine",
        "bad terrible nasty poor awful disappointing flawed horrible mediocre dreadful unpleasant weak lousy",
    ),
    (
        "funny exciting interesting enjoyable charming clever fascinating original moving thoughtful delightful",
        "dull boring tedious tiresome irritating stupid dreary unoriginal lifeless shallow annoying",
    ),
    ("best finest greatest", "worst poorest weakest"),
    ("better", "worse"),
    ("happy pleased glad impressed delighted", "sad angry sorry annoyed disappointed"),
    ("friendly kind helpful honest polite", "rude cruel useless dishonest careless"),
    ("beautiful lovely pretty clean fresh", "ugly hideous plain dirty stale"),
    ("easy safe cheap reliable", "difficult dangerous overpriced unreliable"),
    ("love like enjoy admire recommend", "hate dislike regret despise avoid"),
    ("loved liked enjoyed admired recommended", "hated disliked regretted despised avoided"),
    ("loves likes enjoys admires recommends", "hates dislikes regrets despises avoids"),
    ("success triumph joy pleasure", "failure disaster misery bore"),
    ("well brilliantly beautifully nicely", "badly poorly clumsily terribly"),
)
_SIDES = {
    word: (number, side)
    for number, sides in enumerate(_JUDGEMENTS)
    for side, words in enumerate(sides)
    for word in words.split()
}
"""Set and side of each word of judgement."""

_MARKS = ".,;:!?\"'()"


def has_contrast(text: str) -> bool:
    """Whether a text is a question that begins with a question word, or holds a word of judgement."""
    return _QUESTION.match(text) is not None or any(word.lower().strip(_MARKS) in _SIDES for word in text.split())


def contrasts(text: str, rng: random.Random, most: int = 3) -> list[str]:
    """Up to `most` texts about the same that ask for something else, or judge it otherwise.

    A question gets other beginnings (`who wrote it` -> `when wrote it`; grammar is not minded). Of other texts, every
    word of judgement is put into its opposite in one version, into another of its own side in one, and by chance
    in the others.

    Args:
        text: One that `has_contrast`; another has none.
        rng: Chooses.
        most: Of them.
    """
    if opening := _QUESTION.match(text):
        own = opening.group().lower()
        others = [other for other in QUESTIONS if other != own]
        large = text[0].isupper()
        chosen = rng.sample(others, min(most, len(others)))
        return [f"{other.capitalize() if large else other}{text[opening.end() :]}" for other in chosen]

    def judged(choose: Callable[[int], int]) -> str:
        words = []
        for word in text.split():
            bare = word.strip(_MARKS)
            if (place := _SIDES.get(bare.lower())) is None:
                words.append(word)
                continue
            number, side = place
            new = rng.choice(
                [one for one in _JUDGEMENTS[number][choose(side)].split() if one != bare.lower()] or [bare]
            )
            words.append(word.replace(bare, new.capitalize() if bare[0].isupper() else new))
        return " ".join(words)

    versions = [judged(lambda side: 1 - side), judged(lambda side: side)]
    versions += [judged(lambda side: rng.randrange(2)) for _ in range(most)]
    return [version for version in dict.fromkeys(versions) if version != text][:most]
