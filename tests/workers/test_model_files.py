"""A worker gets a model's files from another one: the same bytes, whatever happens to the other one meanwhile."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from transformers import AutoModelForCausalLM

from manta.configs.model import ModelError, read_model_spec
from manta.configs.weights import WeightError
from manta.protos import model_files_pb2 as pb
from manta.protos.model_files_pb2_grpc import ModelFilesStub, add_ModelFilesServicer_to_server
from manta.workers import model_files, model_source, peer_files
from manta.workers.checkpoint import Checkpoint
from manta.workers.checkpoint_files import RemoteFiles
from manta.workers.grammars import GrammarError, load_vocabulary
from manta.workers.loader import load_model
from manta.workers.mesh import Mesh
from manta.workers.model_files import ModelFilesService
from manta.workers.model_source import open_model
from manta.workers.peer_files import PeerFiles, Range
from manta.workers.server import WorkerServer
from tests.support.checkpoints import make_checkpoint
from tests.support.plans import Driver
from tests.support.small_tokenizers import byte_level
from tests.support.worker_client import WorkerClient, run_to_the_end, tiny_config

CPU = torch.device("cpu")
NOBODY = "127.0.0.1:9"  # the discard port, where nobody listens


class Peer:
    """A server of files alone."""

    def __init__(self, folder: Path | None) -> None:
        self._server = grpc.server(ThreadPoolExecutor(8))
        add_ModelFilesServicer_to_server(ModelFilesService(lambda: folder), self._server)
        self.address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        self._server.start()

    def stop(self) -> None:
        self._server.stop(None).wait()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Many files with an index, and something nobody should get."""
    folder = make_checkpoint(tmp_path_factory.mktemp("llama"), "llama", max_shard_size="20KB")
    (folder / "secret.pem").write_text("-")
    (folder.parent / "beside.json").write_text("{}")
    return folder


@pytest.fixture(scope="module")
def peer(folder: Path) -> Iterator[Peer]:
    peer = Peer(folder)
    yield peer
    peer.stop()


@pytest.fixture(autouse=True)
def many_small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_files, "PIECE_BYTES", 1000)
    monkeypatch.setattr(peer_files, "WINDOW_BYTES", 40_000)


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """This host has no files of any model."""
    monkeypatch.setattr(model_source, "_on_this_host", lambda model: None)


def read_first_rows(checkpoint: Checkpoint) -> None:
    for name in checkpoint.file_of:
        checkpoint.read(name, (slice(0, 2),))


