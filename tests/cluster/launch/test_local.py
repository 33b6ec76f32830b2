"""Which device each plain worker process is given."""

import json
from pathlib import Path
from typing import Any, ClassVar

import pytest

from manta.cluster.launch import local
from manta.cluster.launch.launcher import LaunchError
from manta.cluster.launch.local import LocalLauncher, local_gpus
from manta.configs.schema import ServeConfig
from tests.support.server import wait_until


@pytest.mark.parametrize(
    ("num_gpus", "allowed", "expected"),
    [
        (0, None, []),
        (0, "0", []),
        (3, None, ["0", "1", "2"]),
        (4, "3,1", ["3", "1"]),
        (4, "GPU-8a2b, GPU-91c0", ["GPU-8a2b", "GPU-91c0"]),
        (4, "", []),
        (4, "2,-1,3", ["2"]),
    ],
)
def test_gpus_are_those_this_process_may_use(
    num_gpus: int, allowed: str | None, expected: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for index in range(num_gpus):
        (tmp_path / f"0000:{index:02x}:00.0").mkdir()
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if allowed is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", allowed)
    assert local_gpus(tmp_path) == expected


@pytest.fixture
def visible(monkeypatch: pytest.MonkeyPatch) -> list[str | None]:
    """CUDA_VISIBLE_DEVICES of each worker that is started; the host has GPUs 2 and 5."""
    started: list[str | None] = []

    class Child:
        def __init__(self, name: str, module: str, args: list[str], env: dict[str, str], **_: Any) -> None:
            started.append(env.get("CUDA_VISIBLE_DEVICES"))

        def wait_for_address(self, timeout_s: float, why_vain: Any = None) -> str:
            return "here:1"

    monkeypatch.setattr(local, "ChildProcess", Child)
    monkeypatch.setattr(local, "local_gpus", lambda: ["2", "5"])
    return started


def test_each_worker_gets_a_gpu_of_its_own(visible: list[str | None]) -> None:
    LocalLauncher().start_workers(ServeConfig(model="m", tensor_parallel_size=2))
    assert visible == ["2", "5"]


@pytest.mark.parametrize("config", [{"device": "cpu"}, {"tensor_parallel_size": 3}], ids=["wanted", "too few GPUs"])
def test_workers_on_the_cpu_see_no_gpu(config: dict[str, object], visible: list[str | None]) -> None:
    LocalLauncher().start_workers(ServeConfig.model_validate({"model": "m"} | config))
    assert set(visible) == {""}


def test_too_few_gpus_are_an_error_when_they_were_asked_for(visible: list[str | None]) -> None:
    with pytest.raises(LaunchError, match="3 GPUs are needed and this host has 2"):
        LocalLauncher().start_workers(ServeConfig(model="m", device="cuda", data_parallel_size=3))
    assert not visible


def test_only_frontends_get_the_keys_and_in_no_words_of_a_command(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[tuple[str, list[str], dict[str, str] | None]] = []

    class Child:
        def __init__(
            self, name: str, module: str, args: list[str], env: dict[str, str] | None = None, **_: Any
        ) -> None:
            started.append((name, args, env))

        def wait_for_address(self, timeout_s: float, why_vain: Any = None) -> str:
            return "here:1"

    monkeypatch.setattr(local, "ChildProcess", Child)
    config = ServeConfig.model_validate({"model": "m", "device": "cpu", "api_key": ["sk-secret", "sk-other"]})
    launcher = LocalLauncher()
    launcher.start_workers(config)
    launcher.start_scheduler(config, [["here:1"]])
    launcher.prepare_frontends(config)
    told = {name: env for name, _, env in started}
    assert told["frontend 0"] == {"MANTA_API_KEY_HASHES": ",".join(config.api_key)}
    assert all("MANTA_API_KEY_HASHES" not in (env or {}) for name, env in told.items() if name != "frontend 0")
    words = " ".join(word for _, args, _ in started for word in args)
    assert "secret" not in words
    assert "sha256" not in words


class FakeChild:
    """A process that is told to be dead or alive."""

    children: ClassVar[list["FakeChild"]] = []

    def __init__(self, name: str, module: str, args: list[str], env: dict[str, str], **_: Any) -> None:
        self.name, self.args, self.env, self.told, self.is_dead = name, args, env, "", False
        self.children.append(self)

    def wait_for_address(self, timeout_s: float, why_vain: Any = None) -> str:
        return f"{self.name}/{self.children.index(self)}"

    def tell(self, line: str) -> None:
        self.told = line

    def ended(self) -> str | None:
        return "dead" if self.is_dead else None

    def stopped(self) -> str | None:
        return None

    def kill(self) -> None:
        self.is_dead = True

    terminate = kill

    def join(self, timeout_s: float) -> None:
        assert self.is_dead


@pytest.fixture
def children(monkeypatch: pytest.MonkeyPatch) -> list[FakeChild]:
    """All that have been started, on a host with GPUs 2 and 5; who is to stand by is started at once."""
    monkeypatch.setattr(FakeChild, "children", [])
    monkeypatch.setattr(local, "ChildProcess", FakeChild)
    monkeypatch.setattr(local, "_STANDBY_DELAY_S", 0.0)
    monkeypatch.setattr(local, "local_gpus", lambda: ["2", "5"])
    return FakeChild.children


def test_ranks_that_live_stay(children: list[FakeChild]) -> None:
    config = ServeConfig(model="m", tensor_parallel_size=2)
    launcher = LocalLauncher()
    assert launcher.start_workers(config) == [["worker 0/0", "worker 1/1"]]
    children[1].is_dead = True
    assert launcher.replace_workers(config, 0) == ["worker 0/0", "worker 1/2"]
    assert launcher.replace_workers(config, 0) == ["worker 0/3", "worker 1/4"]  # nobody is known to be dead
    assert [child.is_dead for child in children] == [True, True, True, False, False]


def test_a_worker_that_stands_by_takes_the_place_of_one_that_died(children: list[FakeChild]) -> None:
    config = ServeConfig(model="m", data_parallel_size=2, standby_workers=1, distributed_executor_backend="local")
    launcher = LocalLauncher()
    launcher.start_workers(config)
    launcher.open_frontends(config, "here")
    wait_until(lambda: len(children) == 3, 20, "one stands by")
    standby = children[2]
    assert "--standby" in standby.args
    assert "CUDA_VISIBLE_DEVICES" not in standby.env
    children[1].is_dead = True
    assert launcher.replace_workers(config, 1) == ["worker 1/2"]
    assert json.loads(standby.told) == {"CUDA_VISIBLE_DEVICES": "5"}
    wait_until(lambda: len(children) == 4, 20, "another one stands by")
    children[3].is_dead = True
    standby.is_dead = True
    launcher.replace_workers(config, 1)
    assert "--standby" not in children[4].args  # there was none


def test_who_stands_by_with_old_code_is_not_taken(children: list[FakeChild]) -> None:
    config = ServeConfig(model="m", data_parallel_size=2, standby_workers=1, distributed_executor_backend="local")
    launcher = LocalLauncher()
    launcher.start_workers(config)
    launcher.open_frontends(config, "here")
    wait_until(lambda: len(children) == 3, 20, "one stands by")
    launcher.end_standby()
    assert children[2].is_dead
    launcher.replace_workers(config, 1)
    assert "--standby" not in children[3].args
    wait_until(lambda: len(children) == 5, 20, "another one stands by")
    assert "--standby" in children[4].args


def test_repairs_of_what_was_taken_down_say_so(children: list[FakeChild]) -> None:
    config = ServeConfig(model="m", data_parallel_size=2)
    launcher = LocalLauncher()
    launcher.start_workers(config)
    launcher.stop(0.0)
    launcher.stop_workers(1)
    with pytest.raises(LaunchError, match="taken down"):
        launcher.replace_workers(config, 1)
    assert len(children) == 2
