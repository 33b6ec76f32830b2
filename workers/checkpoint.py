"""Reads safetensors checkpoints, one file or many with an index, part of a tensor at a time."""

import json
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from safetensors import SafetensorError, safe_open
from torch import Tensor

from manta.configs.weights import WeightError
from manta.workers.read_ahead import Extent

INDEX_NAME = "model.safetensors.index.json"
_PREFIX = "model."


class Checkpoint:
    """The tensors of a model folder. A context manager: files are opened when first needed and closed at its end.

    Of a model saved without its head, whose tensors lack the prefix `model.`, they have it here all the same.
    """

    def __init__(self, folder: Path) -> None:
        """Raises WeightError if the folder has no safetensors weights, or not the files its index names."""
        self.folder = folder
        self._stack = ExitStack()
        self._open: dict[str, Any] = {}
        self._offsets: dict[str, dict[str, tuple[int, int]]] = {}
        found = self._read_index() if (folder / INDEX_NAME).is_file() else self._read_headers()
        has_prefix = any(name.startswith(_PREFIX) for name in found)
        self._stored = {name if has_prefix or name == "lm_head.weight" else _PREFIX + name: name for name in found}
        self.file_of = {name: found[stored] for name, stored in self._stored.items()}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.close()

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the whole tensor."""
        return tuple(self._slice(name).get_shape())

    def read(self, name: str, part: tuple[slice, ...]) -> Tensor:
        """One slice per axis of a tensor; only that part is read."""
        tensor: Tensor = self._slice(name)[part]
        return tensor

    def extent(self, name: str) -> Extent:
        """Where the tensor's bytes lie."""
        file = self.file_of[name]
        if file not in self._offsets:
            self._offsets[file] = _read_offsets(self.folder / file)
        try:
            return Extent(self.folder / file, *self._offsets[file][self._stored[name]])
        except KeyError:
            raise WeightError(f"tensor {name!r} is not in {self.folder / file}, where the index has it") from None

    def _slice(self, name: str) -> Any:
        file = self.file_of[name]
        try:
            return self._file(file).get_slice(self._stored[name])
        except SafetensorError as error:
            raise WeightError(f"tensor {name!r} cannot be read from {self.folder / file}: {error}") from error

    def _file(self, file: str) -> Any:
        if file not in self._open:
            try:
                self._open[file] = self._stack.enter_context(safe_open(self.folder / file, framework="pt"))
            except (OSError, SafetensorError) as error:
                raise WeightError(f"{self.folder / file} cannot be read as safetensors: {error}") from error
        return self._open[file]

    def _read_index(self) -> dict[str, str]:
        path = self.folder / INDEX_NAME
        try:
            file_of: dict[str, str] = dict(json.loads(path.read_text(encoding="utf-8"))["weight_map"])
        except (ValueError, KeyError, TypeError) as error:
            raise WeightError(f"{path} is not an index of safetensors files: {error!r}") from error
        for file in sorted(set(file_of.values())):
            if not (self.folder / file).is_file():
                raise WeightError(f"{path} names {file!r}, which is not in the folder: the download is incomplete")
        return file_of

    def _read_headers(self) -> dict[str, str]:
        files = sorted(path.name for path in self.folder.glob("*.safetensors"))
        if "model.safetensors" in files:
            files = ["model.safetensors"]
        if not files:
            raise WeightError(f"{self.folder} has no *.safetensors weights; other formats are not read")
        return {name: file for file in files for name in self._file(file).keys()}  # noqa: SIM118 (not a dict)


def _read_offsets(path: Path) -> dict[str, tuple[int, int]]:
    """Where each tensor begins and ends: 8 bytes of the header's length, the header (JSON), then the tensors."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > path.stat().st_size:
                raise ValueError("it has no header")
            header = json.loads(file.read(length))
        begin = 8 + length
        return {
            name: (begin + entry["data_offsets"][0], begin + entry["data_offsets"][1])
            for name, entry in header.items()
            if name != "__metadata__"
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise WeightError(f"{path} cannot be read as safetensors: {error}") from error
