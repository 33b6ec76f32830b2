from manta.protos import sampling_pb2 as _sampling_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ImportBlocksRequest(_message.Message):
    __slots__ = ("epoch", "peer", "peer_epoch", "peer_blocks", "blocks")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    PEER_FIELD_NUMBER: _ClassVar[int]
    PEER_EPOCH_FIELD_NUMBER: _ClassVar[int]
    PEER_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    peer: str
    peer_epoch: int
    peer_blocks: bytes
    blocks: bytes
    def __init__(self, epoch: _Optional[int] = ..., peer: _Optional[str] = ..., peer_epoch: _Optional[int] = ..., peer_blocks: _Optional[bytes] = ..., blocks: _Optional[bytes] = ...) -> None: ...

class ImportBlocksResponse(_message.Message):
    __slots__ = ("num_bytes", "took_s")
    NUM_BYTES_FIELD_NUMBER: _ClassVar[int]
    TOOK_S_FIELD_NUMBER: _ClassVar[int]
    num_bytes: int
    took_s: float
    def __init__(self, num_bytes: _Optional[int] = ..., took_s: _Optional[float] = ...) -> None: ...

class ExportBlocksRequest(_message.Message):
    __slots__ = ("epoch", "blocks", "layout")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    blocks: bytes
    layout: str
    def __init__(self, epoch: _Optional[int] = ..., blocks: _Optional[bytes] = ..., layout: _Optional[str] = ...) -> None: ...

class BlockChunk(_message.Message):
    __slots__ = ("num_blocks", "data")
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    num_blocks: int
    data: bytes
    def __init__(self, num_blocks: _Optional[int] = ..., data: _Optional[bytes] = ...) -> None: ...

class CompileRequest(_message.Message):
    __slots__ = ("grammar",)
    GRAMMAR_FIELD_NUMBER: _ClassVar[int]
    grammar: _sampling_pb2.Grammar
    def __init__(self, grammar: _Optional[_Union[_sampling_pb2.Grammar, _Mapping]] = ...) -> None: ...

class CompileResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DescribeRequest(_message.Message):
    __slots__ = ("open_rendezvous",)
    OPEN_RENDEZVOUS_FIELD_NUMBER: _ClassVar[int]
    open_rendezvous: bool
    def __init__(self, open_rendezvous: bool = ...) -> None: ...

class DescribeResponse(_message.Message):
    __slots__ = ("host", "rendezvous_port", "device", "pid", "link_port", "link_socket", "link_key")
    HOST_FIELD_NUMBER: _ClassVar[int]
    RENDEZVOUS_PORT_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    LINK_PORT_FIELD_NUMBER: _ClassVar[int]
    LINK_SOCKET_FIELD_NUMBER: _ClassVar[int]
    LINK_KEY_FIELD_NUMBER: _ClassVar[int]
    host: str
    rendezvous_port: int
    device: str
    pid: int
    link_port: int
    link_socket: str
    link_key: bytes
    def __init__(self, host: _Optional[str] = ..., rendezvous_port: _Optional[int] = ..., device: _Optional[str] = ..., pid: _Optional[int] = ..., link_port: _Optional[int] = ..., link_socket: _Optional[str] = ..., link_key: _Optional[bytes] = ...) -> None: ...

class LoadRequest(_message.Message):
    __slots__ = ("config_json", "tp_rank", "pp_rank", "num_workers_on_host", "rendezvous_host", "rendezvous_port", "peers", "meeting")
    CONFIG_JSON_FIELD_NUMBER: _ClassVar[int]
    TP_RANK_FIELD_NUMBER: _ClassVar[int]
    PP_RANK_FIELD_NUMBER: _ClassVar[int]
    NUM_WORKERS_ON_HOST_FIELD_NUMBER: _ClassVar[int]
    RENDEZVOUS_HOST_FIELD_NUMBER: _ClassVar[int]
    RENDEZVOUS_PORT_FIELD_NUMBER: _ClassVar[int]
    PEERS_FIELD_NUMBER: _ClassVar[int]
    MEETING_FIELD_NUMBER: _ClassVar[int]
    config_json: str
    tp_rank: int
    pp_rank: int
    num_workers_on_host: int
    rendezvous_host: str
    rendezvous_port: int
    peers: _containers.RepeatedScalarFieldContainer[str]
    meeting: str
    def __init__(self, config_json: _Optional[str] = ..., tp_rank: _Optional[int] = ..., pp_rank: _Optional[int] = ..., num_workers_on_host: _Optional[int] = ..., rendezvous_host: _Optional[str] = ..., rendezvous_port: _Optional[int] = ..., peers: _Optional[_Iterable[str]] = ..., meeting: _Optional[str] = ...) -> None: ...

