"""Reads safetensors checkpoints, one file or many with an index, part of a tensor at a time."""

import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from safetensors import SafetensorError
from torch import Tensor

from manta.configs.weights import WeightError
from manta.workers.checkpoint_files import Files, LocalFiles, Part, TensorFile
from manta.workers.read_ahead import Extent
from manta.workers.safetensors_header import Entry

INDEX_NAME = "model.safetensors.index.json"
_PREFIX = "model."


class Checkpoint:
    """The tensors of a model folder. A context manager: files are opened when first needed and closed at its end.

    Of a model saved without its head, whose tensors lack the prefix `model.`, they have it here all the same.
    """

    def __init__(self, files: Path | Files) -> None:
        """files: a folder, or what stands for one. Raises WeightError if it has no safetensors weights, or not the
        files its index names."""
        self._files: Files = LocalFiles(files) if isinstance(files, Path) else files
        self.folder = self._files.folder
        self.is_local = self._files.is_local
        self._open: dict[str, TensorFile] = {}
        self._headers: dict[str, Mapping[str, Entry]] = {}
        found = self._read_index() if (self.folder / INDEX_NAME).is_file() else self._read_headers()
        has_prefix = any(name.startswith(_PREFIX) for name in found)
        self._stored = {name if has_prefix or name == "lm_head.weight" else _PREFIX + name: name for name in found}
        self.file_of = {name: found[stored] for name, stored in self._stored.items()}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._files.close()

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the whole tensor."""
        return tuple(self._slice(name).get_shape())

    def read(self, name: str, part: Part) -> Tensor:
        """One slice per axis of a tensor; only that part is read."""
        tensor: Tensor = self._slice(name)[part]
        return tensor

    def extent(self, name: str) -> Extent:
        """Where the tensor's bytes lie."""
        file = self.file_of[name]
        if file not in self._headers:
            self._headers[file] = self._files.header(file)
        try:
            entry = self._headers[file][self._stored[name]]
            return Extent(self.folder / file, entry.begin, entry.end)
        except KeyError:
            raise WeightError(f"tensor {name!r} is not in {self.folder / file}, where the index has it") from None

    def expect(self, parts: Mapping[str, Part]) -> None:
        """These parts will be read, in this order."""
        self._files.expect([(self.file_of[name], self._stored[name], part) for name, part in parts.items()])

    def _slice(self, name: str) -> Any:
        file = self.file_of[name]
        try:
            return self._file(file).get_slice(self._stored[name])
        except SafetensorError as error:
            raise WeightError(f"tensor {name!r} cannot be read from {self.folder / file}: {error}") from error

    def _file(self, file: str) -> TensorFile:
        if file not in self._open:
            self._open[file] = self._files.open(file)
        return self._open[file]

    def _read_index(self) -> dict[str, str]:
        path = self.folder / INDEX_NAME
        try:
            file_of: dict[str, str] = dict(json.loads(path.read_text(encoding="utf-8"))["weight_map"])
        except (ValueError, KeyError, TypeError) as error:
            raise WeightError(f"{path} is not an index of safetensors files: {error!r}") from error
        for file in sorted(set(file_of.values())):
            if not self._files.has(file):
                raise WeightError(f"{path} names {file!r}, which is not in the folder: the download is incomplete")
        return file_of

    def _read_headers(self) -> dict[str, str]:
        files = self._files.names()
        if "model.safetensors" in files:
            files = ["model.safetensors"]
        if not files:
            raise WeightError(f"{self.folder} has no *.safetensors weights; other formats are not read")
        return {name: file for file in files for name in self._file(file).keys()}  # noqa: SIM118 (not a dict)
