from manta.protos import sampling_pb2 as _sampling_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class FrontendMessage(_message.Message):
    __slots__ = ("submit", "abort")
    SUBMIT_FIELD_NUMBER: _ClassVar[int]
    ABORT_FIELD_NUMBER: _ClassVar[int]
    submit: Submit
    abort: Abort
    def __init__(self, submit: _Optional[_Union[Submit, _Mapping]] = ..., abort: _Optional[_Union[Abort, _Mapping]] = ...) -> None: ...

class Submit(_message.Message):
    __slots__ = ("handle", "request_id", "prompt_tokens", "output_tokens", "max_tokens", "ignore_eos", "stop_token_ids", "sampling", "priority", "tenant", "adapter", "cache_salt", "num_sequences", "beams", "pooling", "resubmitted")
    HANDLE_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    IGNORE_EOS_FIELD_NUMBER: _ClassVar[int]
    STOP_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    CACHE_SALT_FIELD_NUMBER: _ClassVar[int]
    NUM_SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    BEAMS_FIELD_NUMBER: _ClassVar[int]
    POOLING_FIELD_NUMBER: _ClassVar[int]
    RESUBMITTED_FIELD_NUMBER: _ClassVar[int]
    handle: int
    request_id: str
    prompt_tokens: bytes
    output_tokens: bytes
    max_tokens: int
    ignore_eos: bool
    stop_token_ids: _containers.RepeatedScalarFieldContainer[int]
    sampling: _sampling_pb2.Sampling
    priority: int
    tenant: str
    adapter: str
    cache_salt: bytes
    num_sequences: int
    beams: Beams
    pooling: _sampling_pb2.Pooling
    resubmitted: bool
    def __init__(self, handle: _Optional[int] = ..., request_id: _Optional[str] = ..., prompt_tokens: _Optional[bytes] = ..., output_tokens: _Optional[bytes] = ..., max_tokens: _Optional[int] = ..., ignore_eos: bool = ..., stop_token_ids: _Optional[_Iterable[int]] = ..., sampling: _Optional[_Union[_sampling_pb2.Sampling, _Mapping]] = ..., priority: _Optional[int] = ..., tenant: _Optional[str] = ..., adapter: _Optional[str] = ..., cache_salt: _Optional[bytes] = ..., num_sequences: _Optional[int] = ..., beams: _Optional[_Union[Beams, _Mapping]] = ..., pooling: _Optional[_Union[_sampling_pb2.Pooling, _Mapping]] = ..., resubmitted: bool = ...) -> None: ...

class Beams(_message.Message):
    __slots__ = ("width", "length_penalty", "early_stopping")
    class EarlyStopping(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        HEURISTIC: _ClassVar[Beams.EarlyStopping]
        AT_ONCE: _ClassVar[Beams.EarlyStopping]
        NEVER: _ClassVar[Beams.EarlyStopping]
    HEURISTIC: Beams.EarlyStopping
    AT_ONCE: Beams.EarlyStopping
    NEVER: Beams.EarlyStopping
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    LENGTH_PENALTY_FIELD_NUMBER: _ClassVar[int]
    EARLY_STOPPING_FIELD_NUMBER: _ClassVar[int]
    width: int
    length_penalty: float
    early_stopping: Beams.EarlyStopping
    def __init__(self, width: _Optional[int] = ..., length_penalty: _Optional[float] = ..., early_stopping: _Optional[_Union[Beams.EarlyStopping, str]] = ...) -> None: ...

class Abort(_message.Message):
    __slots__ = ("handles",)
    HANDLES_FIELD_NUMBER: _ClassVar[int]
    handles: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, handles: _Optional[_Iterable[int]] = ...) -> None: ...