class LoadResponse(_message.Message):
    __slots__ = ("num_blocks", "weight_bytes", "bytes_per_block", "load_s", "profile_s")
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_BYTES_FIELD_NUMBER: _ClassVar[int]
    BYTES_PER_BLOCK_FIELD_NUMBER: _ClassVar[int]
    LOAD_S_FIELD_NUMBER: _ClassVar[int]
    PROFILE_S_FIELD_NUMBER: _ClassVar[int]
    num_blocks: int
    weight_bytes: int
    bytes_per_block: int
    load_s: float
    profile_s: float
    def __init__(self, num_blocks: _Optional[int] = ..., weight_bytes: _Optional[int] = ..., bytes_per_block: _Optional[int] = ..., load_s: _Optional[float] = ..., profile_s: _Optional[float] = ...) -> None: ...

class StartRequest(_message.Message):
    __slots__ = ("num_blocks",)
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    num_blocks: int
    def __init__(self, num_blocks: _Optional[int] = ...) -> None: ...

class StartResponse(_message.Message):
    __slots__ = ("warmup_s", "last_epoch", "last_step")
    WARMUP_S_FIELD_NUMBER: _ClassVar[int]
    LAST_EPOCH_FIELD_NUMBER: _ClassVar[int]
    LAST_STEP_FIELD_NUMBER: _ClassVar[int]
    warmup_s: float
    last_epoch: int
    last_step: int
    def __init__(self, warmup_s: _Optional[float] = ..., last_epoch: _Optional[int] = ..., last_step: _Optional[int] = ...) -> None: ...

class SeqAdd(_message.Message):
    __slots__ = ("slot", "lane", "tokens", "num_prompt_tokens", "num_computed", "max_length", "blocks", "sampling", "pooling")
    SLOT_FIELD_NUMBER: _ClassVar[int]
    LANE_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_COMPUTED_FIELD_NUMBER: _ClassVar[int]
    MAX_LENGTH_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    POOLING_FIELD_NUMBER: _ClassVar[int]
    slot: int
    lane: int
    tokens: bytes
    num_prompt_tokens: int
    num_computed: int
    max_length: int
    blocks: bytes
    sampling: _sampling_pb2.Sampling
    pooling: _sampling_pb2.Pooling
    def __init__(self, slot: _Optional[int] = ..., lane: _Optional[int] = ..., tokens: _Optional[bytes] = ..., num_prompt_tokens: _Optional[int] = ..., num_computed: _Optional[int] = ..., max_length: _Optional[int] = ..., blocks: _Optional[bytes] = ..., sampling: _Optional[_Union[_sampling_pb2.Sampling, _Mapping]] = ..., pooling: _Optional[_Union[_sampling_pb2.Pooling, _Mapping]] = ...) -> None: ...

class StepPlan(_message.Message):
    __slots__ = ("epoch", "step", "lane", "frees", "adds", "grow", "copies", "holds", "prefill_slots", "prefill_lengths")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    LANE_FIELD_NUMBER: _ClassVar[int]
    FREES_FIELD_NUMBER: _ClassVar[int]
    ADDS_FIELD_NUMBER: _ClassVar[int]
    GROW_FIELD_NUMBER: _ClassVar[int]
    COPIES_FIELD_NUMBER: _ClassVar[int]
    HOLDS_FIELD_NUMBER: _ClassVar[int]
    PREFILL_SLOTS_FIELD_NUMBER: _ClassVar[int]
    PREFILL_LENGTHS_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    step: int
    lane: int
    frees: bytes
    adds: _containers.RepeatedCompositeFieldContainer[SeqAdd]
    grow: _containers.RepeatedScalarFieldContainer[int]
    copies: bytes
    holds: bytes
    prefill_slots: bytes
    prefill_lengths: bytes
    def __init__(self, epoch: _Optional[int] = ..., step: _Optional[int] = ..., lane: _Optional[int] = ..., frees: _Optional[bytes] = ..., adds: _Optional[_Iterable[_Union[SeqAdd, _Mapping]]] = ..., grow: _Optional[_Iterable[int]] = ..., copies: _Optional[bytes] = ..., holds: _Optional[bytes] = ..., prefill_slots: _Optional[bytes] = ..., prefill_lengths: _Optional[bytes] = ...) -> None: ...

class StepResult(_message.Message):
    __slots__ = ("epoch", "step", "tokens", "device_us", "idle_us", "queue_us", "error", "logprobs", "vectors")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    DEVICE_US_FIELD_NUMBER: _ClassVar[int]
    IDLE_US_FIELD_NUMBER: _ClassVar[int]
    QUEUE_US_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    VECTORS_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    step: int
    tokens: bytes
    device_us: int
    idle_us: int
    queue_us: int
    error: str
    logprobs: bytes
    vectors: bytes
    def __init__(self, epoch: _Optional[int] = ..., step: _Optional[int] = ..., tokens: _Optional[bytes] = ..., device_us: _Optional[int] = ..., idle_us: _Optional[int] = ..., queue_us: _Optional[int] = ..., error: _Optional[str] = ..., logprobs: _Optional[bytes] = ..., vectors: _Optional[bytes] = ...) -> None: ...
