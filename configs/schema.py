"""The configuration of one served model. Flags of `manta serve`, keys of a --config file and keywords of `LLM` are
these fields; nothing else configures Manta."""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ByteSize, ConfigDict, Field, model_validator

from manta.configs.api_keys import hash_keys
from manta.configs.resources import normal_resources
from manta.configs.tenant_weights import normal_weights

DTypeChoice = Literal["auto", "bfloat16", "float16", "float32"]
KVCacheDType = Literal["auto", "fp8", "fp8_e4m3"]
AttentionBackend = Literal["auto", "triton", "flashinfer", "sdpa"]
ToolFormat = Literal["hermes", "llama3_json", "mistral", "pythonic", "qwen3_coder"]
ReasoningTags = Literal["deepseek_r1", "glm45", "mistral", "qwen3", "seed_oss"]


def option(default: Any, group: str, help: str, short: str | None = None, **constraints: Any) -> Any:
    """A field with the heading it is listed under in --help and, for a few, a short flag such as -tp."""
    extra: dict[str, Any] = {"group": group, "short": short}
    return Field(default, description=help, json_schema_extra=extra, **constraints)


class ServeConfig(BaseModel):
    """Everything a deployment is told. Frozen; raises pydantic.ValidationError naming the field and what would work."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = option(..., "Model", "local Hugging Face folder or hub id")
    served_model_name: str | None = option(None, "Model", "name clients use; the model's own path if unset")
    tokenizer: str | None = option(None, "Model", "tokenizer folder or hub id; the model's if unset")
    dtype: DTypeChoice = option("auto", "Model", "weights and activations; auto follows the checkpoint")
    max_model_len: int | None = option(
        None, "Model", "prompt plus output, in tokens; the model's own limit if unset", ge=1
    )
    trust_remote_code: bool = option(False, "Model", "let the tokenizer run code from the model folder")
    load_format: Literal["auto", "safetensors", "dummy"] = option(
        "auto", "Model", "dummy gives random weights, for measurements"
    )
    seed: int = option(0, "Model", "seed of random weights and of unseeded requests' seeds", ge=0, le=2**32 - 1)
    pooling_type: Literal["last", "mean", "cls"] | None = option(
        None,
        "Model",
        "which hidden states become an embedding; unset: as the model's sentence-transformers files, or last",
    )
    pooling_normalize: Literal["auto", "on", "off"] = option(
        "auto", "Model", "bring embeddings to length 1; auto: as these files say, on without any"
    )
    chat_template: str | None = option(None, "Model", "jinja file or text used instead of the tokenizer's own")
    quantization: Literal["fp8"] | None = option(
        None,
        "Model",
        "fp8 quantises 16-bit weights as they are loaded, on GPUs of compute capability 8.9 and later; of checkpoints "
        "that are quantised already leave it out",
        short="q",
    )
    attention_backend: AttentionBackend = option(
        "auto", "Model", "attention on a GPU; auto takes triton where it is installed, else sdpa"
    )
    batch_invariant: bool = option(
        False, "Model", "on a GPU: a request's tokens have the same bits whatever else is in its steps; slower"
    )
    enforce_eager: bool = option(False, "Model", "launch decode steps operation by operation, without CUDA graphs")

    tensor_parallel_size: int = option(1, "Parallelism", "ranks that split every layer", short="tp", ge=1, le=64)
    pipeline_parallel_size: int = option(1, "Parallelism", "stages that split the layers", short="pp", ge=1, le=64)
    data_parallel_size: int = option(
        1, "Parallelism", "replicas of the model under one scheduler", short="dp", ge=1, le=256
    )
    min_replicas: int | None = option(
        None, "Parallelism", "fewest replicas, 0 possible: with max_replicas they follow the load", ge=0, le=256
    )
    max_replicas: int | None = option(None, "Parallelism", "most replicas; data_parallel_size if unset", ge=1, le=256)
    ttft_target_s: float = option(1.0, "Parallelism", "requests that wait so long call for another replica", gt=0.0)
    upscale_delay_s: float = option(2.0, "Parallelism", "seconds of load before replicas are added", ge=0.0)
    downscale_delay_s: float = option(120.0, "Parallelism", "seconds without need before one is taken away", ge=0.0)
    device: Literal["auto", "cpu", "cuda"] = option("auto", "Parallelism", "auto takes CUDA where there is one")
    distributed_executor_backend: Literal["ray", "local"] = option(
        "ray", "Parallelism", "what starts the processes: Ray actors, or plain processes"
    )
    ray_address: str | None = option(
        None, "Parallelism", "Ray cluster to join; unset: that of RAY_ADDRESS, or a new local one"
    )
    placement_strategy: Literal["pack", "spread", "any"] = option(
        "pack",
        "Parallelism",
        "on Ray; pack: ranks of a stage share a node, and stages as few nodes as can be; spread: each stage has a node "
        "of its own; any: each rank where there is room",
    )
    worker_resources: Annotated[str, BeforeValidator(normal_resources)] = option(
        "",
        "Parallelism",
        "what a worker asks of Ray beside its GPU, as CPU=2,accelerator_type:H100=0.001 or JSON; unset: one CPU, or on "
        "CPUs what there is",
    )

    gpu_memory_utilization: float = option(
        0.9, "KV cache", "share of a GPU's memory for weights, activations and KV blocks", gt=0.0, le=1.0
    )
    kv_cache_memory_bytes: ByteSize | None = option(
        None,
        "KV cache",
        "bytes of KV blocks per rank, as 4GiB; unset on a CPU: a quarter of free memory over all ranks, at most 4GiB",
    )
    block_size: int = option(16, "KV cache", "tokens per KV block, a power of two", ge=8, le=256)
    num_gpu_blocks_override: int | None = option(
        None, "KV cache", "KV blocks, instead of what the profiling run finds", ge=2
    )
    kv_cache_dtype: KVCacheDType = option(
        "auto", "KV cache", "fp8 (e4m3) halves the bytes of 16-bit KV blocks; auto: as the activations"
    )
    enable_prefix_caching: bool = option(True, "KV cache", "reuse KV blocks of equal prompt prefixes")

    max_num_seqs: int = option(256, "Scheduler", "sequences that run at once, per replica", ge=1, le=65536)
    max_num_batched_tokens: int = option(2048, "Scheduler", "tokens computed in one step, per replica", ge=1)
    enable_chunked_prefill: bool = option(True, "Scheduler", "let a long prompt take several steps")
    scheduling_policy: Literal["fcfs", "priority", "fair"] = option(
        "fcfs", "Scheduler", "order of the queue; priority: lower value first; fair: the tenant that was served least"
    )
    tenant_weights: Annotated[str, BeforeValidator(normal_weights)] = option(
        "", "Scheduler", "with fair: shares of tenants, as a=2,b=1 or JSON; 1 for those not named"
    )
    max_num_queued_reqs: int = option(4096, "Scheduler", "requests that may wait; one more gets 503", ge=1)
    max_num_queued_tokens: int | None = option(
        None, "Scheduler", "prompt tokens that may wait, all requests together", ge=1
    )

    host: str = option("0.0.0.0", "Front end", "address to listen on")
    port: int = option(8000, "Front end", "HTTP port", ge=0, le=65535)
    grpc_port: int = option(50051, "Front end", "gRPC port", ge=0, le=65535)
    api_server_count: int = option(1, "Front end", "frontend processes that share the two ports", ge=1, le=64)
    enable_auto_tool_choice: bool = option(False, "Front end", "let the model decide whether it calls tools")
    tool_call_parser: ToolFormat | None = option(None, "Front end", "how the model writes calls of tools")
    reasoning_parser: ReasoningTags | None = option(
        None, "Front end", "how the model marks what it thinks; chat tells it beside the content"
    )
    max_stored_responses: int = option(
        10_000, "Front end", "answers of /v1/responses that a frontend keeps; 0 keeps none", ge=0
    )
    max_stored_response_bytes: ByteSize = option(
        ByteSize(256 * 2**20), "Front end", "memory for them; the oldest go first", ge=0
    )
    shutdown_timeout: float = option(
        30.0, "Front end", "seconds that running requests get to finish on shutdown", ge=0.0
    )
    restart_limit: int = option(
        3,
        "Front end",
        "a worker group, the scheduler or a frontend that fails so often within a minute is given up",
        ge=1,
    )
    standby_workers: int = option(
        0,
        "Front end",
        "processes without a device, 200 MB each, that have done what a new worker does first when another one dies; "
        "local backend only",
        ge=0,
        le=64,
    )
    worker_lease: float = option(
        180.0,
        "Front end",
        "seconds without a word of the scheduler after which a worker ends; frontends wait 120 for a scheduler",
        ge=5.0,
    )
    batch_dir: str | None = option(
        None, "Batches", "folder on a local disk for /v1/files and /v1/batches, which do not exist without it"
    )
    max_batch_file_bytes: ByteSize = option(ByteSize(200 * 2**20), "Batches", "bytes of an uploaded file", ge=1)
    max_batch_bytes: ByteSize = option(
        ByteSize(10 * 2**30), "Batches", "bytes of a tenant's files; beyond them uploads are refused", ge=1
    )
    max_num_batch_seqs: int = option(
        8, "Batches", "sequences of batches that run beside other requests; alone they may take nearly all slots", ge=0
    )
    # Held as hashes, and never part of the JSON that goes from process to process: see configs.api_keys.
    api_key: Annotated[tuple[str, ...], BeforeValidator(hash_keys)] = option(
        (),
        "Front end",
        "key that calls must bring, plain or as sha256:HEX; may be repeated; see also MANTA_API_KEY",
        exclude=True,
        repr=False,
    )
    api_key_file: str | None = option(
        None, "Front end", "file of such keys, one 'key' or 'tenant:key' a line; read again when it changes"
    )
    tenant_cache_isolation: bool = option(
        True, "Front end", "with API keys: no tenant finds another one's prompts in the prefix cache"
    )
    ssl_certfile: str | None = option(
        None, "Front end", "certificate chain in PEM: both doors speak TLS; read again when it changes"
    )
    ssl_keyfile: str | None = option(None, "Front end", "its private key in PEM; that in ssl_certfile if unset")
    ssl_ca_certs: str | None = option(None, "Front end", "certificates in PEM that sign those of clients")
    ssl_cert_reqs: int = option(
        0, "Front end", "2: clients need a certificate that ssl_ca_certs signs; 0: they need none", ge=0, le=2
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens={self.max_num_batched_tokens} must be at least max_num_seqs="
                f"{self.max_num_seqs}: every running sequence takes one token of a step"
            )
        if self.block_size & (self.block_size - 1):
            raise ValueError(f"block_size={self.block_size} must be a power of two")
        if self.enable_auto_tool_choice and self.tool_call_parser is None:
            raise ValueError("enable_auto_tool_choice needs tool_call_parser: how the model writes calls")
        self._check_replicas()
        self._check_kernels()
        self._check_tls()
        if self.tenant_weights and self.scheduling_policy != "fair":
            raise ValueError("tenant_weights are for scheduling_policy=fair")
        if self.port and self.port == self.grpc_port:
            raise ValueError(f"port and grpc_port are both {self.port}; they must differ")
        return self

    def _check_replicas(self) -> None:
        lowest, start, highest = self.min_num_replicas, self.data_parallel_size, self.max_num_replicas
        if "data_parallel_size" not in self.model_fields_set:
            start = self.num_replicas_at_start
        if not lowest <= start <= highest:
            raise ValueError(
                f"min_replicas={lowest}, data_parallel_size={start} (replicas at the start) and max_replicas={highest} "
                f"must not decrease"
            )
        if self.standby_workers and self.distributed_executor_backend != "local":
            raise ValueError("standby_workers are plain processes; they need distributed_executor_backend=local")

    def _check_tls(self) -> None:
        for name in ("ssl_keyfile", "ssl_ca_certs", "ssl_cert_reqs"):
            if getattr(self, name) and not self.ssl_certfile:
                raise ValueError(f"{name} is for TLS, which needs ssl_certfile, too")
        if self.ssl_cert_reqs == 1:
            raise ValueError("ssl_cert_reqs=1 (clients may have a certificate) is not possible over gRPC; use 0 or 2")
        if (self.ssl_cert_reqs == 2) != bool(self.ssl_ca_certs):
            raise ValueError("ssl_cert_reqs=2 and ssl_ca_certs need each other")

    def _check_kernels(self) -> None:
        """Flags of GPU kernels that cannot go together, or not with a CPU."""
        backend = self.attention_backend
        if self.batch_invariant and backend not in ("auto", "triton"):
            raise ValueError(
                f"batch_invariant does not go with attention_backend={backend}, whose results depend on the batch; "
                f"use triton"
            )
        if self.kv_cache_dtype != "auto" and backend == "flashinfer":
            raise ValueError(
                f"kv_cache_dtype={self.kv_cache_dtype} does not go with attention_backend=flashinfer; use triton"
            )
        if self.device == "cpu":
            asked = {"attention_backend": backend != "auto", "batch_invariant": self.batch_invariant}
            asked["quantization"] = self.quantization is not None
            for name, is_asked in asked.items():
                if is_asked:
                    raise ValueError(f"{name} chooses kernels of GPUs; with device=cpu leave it out")

    @property
    def model_name(self) -> str:
        """The name clients use."""
        return self.served_model_name or self.model

    @property
    def min_num_replicas(self) -> int:
        return min(self.data_parallel_size, self.max_num_replicas) if self.min_replicas is None else self.min_replicas

    @property
    def max_num_replicas(self) -> int:
        if self.max_replicas is None:
            return max(self.data_parallel_size, self.min_replicas or 0)
        return self.max_replicas

    @property
    def num_replicas_at_start(self) -> int:
        """One at least: what the model needs is known once it has been loaded."""
        return min(max(self.data_parallel_size, self.min_num_replicas, 1), self.max_num_replicas)

    @property
    def num_ranks(self) -> int:
        """Workers of one replica."""
        return self.tensor_parallel_size * self.pipeline_parallel_size
