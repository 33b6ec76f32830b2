"""What a rank takes of its GPU beside weights and KV blocks.

The tables of steps are counted as workers allocate them. Activations are the tensors that live at the worst moment of
the largest step, by the layers' code. Libraries and the CUDA context are assumptions: a worker measures them as it
starts (`workers/gpu_memory.py`), and what it finds decides.
"""

from manta.configs.model import DType, ModelSpec
from manta.configs.schema import ServeConfig
from manta.configs.weights import LAYER_RULES, Place, local_size, padded_vocab_size, stage_layers

ITEMSIZE: dict[DType, int] = {"bfloat16": 2, "float16": 2, "float32": 4}
CONTEXT_BYTES = 512 * 2**20
LIBRARY_BYTES = 256 * 2**20  # cuBLAS, Triton's kernels
NCCL_BYTES = 1024 * 2**20  # of a replica of several ranks: channels, and memory that ranks of a host share
GRAPH_BYTES = 512 * 2**20  # the driver's part of recorded steps
MAX_RECORDED_ROWS = 1024
MAX_SCORED_ROWS = 256


def activation_itemsize(config: ServeConfig, spec: ModelSpec) -> int:
    """Bytes of a value that is not fp8."""
    return ITEMSIZE[spec.dtype if config.dtype == "auto" else config.dtype]


def weight_form(config: ServeConfig, spec: ModelSpec) -> str:
    """ "plain", or "stored" or "online" fp8, as GPUs with fp8 products (compute capability 8.9 and later) have them."""
    if spec.quantization is None:
        return "online" if config.quantization else "plain"
    if spec.quantization.scales == "block" or spec.quantization.weights_only:
        return "plain"
    return "online" if config.load_format == "dummy" else "stored"


def weight_itemsize(config: ServeConfig, spec: ModelSpec, name: str) -> int:
    """Bytes per value of a tensor of the checkpoint, where it is served."""
    linear, form = name.removesuffix(".weight"), weight_form(config, spec)
    is_fp8 = linear.endswith("_proj") and form != "plain"
    if is_fp8 and form == "stored" and spec.quantization is not None:
        is_fp8 = spec.quantization.quantizes(linear)
    return 1 if is_fp8 else activation_itemsize(config, spec)


def table_bytes(config: ServeConfig, spec: ModelSpec, place: Place, max_model_len: int) -> int:
    """Slots' columns, inputs of steps, what recorded steps give, rotary angles, scales of fp8 weights."""
    num_slots, num_tokens = 2 * config.max_num_seqs, config.max_num_batched_tokens
    num_rows, num_blocks = min(num_tokens, num_slots), -(-max_model_len // config.block_size)
    slots = num_slots * (max_model_len + num_blocks + 2) * 4
    inputs = num_tokens * 3 * 8 + num_rows * (4 + num_blocks * 4 + 2 * 8) + num_rows * 4 + (num_rows + 1) * 4
    if not place.is_first_stage:
        inputs += num_tokens * spec.hidden_size * activation_itemsize(config, spec)
    angles = spec.max_position * spec.head_dim * 4
    return slots + inputs + _recorded_bytes(config, spec, place) + angles + _scale_bytes(config, spec, place)


def activation_bytes(config: ServeConfig, spec: ModelSpec, place: Place) -> int:
    """At the worst moment of a step of --max-num-batched-tokens tokens, in as many rows as may sample; and what
    recorded steps keep for themselves."""
    num_rows = min(config.max_num_seqs, config.max_num_batched_tokens)
    largest = _layer_bytes(config, spec, place, config.max_num_batched_tokens)
    largest += _logits_bytes(config, spec, place, num_rows)
    if config.enforce_eager or not spec.has_lm_head:
        return largest
    rows = min(config.max_num_seqs, MAX_RECORDED_ROWS)
    return largest + _layer_bytes(config, spec, place, rows) + _logits_bytes(config, spec, place, rows, scored=False)


def outside_bytes(config: ServeConfig) -> int:
    """Taken outside torch: the CUDA context, libraries, the driver's part of recorded steps. An assumption."""
    graphs = 0 if config.enforce_eager else GRAPH_BYTES
    return CONTEXT_BYTES + LIBRARY_BYTES + graphs + (NCCL_BYTES if config.num_ranks > 1 else 0)


def _layer_bytes(config: ServeConfig, spec: ModelSpec, place: Place, num_tokens: int) -> int:
    """The residual, what is added to it, and the MLP's or attention's own, of which the larger counts."""
    intermediate = local_size(spec, place, "intermediate")
    heads, kv_heads = local_size(spec, place, "heads"), local_size(spec, place, "kv_heads")
    widest = max(3 * intermediate, 2 * heads + 2 * kv_heads)
    values = (6 * spec.hidden_size + widest) * activation_itemsize(config, spec)
    if weight_form(config, spec) != "plain":
        values += spec.hidden_size + intermediate  # fp8 copies of what the linears take
    return num_tokens * (values + spec.head_dim * 4)


def _logits_bytes(config: ServeConfig, spec: ModelSpec, place: Place, num_rows: int, scored: bool = True) -> int:
    """float32, a copy of them in the activations' dtype, and with `scored` those that log-probabilities are of."""
    if not place.is_last_stage or not spec.has_lm_head:
        return 0
    num_bytes = num_rows * spec.vocab_size * (4 + 2 * activation_itemsize(config, spec))
    if scored:
        num_bytes += (num_rows + min(num_rows, MAX_SCORED_ROWS)) * spec.vocab_size * 4
    return num_bytes


def _recorded_bytes(config: ServeConfig, spec: ModelSpec, place: Place) -> int:
    """Where all recorded steps leave what they give."""
    if config.enforce_eager or not spec.has_lm_head:
        return 0
    row = spec.vocab_size * 4 if place.is_last_stage else spec.hidden_size * activation_itemsize(config, spec)
    return min(config.max_num_seqs, MAX_RECORDED_ROWS) * row


def _scale_bytes(config: ServeConfig, spec: ModelSpec, place: Place) -> int:
    """float32 per output channel of fp8 weights; and the rows that fill the vocabulary up."""
    itemsize = activation_itemsize(config, spec)
    has_vocab = place.is_first_stage + (place.is_last_stage and spec.has_lm_head)
    is_shared = place.is_first_stage and place.is_last_stage and spec.tie_word_embeddings
    missing = padded_vocab_size(spec, place.tp_size) // place.tp_size - local_size(spec, place, "vocab")
    num_bytes = missing * spec.hidden_size * itemsize * (1 if is_shared else has_vocab)
    for layer in stage_layers(spec.num_layers, place.pp_rank, place.pp_size):
        for name, rule in LAYER_RULES.items():
            if name.endswith("_proj.weight") and weight_itemsize(config, spec, f"model.layers.{layer}.{name}") == 1:
                num_bytes += 4 * local_size(spec, place, rule.dims[0])
    return num_bytes