class EngineMessage(_message.Message):
    __slots__ = ("handles", "tokens", "started", "finished", "refused", "error", "logprobs")
    HANDLES_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    STARTED_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    handles: bytes
    tokens: bytes
    started: _containers.RepeatedCompositeFieldContainer[Started]
    finished: _containers.RepeatedCompositeFieldContainer[Finished]
    refused: _containers.RepeatedCompositeFieldContainer[Refused]
    error: str
    logprobs: _containers.RepeatedCompositeFieldContainer[Logprobs]
    def __init__(self, handles: _Optional[bytes] = ..., tokens: _Optional[bytes] = ..., started: _Optional[_Iterable[_Union[Started, _Mapping]]] = ..., finished: _Optional[_Iterable[_Union[Finished, _Mapping]]] = ..., refused: _Optional[_Iterable[_Union[Refused, _Mapping]]] = ..., error: _Optional[str] = ..., logprobs: _Optional[_Iterable[_Union[Logprobs, _Mapping]]] = ...) -> None: ...

class Logprobs(_message.Message):
    __slots__ = ("handle", "prompt", "sampled")
    HANDLE_FIELD_NUMBER: _ClassVar[int]
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    SAMPLED_FIELD_NUMBER: _ClassVar[int]
    handle: int
    prompt: bytes
    sampled: bytes
    def __init__(self, handle: _Optional[int] = ..., prompt: _Optional[bytes] = ..., sampled: _Optional[bytes] = ...) -> None: ...

class Started(_message.Message):
    __slots__ = ("handle", "num_cached_tokens", "queue_s")
    HANDLE_FIELD_NUMBER: _ClassVar[int]
    NUM_CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    QUEUE_S_FIELD_NUMBER: _ClassVar[int]
    handle: int
    num_cached_tokens: int
    queue_s: float
    def __init__(self, handle: _Optional[int] = ..., num_cached_tokens: _Optional[int] = ..., queue_s: _Optional[float] = ...) -> None: ...

class Finished(_message.Message):
    __slots__ = ("handle", "reason", "stop_token", "error", "cumulative_logprob", "vector")
    HANDLE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    STOP_TOKEN_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    CUMULATIVE_LOGPROB_FIELD_NUMBER: _ClassVar[int]
    VECTOR_FIELD_NUMBER: _ClassVar[int]
    handle: int
    reason: str
    stop_token: int
    error: str
    cumulative_logprob: float
    vector: bytes
    def __init__(self, handle: _Optional[int] = ..., reason: _Optional[str] = ..., stop_token: _Optional[int] = ..., error: _Optional[str] = ..., cumulative_logprob: _Optional[float] = ..., vector: _Optional[bytes] = ...) -> None: ...