def test_every_part_of_every_tensor(folder: Path, peer: Peer, tmp_path: Path) -> None:
    files = PeerFiles([peer.address])
    files.copy_small(tmp_path)
    with Checkpoint(folder) as here, Checkpoint(RemoteFiles(files, tmp_path)) as there:
        assert there.file_of == here.file_of
        for name in here.file_of:
            shape = here.shape(name)
            assert there.shape(name) == shape
            assert there.extent(name)[1:] == here.extent(name)[1:]
            for divide in (1, 2, 3):
                part = tuple(slice(size // divide // 2, size - size // divide // 4) for size in shape)
                assert torch.equal(there.read(name, part), here.read(name, part)), (name, part)


@pytest.mark.parametrize("tp_size", [1, 2])
def test_a_rank_is_what_it_is_from_a_folder(folder: Path, peer: Peer, elsewhere: None, tp_size: int) -> None:
    spec = read_model_spec(folder)
    for rank in range(tp_size):
        mesh = Mesh(rank, tp_size, 0, 1, CPU)
        here = load_model(folder, spec, mesh, torch.float32)
        with open_model("/no/such/folder", [peer.address]) as files:
            assert read_model_spec(files.folder) == spec
            there = load_model(files, read_model_spec(files.folder), mesh, torch.float32)
        parameters = dict(here.named_parameters())
        assert parameters.keys() == dict(there.named_parameters()).keys()
        assert all(torch.equal(value, parameters[name]) for name, value in there.named_parameters())
        assert not files.folder.exists()


def test_the_next_peer_goes_on(folder: Path, peer: Peer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer_files, "_SILENT_S", 5.0)  # a server may stop with a call that it does not answer
    dying = Peer(folder)
    files = PeerFiles([NOBODY, dying.address, peer.address])
    with Checkpoint(folder) as here, Checkpoint(RemoteFiles(files, tmp_path)) as there:
        for index, name in enumerate(sorted(here.file_of)):
            if index == 3:
                dying.stop()
            part = tuple(slice(0, size) for size in here.shape(name))
            assert torch.equal(there.read(name, part), here.read(name, part))


def test_a_peer_that_has_failed_is_asked_last(folder: Path, peer: Peer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each call to it would cost as much as the first one did."""
    asked: list[object] = []
    read = peer_files._read

    def note(stub: ModelFilesStub, wanted: Range) -> bytearray:
        asked.append(stub)
        return read(stub, wanted)

    monkeypatch.setattr(peer_files, "_read", note)
    dying = Peer(folder)
    files = PeerFiles([dying.address, peer.address])
    dying.stop()
    for end in range(1, 11):
        assert files.read(Range("config.json", 0, end)) == (folder / "config.json").read_bytes()[:end]
    files.close()
    assert len(asked) == 11


def test_a_part_of_a_hub_model_is_not_the_model(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A download that was interrupted is left to the hub, or to a peer."""
    monkeypatch.setattr(model_source, "snapshot_download", lambda *_, **__: str(tmp_path))
    for path in folder.iterdir():
        if path.name != "config.json":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    assert model_source._on_this_host("some/model") is None
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    assert model_source._on_this_host("some/model") == tmp_path
    next(tmp_path.glob("*.safetensors")).unlink()
    assert model_source._on_this_host("some/model") is None


def test_without_any_peer_left_the_file_is_named(folder: Path, tmp_path: Path) -> None:
    dying = Peer(folder)
    files = PeerFiles([dying.address])
    with Checkpoint(RemoteFiles(files, tmp_path)) as there:
        there.expect({name: (slice(0, 1),) for name in there.file_of})
        dying.stop()
        with pytest.raises(WeightError, match=r"model-\d+-of-\d+\.safetensors could not be read from another worker"):
            read_first_rows(there)


def test_busy_peers_are_asked_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_files, "MAX_READERS", 1)
    lone = Peer(folder)
    name, size = "config.json", (folder / "config.json").stat().st_size
    with ThreadPoolExecutor(8) as threads:
        readers = [PeerFiles([lone.address]) for _ in range(8)]
        found = list(threads.map(lambda files: bytes(files.read(Range(name, 0, size))), readers))
    assert set(found) == {(folder / name).read_bytes()}
    for files in readers:
        files.close()
    lone.stop()


@pytest.mark.parametrize("name", ["secret.pem", "../beside.json", "/etc/hostname", "", ".", "nothing.json"])
def test_nothing_else_can_be_read(peer: Peer, name: str) -> None:
    with grpc.insecure_channel(peer.address) as channel, pytest.raises(grpc.RpcError) as caught:
        list(ModelFilesStub(channel).Read(pb.ReadRequest(name=name, begin=0, end=1)))
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


def test_an_end_behind_the_file_is_an_error(peer: Peer, folder: Path) -> None:
    size = (folder / "config.json").stat().st_size
    with grpc.insecure_channel(peer.address) as channel, pytest.raises(grpc.RpcError) as caught:
        list(ModelFilesStub(channel).Read(pb.ReadRequest(name="config.json", begin=0, end=size + 1)))
    assert caught.value.code() is grpc.StatusCode.OUT_OF_RANGE


def test_a_folder_of_this_host_is_taken_first(folder: Path) -> None:
    with open_model(str(folder), [NOBODY]) as files:
        assert (files.folder, files.is_local) == (folder, True)


def test_peers_without_files_are_as_none(elsewhere: None) -> None:
    empty = Peer(None)
    with pytest.raises(ModelError, match="'/no/such' does not exist"), open_model("/no/such", [NOBODY, empty.address]):
        pass
    empty.stop()


def test_a_worker_serves_what_it_got_from_another(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    servers = [WorkerServer(), WorkerServer(), WorkerServer()]
    addresses = [server.start() for server in servers]
    first, second, third = (WorkerClient(address) for address in addresses)
    config = tiny_config(folder)
    first.load(config)
    monkeypatch.setattr(model_source, "_on_this_host", lambda model: None)
    second.load(config, peers=[NOBODY, addresses[0]])
    second.start()
    prompt = [3, 5, 7, 11, 13]
    reference: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    expected = reference.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False, eos_token_id=None)
    driver, stream = Driver(block_size=8, epoch=1), second.run()
    driver.add(0, prompt, 8)
    driver.take(stream.step(driver.plan([(0, len(prompt))])))
    run_to_the_end(driver, stream)
    assert driver.output(0) == expected[0, len(prompt) :].tolist()
    loaded = servers[1]._service._loaded
    assert loaded is not None
    assert loaded.small_files is not None
    assert loaded.small_files["config.json"] == (folder / "config.json").read_bytes()
    assert not any(name.endswith(".safetensors") for name in loaded.small_files)
    third.load(config, peers=[addresses[1], addresses[0]])  # the second one has no files to give
    for client, server in zip((first, second, third), servers, strict=True):
        client.close()
        server.stop()


def test_grammars_need_no_tokenizer_on_this_host(folder: Path, tmp_path: Path) -> None:
    """It comes with the model's small files."""
    pytest.importorskip("xgrammar", reason="the extra structured is not installed")
    byte_level().save_pretrained(tmp_path)
    spec = read_model_spec(folder).model_copy(update={"eos_token_ids": (2,)})
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    here = load_vocabulary(tiny_config(tmp_path), spec)
    elsewhere = tiny_config(Path("/no/such/folder"))
    assert load_vocabulary(elsewhere, spec, files).decoded_vocab == here.decoded_vocab
    with pytest.raises(GrammarError, match="none can be loaded from '/no/such/folder'"):
        load_vocabulary(elsewhere, spec)
