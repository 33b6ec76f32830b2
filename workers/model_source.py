"""Finds the files of a model: in a folder, in the hub's cache, with another worker that has them, or at the hub."""

import contextlib
import json
import logging
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from manta.configs.model import ModelError
from manta.configs.weights import WeightError
from manta.workers.checkpoint import INDEX_NAME
from manta.workers.checkpoint_files import Files, LocalFiles, RemoteFiles
from manta.workers.peer_files import PeerFiles

logger = logging.getLogger(__name__)

_CONFIG_NAME = "config.json"
_DOWNLOADED = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]


@contextlib.contextmanager
def open_model(model: str, peers: Sequence[str]) -> Iterator[Files]:
    """The model's files, of which all but the weights are in its `folder`. peers: workers that have loaded it.

    Raises ModelError if it cannot be had.
    """
    folder = _on_this_host(model)
    peer = _ask(peers) if folder is None and peers else None
    if peer is None:
        yield LocalFiles(folder or resolve_model_folder(model))
        return
    with contextlib.closing(peer), tempfile.TemporaryDirectory(prefix="manta-model-") as copied:
        peer.copy_small(Path(copied))
        yield RemoteFiles(peer, Path(copied))


def resolve_model_folder(model: str) -> Path:
    """A local folder as it is, a hub id through the hub's cache. Raises ModelError if it cannot be had."""
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    if not _is_hub_id(model):
        raise ModelError(f"model folder {model!r} does not exist")
    try:
        return Path(snapshot_download(model, allow_patterns=_DOWNLOADED))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(
            f"model {model!r} is neither a local folder nor could it be fetched from the Hugging Face hub: {reason}"
        ) from error


def _on_this_host(model: str) -> Path | None:
    """Its folder, if all is there without asking anybody."""
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    if not _is_hub_id(model):
        return None
    try:
        folder = Path(snapshot_download(model, allow_patterns=_DOWNLOADED, local_files_only=True))
        index = folder / INDEX_NAME
        names = set(json.loads(index.read_text())["weight_map"].values()) if index.is_file() else ["model.safetensors"]
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError, ValueError, KeyError):
        return None
    return folder if all((folder / name).is_file() for name in (_CONFIG_NAME, *names)) else None


def _ask(peers: Sequence[str]) -> PeerFiles | None:
    try:
        return PeerFiles(peers)
    except WeightError as error:  # the hub may have it
        logger.warning("%s", error)
        return None


def _is_hub_id(model: str) -> bool:
    return not model.startswith(("/", ".", "~")) and model.count("/") <= 1