class Refused(_message.Message):
    __slots__ = ("handle", "code", "message", "retry_after_s")
    class Code(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        UNKNOWN: _ClassVar[Refused.Code]
        INVALID: _ClassVar[Refused.Code]
        QUEUE_FULL: _ClassVar[Refused.Code]
        DRAINING: _ClassVar[Refused.Code]
        UNAVAILABLE: _ClassVar[Refused.Code]
    UNKNOWN: Refused.Code
    INVALID: Refused.Code
    QUEUE_FULL: Refused.Code
    DRAINING: Refused.Code
    UNAVAILABLE: Refused.Code
    HANDLE_FIELD_NUMBER: _ClassVar[int]
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    RETRY_AFTER_S_FIELD_NUMBER: _ClassVar[int]
    handle: int
    code: Refused.Code
    message: str
    retry_after_s: float
    def __init__(self, handle: _Optional[int] = ..., code: _Optional[_Union[Refused.Code, str]] = ..., message: _Optional[str] = ..., retry_after_s: _Optional[float] = ...) -> None: ...

class InfoRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class InfoResponse(_message.Message):
    __slots__ = ("config_json", "num_blocks", "block_size", "max_model_len", "device", "weight_bytes", "bytes_per_block", "startup_s", "num_replicas", "link_port", "link_socket", "link_key")
    class StartupSEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    CONFIG_JSON_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    MAX_MODEL_LEN_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_BYTES_FIELD_NUMBER: _ClassVar[int]
    BYTES_PER_BLOCK_FIELD_NUMBER: _ClassVar[int]
    STARTUP_S_FIELD_NUMBER: _ClassVar[int]
    NUM_REPLICAS_FIELD_NUMBER: _ClassVar[int]
    LINK_PORT_FIELD_NUMBER: _ClassVar[int]
    LINK_SOCKET_FIELD_NUMBER: _ClassVar[int]
    LINK_KEY_FIELD_NUMBER: _ClassVar[int]
    config_json: str
    num_blocks: int
    block_size: int
    max_model_len: int
    device: str
    weight_bytes: int
    bytes_per_block: int
    startup_s: _containers.ScalarMap[str, float]
    num_replicas: int
    link_port: int
    link_socket: str
    link_key: bytes
    def __init__(self, config_json: _Optional[str] = ..., num_blocks: _Optional[int] = ..., block_size: _Optional[int] = ..., max_model_len: _Optional[int] = ..., device: _Optional[str] = ..., weight_bytes: _Optional[int] = ..., bytes_per_block: _Optional[int] = ..., startup_s: _Optional[_Mapping[str, float]] = ..., num_replicas: _Optional[int] = ..., link_port: _Optional[int] = ..., link_socket: _Optional[str] = ..., link_key: _Optional[bytes] = ...) -> None: ...

class LoadRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class LoadResponse(_message.Message):
    __slots__ = ("num_running", "num_waiting", "num_free_blocks", "num_blocks", "kv_cache_usage", "num_waiting_tokens", "healthy", "detail", "num_background", "replicas", "oldest_wait_s", "num_arrived")
    NUM_RUNNING_FIELD_NUMBER: _ClassVar[int]
    NUM_WAITING_FIELD_NUMBER: _ClassVar[int]
    NUM_FREE_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    KV_CACHE_USAGE_FIELD_NUMBER: _ClassVar[int]
    NUM_WAITING_TOKENS_FIELD_NUMBER: _ClassVar[int]
    HEALTHY_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    NUM_BACKGROUND_FIELD_NUMBER: _ClassVar[int]
    REPLICAS_FIELD_NUMBER: _ClassVar[int]
    OLDEST_WAIT_S_FIELD_NUMBER: _ClassVar[int]
    NUM_ARRIVED_FIELD_NUMBER: _ClassVar[int]
    num_running: int
    num_waiting: int
    num_free_blocks: int
    num_blocks: int
    kv_cache_usage: float
    num_waiting_tokens: int
    healthy: bool
    detail: str
    num_background: int
    replicas: _containers.RepeatedCompositeFieldContainer[ReplicaLoad]
    oldest_wait_s: float
    num_arrived: int
    def __init__(self, num_running: _Optional[int] = ..., num_waiting: _Optional[int] = ..., num_free_blocks: _Optional[int] = ..., num_blocks: _Optional[int] = ..., kv_cache_usage: _Optional[float] = ..., num_waiting_tokens: _Optional[int] = ..., healthy: bool = ..., detail: _Optional[str] = ..., num_background: _Optional[int] = ..., replicas: _Optional[_Iterable[_Union[ReplicaLoad, _Mapping]]] = ..., oldest_wait_s: _Optional[float] = ..., num_arrived: _Optional[int] = ...) -> None: ...

class ReplicaLoad(_message.Message):
    __slots__ = ("state", "detail", "num_free_blocks", "num_blocks", "num_running", "num_excused")
    class State(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        SERVING: _ClassVar[ReplicaLoad.State]
        LOST: _ClassVar[ReplicaLoad.State]
        GIVEN_UP: _ClassVar[ReplicaLoad.State]
        ABSENT: _ClassVar[ReplicaLoad.State]
    SERVING: ReplicaLoad.State
    LOST: ReplicaLoad.State
    GIVEN_UP: ReplicaLoad.State
    ABSENT: ReplicaLoad.State
    STATE_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    NUM_FREE_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    NUM_RUNNING_FIELD_NUMBER: _ClassVar[int]
    NUM_EXCUSED_FIELD_NUMBER: _ClassVar[int]
    state: ReplicaLoad.State
    detail: str
    num_free_blocks: int
    num_blocks: int
    num_running: int
    num_excused: int
    def __init__(self, state: _Optional[_Union[ReplicaLoad.State, str]] = ..., detail: _Optional[str] = ..., num_free_blocks: _Optional[int] = ..., num_blocks: _Optional[int] = ..., num_running: _Optional[int] = ..., num_excused: _Optional[int] = ...) -> None: ...

class ReplaceWorkersRequest(_message.Message):
    __slots__ = ("replica", "workers")
    REPLICA_FIELD_NUMBER: _ClassVar[int]
    WORKERS_FIELD_NUMBER: _ClassVar[int]
    replica: int
    workers: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, replica: _Optional[int] = ..., workers: _Optional[_Iterable[str]] = ...) -> None: ...

class ReplaceWorkersResponse(_message.Message):
    __slots__ = ("took_s",)
    TOOK_S_FIELD_NUMBER: _ClassVar[int]
    took_s: float
    def __init__(self, took_s: _Optional[float] = ...) -> None: ...

class GiveUpReplicaRequest(_message.Message):
    __slots__ = ("replica", "reason")
    REPLICA_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    replica: int
    reason: str
    def __init__(self, replica: _Optional[int] = ..., reason: _Optional[str] = ...) -> None: ...

class GiveUpReplicaResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class RetireReplicaRequest(_message.Message):
    __slots__ = ("replica",)
    REPLICA_FIELD_NUMBER: _ClassVar[int]
    replica: int
    def __init__(self, replica: _Optional[int] = ...) -> None: ...

class RetireReplicaResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class MetricsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class MetricsResponse(_message.Message):
    __slots__ = ("text",)
    TEXT_FIELD_NUMBER: _ClassVar[int]
    text: bytes
    def __init__(self, text: _Optional[bytes] = ...) -> None: ...

class BlockTablesRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class BlockTablesResponse(_message.Message):
    __slots__ = ("sequences", "num_blocks", "num_free_blocks", "num_cached_blocks", "block_size")
    SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    NUM_FREE_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    NUM_CACHED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    sequences: _containers.RepeatedCompositeFieldContainer[SequenceBlocks]
    num_blocks: int
    num_free_blocks: int
    num_cached_blocks: int
    block_size: int
    def __init__(self, sequences: _Optional[_Iterable[_Union[SequenceBlocks, _Mapping]]] = ..., num_blocks: _Optional[int] = ..., num_free_blocks: _Optional[int] = ..., num_cached_blocks: _Optional[int] = ..., block_size: _Optional[int] = ...) -> None: ...

class SequenceBlocks(_message.Message):
    __slots__ = ("request_id", "replica", "slot", "status", "num_tokens", "num_computed", "blocks", "ref_counts")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    REPLICA_FIELD_NUMBER: _ClassVar[int]
    SLOT_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_COMPUTED_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    REF_COUNTS_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    replica: int
    slot: int
    status: str
    num_tokens: int
    num_computed: int
    blocks: _containers.RepeatedScalarFieldContainer[int]
    ref_counts: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, request_id: _Optional[str] = ..., replica: _Optional[int] = ..., slot: _Optional[int] = ..., status: _Optional[str] = ..., num_tokens: _Optional[int] = ..., num_computed: _Optional[int] = ..., blocks: _Optional[_Iterable[int]] = ..., ref_counts: _Optional[_Iterable[int]] = ...) -> None: ...

class DrainRequest(_message.Message):
    __slots__ = ("timeout_s",)
    TIMEOUT_S_FIELD_NUMBER: _ClassVar[int]
    timeout_s: float
    def __init__(self, timeout_s: _Optional[float] = ...) -> None: ...

class DrainResponse(_message.Message):
    __slots__ = ("drained",)
    DRAINED_FIELD_NUMBER: _ClassVar[int]
    drained: bool
    def __init__(self, drained: bool = ...) -> None: ...
