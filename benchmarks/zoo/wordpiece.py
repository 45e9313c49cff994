"""BERT's uncased tokenizer: split at white space and punctuation, then greedily into the longest known pieces."""

import json
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

WORDS = re.compile(r"\w+|[^\w\s]|_")


@dataclass(frozen=True)
class WordPiece:
    """The tokenizer described by a `tokenizer.json`."""

    path: Path

    @cached_property
    def vocabulary(self) -> dict[str, int]:
        """Piece -> token id."""
        vocabulary: dict[str, int] = json.loads(self.path.read_text("utf-8"))["model"]["vocab"]
        return vocabulary

    def encode(self, texts: Sequence[str], length: int) -> dict[str, NDArray[np.int64]]:
        """Token ids and attention mask, padded or cut to a common length.

        Returns:
            `input_ids` and `attention_mask`, each (texts, length).
        """
        ids = np.zeros((len(texts), length), np.int64)
        mask = np.zeros_like(ids)
        for row, text in enumerate(texts):
            tokens = ["[CLS]", *self.pieces(text)[: length - 2], "[SEP]"]
            ids[row, : len(tokens)] = [self.vocabulary[token] for token in tokens]
            mask[row, : len(tokens)] = 1
        return {"input_ids": ids, "attention_mask": mask}

    def pieces(self, text: str) -> list[str]:
        """The pieces of a text, continuations marked by `##`."""
        bare = "".join(c for c in unicodedata.normalize("NFD", text.lower()) if unicodedata.category(c) != "Mn")
        return [piece for word in WORDS.findall(bare) for piece in self._split(word)]

    def _split(self, word: str) -> list[str]:
        pieces: list[str] = []
        start = 0
        while start < len(word):
            prefix = "##" if start else ""
            ends = range(len(word), start, -1)
            end = next((end for end in ends if prefix + word[start:end] in self.vocabulary), None)
            if end is None:
                return ["[UNK]"]
            pieces.append(prefix + word[start:end])
            start = end
        return pieces
