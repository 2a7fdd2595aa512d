"""What a recipe can say of its texts: the dataclasses of mixtures and groups. `texts.py` and `groups.py` make them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal, get_args

from training.limits import at_least, shares


@dataclass
class Mixture:
    """Sentences drawn from several files.

    Attributes:
        files: Share of each file, by name without `train/sentences-` and `.txt.gz`, or by path of a text file.
        count: Sentences to draw in all; a file that holds fewer gives what it has.
        use: Train on the first so many of the drawn ones. None: all.
        words: Fewest and most words of a sentence.
        seed: Of the draw.
    """

    files: dict[str, float]
    count: int = 60_000
    use: int | None = None
    words: tuple[int, int] = (4, 28)
    seed: int = 0

    def __post_init__(self) -> None:
        at_least(self, 1, "count", "use")


TextKind = Literal["sentences", "fragments", "queries", "titles", "passages"]
"""What a text can be."""
Kind = Literal[TextKind, "corruptions", "contrasts"]
"""What a source can be: of these two, the texts are sentences and fragments."""


def refuse_no_kinds(where: str, names: Iterable[str], *others: str) -> None:
    """Refuse names in the place of a kind of text that no text has.

    Args:
        where: Key with the names.
        names: By kind.
        *others: Names that go as well.

    Raises:
        ValueError: If there is one.
    """
    kinds = (*get_args(TextKind), *others)
    if other := next((name for name in names if name not in kinds), None):
        hint = "; the texts of such a source are sentences and fragments" if other in get_args(Kind) else ""
        raise ValueError(f"{where}: expected kinds of text ({', '.join(kinds)}), got {other!r}{hint}")


@dataclass
class TextSource:
    """One source of a mixture.

    A row of a `.jsonl` file or of a Hub dataset has columns; a line of a text file is a text. Texts shorter than
    `words` are passed over; longer ones too, but passages are cut.
    """

    file: str
    """A path; a name under `train/` or `instruct/` of the data folder without its ending; or
    `hf:NAME[:SUBSET]#SPLIT[:COLUMN]`, a dataset on the Hub or a local folder of one."""

    kind: Kind = "sentences"
    """`fragments`: without final punctuation, in small letters or with a small first letter. `corruptions`: each
    sentence comes in one group with graded corruptions of it, which are fragments. `contrasts`: each question comes
    with other questions about the same, each judgement with its opposite, all of them sentences; texts that are neither
    are passed over. A teacher may have a prompt for each other kind."""

    count: int | None = None
    """Texts to draw; a source that holds fewer gives what it has."""

    share: float | None = None
    """Instead of `count`: share of the mixture's `count`."""

    words: tuple[int, int] = (4, 28)
    """Fewest and most words of a text."""

    column: str = "text"
    """Column of the text."""

    title: str | None = None
    """Column of a passage's title."""

    query: str | None = None
    """Column of a question that the passage answers: a text of its own, of the passage's group."""

    titled: float = 0.0
    """Share of the passages that are read with the title in front."""

    title_apart: float = 0.0
    """Share of the passages whose title is a text of its own too, of the passage's group."""

    sentence_apart: float = 0.0
    """Share of the passages of which one sentence is a text of its own too, of the passage's group."""

    lengths: list[int] | None = None
    """Passages are cut to one of these numbers of words, by seed. None: to the most of `words`, which no number may
    be beyond."""

    anywhere: float = 0.0
    """Share of the passages that begin at any of their words."""

    corruptions: int = 3
    """Most corruptions, or contrasts, of a sentence."""

    join: bool = False
    """Whether each text joins the group of the passage that the teacher finds nearest, see `Groups.join_above`; texts
    that are near none are left out."""

    skip: dict[str, list[str]] = field(default_factory=dict)
    """Rows to pass over: by column, its values as text; numbers and truth values as JSON writes them. For what is held
    out, e.g. `{category: [closed_qa]}`."""

    def __post_init__(self) -> None:
        at_least(self, 1, "count", "lengths")
        shares(self, "share", "titled", "title_apart", "sentence_apart", "anywhere")
        if (self.count is None) == (self.share is None):
            raise ValueError(f"{self.file}: a source needs either `count` or `share`")
        if self.corruptions < 1:
            raise ValueError(f"{self.file}: a corruption group of one text teaches nothing; corruptions must be >= 1")
        if not 1 <= self.words[0] <= self.words[1]:
            raise ValueError(f"{self.file}: words must be [fewest, most] from 1 on, got {list(self.words)}")
        passages_only = ("title", "query", "lengths", "titled", "title_apart", "sentence_apart", "anywhere")
        if self.kind != "passages" and (other := next((key for key in passages_only if getattr(self, key)), None)):
            raise ValueError(f"{self.file}: {other} is for kind: passages, got kind: {self.kind}")
        if (self.titled or self.title_apart) and self.title is None:
            raise ValueError(f"{self.file}: titled and title_apart need `title`, the column of the titles")
        if self.join and self.kind == "passages":
            raise ValueError(f"{self.file}: join is for texts that belong to passages, not for passages")

    def refuse_idle(self) -> None:
        """Refuse what does nothing, where a recipe is read.

        Raises:
            ValueError: If there is such a key.
        """
        most = max(self.lengths or [0])
        if most > self.words[1]:
            raise ValueError(
                f"{self.file}: no passage is longer than the most of words, {self.words[1]}, got lengths up to {most}; "
                f"set words: [{self.words[0]}, {most}]"
            )
        if self.corruptions != 3 and self.kind not in ("corruptions", "contrasts"):
            raise ValueError(
                f"{self.file}: corruptions does nothing with kind: {self.kind}, it is for kind: corruptions and "
                "contrasts; leave it out"
            )
        if self.title is not None and not (self.titled or self.title_apart):
            raise ValueError(f"{self.file}: title does nothing without `titled` or `title_apart`; set one of them")


