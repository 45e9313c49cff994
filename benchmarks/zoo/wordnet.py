"""WordNet as a source of English: glosses of nouns with their lexicographer class, and words."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.zoo.source import Deb

WORDNET = Deb("wordnet-base", "1:3.0-37", "61060d960f9ada8fa120872312eccd3ecebfbab8c4579e4f5a74e1cf67620752")


@dataclass(frozen=True)
class Gloss:
    """A definition of a noun and the number of its lexicographer file (5 = animal, 6 = artifact, ...)."""

    text: str
    file: int


def glosses(folder: Path) -> list[Gloss]:
    """The definitions of all nouns, without usage examples, in file order."""
    found: list[Gloss] = []
    for line in (folder / "usr/share/wordnet/data.noun").read_text("utf-8").splitlines():
        if line.startswith(" "):  # the licence
            continue
        fields, _, gloss = line.partition(" | ")
        text = gloss.partition(';  "')[0].partition('; "')[0].strip()
        found.append(Gloss(text, int(fields.split()[1])))
    return found


def words(folder: Path, longest: int = 12) -> list[str]:
    """Single words of the noun index, letters only."""
    lines = (folder / "usr/share/wordnet/index.noun").read_text("utf-8").splitlines()
    candidates = (line.partition(" ")[0] for line in lines if not line.startswith(" "))
    return [word for word in candidates if word.isascii() and word.isalpha() and len(word) <= longest]


@dataclass(frozen=True)
class Labelled:
    """Sentences and their class index."""

    texts: list[str]
    labels: list[int]


def labelled(folder: Path, train: int, test: int, smallest: int = 0, seed: int = 0) -> tuple[Labelled, Labelled]:
    """Glosses of every class that has enough of them, equally many per class.

    Args:
        folder: The unpacked package.
        train: Sentences per class of the first set.
        test: Sentences per class of the second set.
        smallest: Classes with fewer different glosses are left out.
        seed: Of the shuffle.
    """
    rng = np.random.default_rng(seed)
    by_class: dict[int, list[str]] = {}
    for gloss in glosses(folder):
        by_class.setdefault(gloss.file, []).append(gloss.text)
    kept = [texts for _, texts in sorted(by_class.items()) if len(set(texts)) >= max(smallest, train + test)]
    sets = Labelled([], []), Labelled([], [])
    for index, texts in enumerate(kept):
        order = rng.permutation(sorted(set(texts)))[: train + test].tolist()
        for chosen, part in zip(sets, (order[:train], order[train:]), strict=True):
            chosen.texts.extend(part)
            chosen.labels.extend([index] * len(part))
    return sets
