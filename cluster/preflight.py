"""What can be known to fail before any process is started, checked in seconds: model, shape, memory, ports."""

import socket
from dataclasses import dataclass
from pathlib import Path

from manta.configs.model import ModelError, ModelSpec, read_model_spec
from manta.configs.pooling import PoolingSpec
from manta.configs.schema import ServeConfig

_DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
_PATHS = ("model", "tokenizer", "chat_template", "api_key_file", "ssl_certfile", "ssl_keyfile", "ssl_ca_certs")
_CONFIG_FILES = ["*.json", "*.jinja", "*.model", "*.txt"]


class PreflightError(Exception):
    """The deployment cannot work as asked; the message is one sentence that says what would."""


@dataclass(frozen=True, slots=True)
class ModelFacts:
    folder: Path  # holds at least config.json and the tokenizer
    spec: ModelSpec


def check(config: ServeConfig, *, on_gpu: bool, ports: bool = True) -> ModelFacts:
    """Raises PreflightError. `ports` False leaves the listening addresses alone (offline use)."""
    facts = read_model(config)
    check_parallel(config, facts.spec)
    if not on_gpu:
        check_host_memory(config, facts.spec)
    if ports:
        check_ports(config)
    return facts


def with_absolute_paths(config: ServeConfig) -> ServeConfig:
    """Other processes have other working directories, and not all who read a path know `~`. The name clients use stays
    what the user typed."""
    update = {"served_model_name": config.model_name}
    for name in _PATHS:
        value = getattr(config, name)
        if value and _exists(value):
            update[name] = str(Path(value).expanduser().resolve())
    if config.batch_dir is not None:  # it need not exist yet
        update["batch_dir"] = str(Path(config.batch_dir).expanduser().resolve())
    return config.model_copy(update=update)


def model_folder(config: ServeConfig) -> Path:
    """A local folder as it is; of a hub id, only the small files are fetched. Raises PreflightError."""
    folder = Path(config.model).expanduser()
    return folder if folder.is_dir() else _fetch_config(config.model)


def read_model(config: ServeConfig) -> ModelFacts:
    """Finds the folder and reads its config.json. Raises PreflightError."""
    folder = model_folder(config)
    try:
        facts = ModelFacts(folder, read_model_spec(folder))
        PoolingSpec.read(folder, config, facts.spec)
    except ModelError as error:
        raise PreflightError(str(error)) from None
    has_weights = any(folder.glob("*.safetensors"))
    if config.load_format != "dummy" and Path(config.model).expanduser().is_dir() and not has_weights:
        raise PreflightError(f"{config.model!r} has no .safetensors weights; --load-format dummy runs without any")
    return facts


def check_parallel(config: ServeConfig, spec: ModelSpec) -> None:
    """Heads and layers must split over the ranks."""
    tp, pp = config.tensor_parallel_size, config.pipeline_parallel_size
    if spec.num_heads % tp:
        raise PreflightError(
            f"--tensor-parallel-size {tp} does not divide the model's {spec.num_heads} attention heads; "
            f"use one of {_divisors(spec.num_heads)}"
        )
    if spec.num_kv_heads % tp and tp % spec.num_kv_heads:
        raise PreflightError(
            f"--tensor-parallel-size {tp} neither divides nor is a multiple of the model's {spec.num_kv_heads} KV heads"
        )
    if spec.intermediate_size % tp:
        raise PreflightError(
            f"--tensor-parallel-size {tp} does not divide the model's intermediate size {spec.intermediate_size}"
        )
    if pp > spec.num_layers:
        raise PreflightError(
            f"--pipeline-parallel-size {pp} is more than the model's {spec.num_layers} layers; use at most that many"
        )
    if config.max_model_len and config.max_model_len > spec.max_position:
        raise PreflightError(
            f"--max-model-len {config.max_model_len} is more than the {spec.max_position} positions of the model"
        )


def check_host_memory(config: ServeConfig, spec: ModelSpec) -> None:
    """Weights and KV blocks of all ranks against the memory of this host (CPU workers only)."""
    weights = spec.num_weights * dtype_bytes(config, spec)
    kv = int(config.kv_cache_memory_bytes or 0) * config.num_ranks
    free = available_memory_bytes()
    if free and config.max_num_replicas * (weights + kv) > free:
        raise PreflightError(
            f"too little memory: {config.max_num_replicas} x ({_gib(weights)} of weights + {_gib(kv)} of KV blocks) "
            f"do not fit into the {_gib(free)} free; use a smaller model, --dtype bfloat16 or fewer KV bytes"
        )
    if config.kv_cache_memory_bytes is None or config.num_gpu_blocks_override:
        return
    kv_heads = max(1, spec.num_kv_heads // config.tensor_parallel_size)
    layers = -(-spec.num_layers // config.pipeline_parallel_size)
    token_bytes = 2 * layers * kv_heads * spec.head_dim * dtype_bytes(config, spec)
    num_tokens = int(config.kv_cache_memory_bytes) // (token_bytes * config.block_size) * config.block_size
    needed = config.max_model_len or 2 * config.block_size
    if num_tokens < needed:
        raise PreflightError(
            f"--kv-cache-memory-bytes {config.kv_cache_memory_bytes} holds {num_tokens} tokens, and one sequence needs "
            f"{needed}; give at least {needed * token_bytes} bytes or lower --max-model-len"
        )


def check_ports(config: ServeConfig) -> None:
    """Both listening ports must be free. A port of 0 takes any."""
    for flag, port in (("--port", config.port), ("--grpc-port", config.grpc_port)):
        try:
            family = socket.getaddrinfo(config.host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        except OSError as error:
            raise PreflightError(f"--host {config.host}: {error.strerror}") from None
        with socket.socket(family[0], socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(family[4])
            except OSError as error:
                raise PreflightError(f"{flag} {port} cannot be used on {config.host}: {error.strerror}") from None


def dtype_bytes(config: ServeConfig, spec: ModelSpec) -> int:
    """Bytes of one weight as it will be held."""
    return _DTYPE_BYTES[spec.dtype if config.dtype == "auto" else config.dtype]


def available_memory_bytes() -> int:
    """What this host can still give; 0 where it cannot be told."""
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        return 0
    return 0


def _exists(path: str) -> bool:
    try:
        return Path(path).expanduser().exists()
    except OSError:  # a chat template that is given as text and longer than any name of a file
        return False


def _fetch_config(model: str) -> Path:
    looks_like_id = model.count("/") == 1 and not model.startswith((".", "/", "~"))
    if not looks_like_id:
        raise PreflightError(f"model folder {model!r} does not exist")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(model, allow_patterns=_CONFIG_FILES, etag_timeout=5))
    except RepositoryNotFoundError:
        raise PreflightError(f"{model!r} is neither a local folder nor a model on the hub you may read") from None
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        reason = " ".join(str(error).split())[:160]
        raise PreflightError(f"{model!r} is no local folder, and the hub cannot be reached ({reason})") from None


def _divisors(number: int) -> str:
    return ", ".join(str(n) for n in range(1, number + 1) if number % n == 0)


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.1f} GiB"
