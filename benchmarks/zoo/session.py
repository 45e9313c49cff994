"""The zoo's only importer of onnxruntime: one thread on the CPU, quiet."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnxruntime as ort
from numpy.typing import NDArray


class Session:
    """An inference session on the CPU execution provider.

    Attributes:
        inputs: Names of the graph inputs that must be fed.
        metadata: The model's custom metadata.
    """

    def __init__(self, path: Path, threads: int = int(os.environ.get("ONNX_LOWRANK_ZOO_THREADS", "1"))) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        self._session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.inputs: tuple[str, ...] = tuple(value.name for value in self._session.get_inputs())
        self.metadata: dict[str, str] = dict(self._session.get_modelmeta().custom_metadata_map)

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
        """All outputs, in graph order."""
        outputs: Any = self._session.run(None, dict(feeds))
        return list(outputs)
