"""Where the safetensors files of a checkpoint are: in a folder, or with another worker."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from manta.configs.weights import WeightError
from manta.workers.peer_files import PeerFiles, Range
from manta.workers.safetensors_header import DTYPES, LENGTH_BYTES, MALFORMED, Entry, header_length, parse_header

Part = tuple[slice, ...]  # one slice per axis


class TensorFile(Protocol):
    """As `safe_open` gives it; `get_slice` has `get_shape`, and gives a part when indexed with it."""

    def keys(self) -> Iterable[str]: ...

    def get_slice(self, name: str) -> Any: ...


class Files(Protocol):
    """Calls raise WeightError."""

    folder: Path  # of the index, if there is one
    is_local: bool  # all files are in the folder

    def names(self) -> list[str]:
        """Of the safetensors files, sorted."""

    def has(self, name: str) -> bool: ...

    def open(self, name: str) -> TensorFile: ...

    def header(self, name: str) -> Mapping[str, Entry]: ...

    def expect(self, parts: Sequence[tuple[str, str, Part]]) -> None:
        """(file, tensor, part) that will be read, in this order."""

    def close(self) -> None: ...


class LocalFiles:
    """Those of a folder."""

    is_local = True

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._stack = ExitStack()

    def names(self) -> list[str]:
        return sorted(path.name for path in self.folder.glob("*.safetensors"))

    def has(self, name: str) -> bool:
        return (self.folder / name).is_file()

    def open(self, name: str) -> TensorFile:
        try:
            file: TensorFile = self._stack.enter_context(safe_open(self.folder / name, framework="pt"))
        except (OSError, SafetensorError) as error:
            raise _unreadable(self.folder / name, error) from error
        return file

    def header(self, name: str) -> Mapping[str, Entry]:
        path = self.folder / name
        try:
            with path.open("rb") as file:
                length = header_length(file.read(LENGTH_BYTES), path.stat().st_size)
                return parse_header(file.read(length))
        except (OSError, *MALFORMED) as error:
            raise _unreadable(path, error) from error

    def expect(self, parts: Sequence[tuple[str, str, Part]]) -> None:
        """Reading ahead has its own place (`read_ahead`): pages are shared by the ranks of a host."""

    def close(self) -> None:
        self._stack.close()


class RemoteFiles:
    """Those of another worker; small files are copied to `folder`."""

    is_local = False

    def __init__(self, peer: PeerFiles, folder: Path) -> None:
        self.folder = folder
        self._peer = peer
        self._headers: dict[str, Mapping[str, Entry]] = {}

    def names(self) -> list[str]:
        return sorted(name for name in self._peer.sizes if name.endswith(".safetensors"))

    def has(self, name: str) -> bool:
        return name in self._peer.sizes

    def open(self, name: str) -> TensorFile:
        return _RemoteFile(self._peer, name, self.header(name))

    def header(self, name: str) -> Mapping[str, Entry]:
        if name not in self._headers:
            try:
                first = self._peer.read(Range(name, 0, LENGTH_BYTES))
                length = header_length(bytes(first), self._peer.sizes[name])
                text = self._peer.read(Range(name, LENGTH_BYTES, LENGTH_BYTES + length))
                self._headers[name] = parse_header(bytes(text))
            except MALFORMED as error:
                if isinstance(error, WeightError):
                    raise
                raise _unreadable(self.folder / name, error) from error
        return self._headers[name]

    def expect(self, parts: Sequence[tuple[str, str, Part]]) -> None:
        self._peer.expect([_rows(file, self.header(file)[tensor], part) for file, tensor, part in parts])

    def close(self) -> None:
        self._peer.close()


class _RemoteFile:
    def __init__(self, peer: PeerFiles, name: str, header: Mapping[str, Entry]) -> None:
        self._peer, self._name, self._header = peer, name, header

    def keys(self) -> Iterable[str]:
        return self._header.keys()

    def get_slice(self, name: str) -> "_RemoteSlice":
        if name not in self._header:
            raise SafetensorError(f"File does not contain tensor {name}")
        return _RemoteSlice(self._peer, self._name, self._header[name])


class _RemoteSlice:
    def __init__(self, peer: PeerFiles, file: str, entry: Entry) -> None:
        self._peer, self._file, self._entry = peer, file, entry

    def get_shape(self) -> list[int]:
        return list(self._entry.shape)

    def __getitem__(self, part: Part) -> Tensor:
        rows, entry = _rows(self._file, self._entry, part), self._entry
        if entry.dtype not in DTYPES:
            raise WeightError(f"a tensor of {self._file} is {entry.dtype}, which is not known")
        dtype = DTYPES[entry.dtype]
        data = self._peer.read(rows)
        tensor = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
        if not entry.shape:
            return tensor.view(())
        first = part[0] if part else slice(None)
        tensor = tensor.view(len(range(*first.indices(entry.shape[0]))), *entry.shape[1:])
        return tensor[(slice(None), *part[1:])]


def _rows(file: str, entry: Entry, part: Part) -> Range:
    """The bytes of the rows that a part is in, with all their columns."""
    if not entry.shape or not entry.shape[0]:
        return Range(file, entry.begin, entry.end)
    start, stop, _ = (part[0] if part else slice(None)).indices(entry.shape[0])
    row_bytes = (entry.end - entry.begin) // entry.shape[0]
    return Range(file, entry.begin + start * row_bytes, entry.begin + max(start, stop) * row_bytes)


def _unreadable(path: Path, error: Exception) -> WeightError:
    return WeightError(f"{path} cannot be read as safetensors: {error}")