@dataclass
class Texts:
    """A mixture of texts of several kinds; the same ones for the same sources, seed and part."""

    sources: list[TextSource]
    count: int | None = None
    """Texts that the `share` of a source is of."""

    seed: int = 0
    """Of everything that is drawn."""

    part: int = 0
    """What earlier parts of the same seed drew is passed over: rows of parts of the same mixture (sources with their
    `count`, `words` and `skip`, in this order) are all others. Of another mixture they may come again, and so may short
    texts that several rows have, as titles."""

    def __post_init__(self) -> None:
        at_least(self, 1, "count")
        at_least(self, 0, "part")
        if self.count is None and any(source.share is not None for source in self.sources):
            raise ValueError("texts: `share` of a source needs `count` of the mixture")
        if not self.sources:
            raise ValueError("texts: a mixture needs at least one source")

    def refuse_idle(self) -> None:
        """Refuse what does nothing, where a recipe is read.

        Raises:
            ValueError: If there is such a key.
        """
        for source in self.sources:
            source.refuse_idle()
        if self.count is not None and all(source.share is None for source in self.sources):
            raise ValueError("texts: count does nothing without a `share` of a source; leave it out")
        joining = next((source for source in self.sources if source.join), None)
        if joining is not None and all(source.kind != "passages" for source in self.sources):
            raise ValueError(
                f"{joining.file}: join does nothing without a source of kind: passages, and its texts would be left "
                "out; leave it out"
            )


@dataclass
class Groups:
    """Neighbour groups: what the first teacher finds close comes in one batch.

    k-means of the teacher's vectors, of short texts and of passages apart; a passage brings its titles, queries and
    sentences along, a sentence its corruptions.
    """

    neighbours: int = 8
    """Mean number of short texts of a cluster."""

    largest: int = 7
    """Most short texts of a group: larger clusters are cut."""

    passages: int = 4
    """Mean number of passages of a cluster, and most of a group."""

    join_above: float = 0.35
    """Least cosine between a text and a passage that it joins."""

    iterations: int = 8
    """Of k-means."""

    seed: int = 1

    def __post_init__(self) -> None:
        at_least(self, 1, "neighbours", "largest", "passages", "iterations")
