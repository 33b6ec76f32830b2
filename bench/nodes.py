"""One replica over three Ray nodes on this machine, each in a network of its own: tensor parallel inside a node, stages
on different nodes. Its answers must be those of one process and of transformers.

sudo python bench/nodes.py [-- flags of manta serve]

A node is a network namespace with two interfaces: one that leads to the other nodes, and one that leads nowhere and
comes first. Nothing that takes an address of its own choice, or 127.0.0.1, for one that others reach can work here.
"""

import argparse
import contextlib
import ctypes
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import httpx

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

from ray_autoscaling import end_all

from tests.support.server import DEMO_MODEL, ROOT, ServerProcess

NUM_NODES = 3  # the first one has no CPUs: the command, the scheduler and the frontends
NET = "10.99.0"
PORT = 6379
FLAGS = ("-tp", "2", "-pp", "2", "--placement-strategy", "spread", "--dtype", "float32", "--kv-cache-memory-bytes",
         "16MiB", "--port", "0", "--grpc-port", "0")  # fmt: skip
PROMPTS = ("SELECT", "a", "How many users are there?")
NUM_TOKENS = 48
RAY = Path(sys.executable).with_name("ray")


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


@contextlib.contextmanager
def networks(number: int) -> Iterator[list[str]]:
    """Yields the names of namespaces, joined by a bridge. The nth has address NET.n, and another that leads nowhere."""
    tag = f"m{os.getpid() % 10000}"
    names, bridge = [f"{tag}n{index}" for index in range(1, number + 1)], f"{tag}br"
    ip("link", "add", bridge, "type", "bridge")
    ip("link", "set", bridge, "up")
    try:
        for index, name in enumerate(names, start=1):
            ip("netns", "add", name)
            ip("link", "add", f"{name}v", "type", "veth", "peer", "name", f"{name}p")
            ip("link", "add", f"{name}a", "type", "veth", "peer", "name", f"{name}b")
            ip("link", "set", f"{name}v", "master", bridge, "up")
            ip("link", "set", f"{name}p", "netns", name)
            for nowhere in (f"{name}a", f"{name}b"):
                ip("link", "set", nowhere, "netns", name)
                ip("-n", name, "link", "set", nowhere, "up")
            ip("-n", name, "addr", "add", f"10.98.{index}.1/24", "dev", f"{name}a")
            ip("-n", name, "addr", "add", f"{NET}.{index}/24", "dev", f"{name}p")
            for device in ("lo", f"{name}p"):
                ip("-n", name, "link", "set", device, "up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False)
        subprocess.run(["ip", "link", "del", bridge], check=False)


@contextlib.contextmanager
def inside(name: str) -> Iterator[None]:
    """This thread, and what it starts, live in the network of that name."""
    setns = ctypes.CDLL(None, use_errno=True).setns
    with Path("/proc/self/ns/net").open() as before, Path("/run/netns", name).open() as after:
        if setns(after.fileno(), 0):
            raise OSError(ctypes.get_errno(), f"cannot enter the network {name}")
        try:
            yield
        finally:
            setns(before.fileno(), 0)


@contextlib.contextmanager
def ray_nodes(names: list[str], cpus: list[int]) -> Iterator[str]:
    """A Ray node in each network. Yields the address of the first."""
    tag, folders = uuid.uuid4().hex, [tempfile.mkdtemp(prefix="ray-") for _ in names]
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": f"{folders[0]}/token"}
    Path(folders[0], "token").touch(0o600)
    Path(folders[0], "token").write_text(secrets.token_hex(32))
    try:
        for index, (name, folder) in enumerate(zip(names, folders, strict=True), start=1):
            words = [RAY, "start", "--block", "--num-cpus", str(cpus[index - 1]), "--node-ip-address", f"{NET}.{index}",
                     "--object-store-memory", str(80 * 2**20)]  # fmt: skip
            words += ["--address", f"{NET}.1:{PORT}"] if index > 1 else ["--head", "--port", str(PORT)]
            words += ["--include-dashboard", "false"] if index == 1 else []
            env = os.environ | {"MANTA_TEST_TAG": tag, "RAY_TMPDIR": folder}
            log = Path(folder, "node.log")
            with inside(name), log.open("w") as out:
                node = subprocess.Popen(words, stdout=out, stderr=out, env=env, cwd=ROOT, start_new_session=True)
            while "Ray runtime started" not in log.read_text():
                if node.poll() is not None:
                    raise RuntimeError(f"node {index} did not start: {log.read_text()[-500:]}")
                time.sleep(0.1)
        yield f"{NET}.1:{PORT}"
    finally:
        end_all(tag)
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)


def answers(url: str) -> list[str]:
    body = {"model": str(DEMO_MODEL), "max_tokens": NUM_TOKENS, "ignore_eos": True, "temperature": 0}
    return [
        httpx.post(f"{url}/v1/completions", json=body | {"prompt": prompt}, timeout=100).json()["choices"][0]["text"]
        for prompt in PROMPTS
    ]


def answers_of_transformers() -> list[str]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    model = AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype=torch.float32)
    texts = []
    for prompt in PROMPTS:
        tokens = tokenizer(prompt, return_tensors="pt").input_ids
        made = model.generate(tokens, do_sample=False, max_new_tokens=NUM_TOKENS, eos_token_id=None)
        texts.append(tokenizer.decode(made[0, tokens.shape[1] :], skip_special_tokens=True))
    return texts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("flags", nargs="*", help="of manta serve, after --")
    flags = (*FLAGS, *parser.parse_args().flags)
    single = ServerProcess(str(DEMO_MODEL), "--distributed-executor-backend", "local", "--dtype", "float32",
                           "--kv-cache-memory-bytes", "16MiB", "--port", "0", "--grpc-port", "0")  # fmt: skip
    with single.wait_ready() as server:
        alone = answers(server.url)
    with networks(NUM_NODES) as names, ray_nodes(names, [0, 2, 2]) as address, inside(names[0]):
        began_s = time.monotonic()
        with ServerProcess(str(DEMO_MODEL), "--ray-address", address, *flags).wait_ready() as server:
            took_s = time.monotonic() - began_s
            together = answers(server.url)
            parallel = next(line for line in server.lines if line.startswith("parallel"))
    theirs = answers_of_transformers()
    print(f"nodes        {NUM_NODES} networks, {NET}.1 to {NET}.{NUM_NODES}; ready after {took_s:.1f} s")
    print(parallel.strip())
    print(f"one process  {sum(a == b for a, b in zip(together, alone, strict=True))} of {len(alone)} texts equal")
    print(f"transformers {sum(a == b for a, b in zip(together, theirs, strict=True))} of {len(theirs)} texts equal")
    sys.exit(together != alone or together != theirs)


if __name__ == "__main__":
    main()
