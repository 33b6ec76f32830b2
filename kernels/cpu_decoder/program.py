"""One thread's part of a step through the layers of a stage.

A step is a table of int64s (addresses, sizes, float64s by their bits) and a table of such per layer; all threads walk
through the same phases and meet at a barrier after each. A layer has three parts: PROJECT writes queries, keys and
values, ATTEND and MLP add to the residual stream. A call runs any range of parts, because with tensor parallelism the
ranks sum what ATTEND and MLP give, and because of the last layer's tokens only some may be needed after PROJECT.
"""

from typing import Any

from manta.kernels.cpu_decoder import attention, products, tokens
from manta.kernels.cpu_decoder.attention import ITEMS_PER_THREAD
from manta.kernels.cpu_decoder.threads import atomic_add, barrier, change_and_wake, sleep_until_changed
from manta.kernels.cpu_scalars import call, jit, kernel_address, load_float64, load_int64, store_int64

# The table of a step, 8 bytes a field
(
    BEGIN, END, ENTERS, LEAVES,  # parts to run; whether to read `X` first, whether to write `OUT` at the end
    NUM_TOKENS, X, OUT, RESIDUAL, PARTIAL, HAS_PARTIAL, NORMED, QKV, ATTENDED, GATED,
    NORMED_STRIDE, QKV_STRIDE, ATTENDED_STRIDE, GATED_STRIDE,
    ROPE_TABLE, POSITIONS, SLOT_MAPPING, QUERY_START, SEQ_LENS, BLOCK_TABLES, MAX_BLOCKS,
    ITEMS, NUM_ITEMS, NEXT_ITEM, PARTS, JOINS, NUM_JOINS,
    HIDDEN, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, INTERMEDIATE, BLOCK_SIZE, PAGE_TOKENS, PAGE_DIMS, PAGES_PER_CHUNK,
    EPS, SCALE, FINAL_NORM, IS_SPLIT,
    ROWS, HEAD, _HEAD_BIAS, VOCAB, LOGITS,
    SCRATCH, SCRATCH_BYTES, LAYERS,
    MULTIPLY, ATTEND, JOIN, ROPE_KV_WRITE, ENTER, LEAVE, TO_LEFT, ADD, NORM, NORM_AND_LEAVE,  # addresses of kernels
    STEP_FIELDS,
) = range(63)  # fmt: skip

# The table of a layer. A linear is two fields: packed weight and bias.
(
    INPUT_NORM, QKV_LINEAR, _QKV_BIAS, Q_NORM, K_NORM, O_LINEAR, _O_BIAS, MLP_NORM, GATE_UP_LINEAR, _GATE_UP_BIAS,
    DOWN_LINEAR, _DOWN_BIAS, WINDOW, KEYS, VALUES, LAYER_FIELDS,
) = range(16)  # fmt: skip

PROJECT, ATTEND_AND_SUM, MLP = range(3)  # the parts of a layer
LAYER_PARTS = 3

# The memory threads meet in, in int64s; fields of different writers a cache line apart. Two counters of units of
# products: what multiplies after a barrier must not reset what others may still count.
TEAM_GENERATION, TEAM_SLEEPERS, TEAM_BARRIER, TEAM_JOB, TEAM_KIND_OF_JOB = 0, 1, 16, 32, 33
TEAM_UNITS, TEAM_LAST_UNITS = 48, 64
TEAM_FIELDS = 80
LAYERS_JOB, LOGITS_JOB, STOP_JOB, CALL_JOB = 0, 1, 2, 3


def kernel_addresses(left: Any, kind: Any) -> dict[int, int]:
    """What the step's table must hold in its last fields, for a model whose dtype is `kind` and left-hand sides of
    products that are `left`. Compiles the kernels."""
    f32 = products.F32
    return {
        MULTIPLY: kernel_address(products.multiply, 13, 0, left, kind),
        ATTEND: kernel_address(attention.attend_item, 22, 1, left, kind),
        JOIN: kernel_address(attention.join_parts, 10, 0, left),
        ROPE_KV_WRITE: kernel_address(tokens.rope_kv_write, 18, 1, kind),
        ENTER: kernel_address(tokens.convert, 7, 0, kind, f32),
        LEAVE: kernel_address(tokens.convert, 7, 0, f32, kind),
        TO_LEFT: kernel_address(tokens.convert, 7, 0, kind, left),
        ADD: kernel_address(tokens.add, 5, 0),
        NORM: kernel_address(tokens.norm, 7, 1, left),
        NORM_AND_LEAVE: kernel_address(tokens.norm, 7, 1, kind),
    }


@jit()
def _share(count: Any, thread: Any, threads: Any) -> Any:
    return count * thread // threads, count * (thread + 1) // threads


@jit()
def _start_part(
    step: Any, kernel: Any, weight: Any, out: Any, out_stride: Any, thread: Any, threads: Any, team: Any, kind: Any
) -> None:  # fmt: skip
    """residual += the product that ranks have summed meanwhile, if any, then the norm. Nobody counts units here."""
    if thread == 0:
        store_int64(team, TEAM_UNITS, 0)
        store_int64(team, TEAM_LAST_UNITS, 0)
    size = load_int64(step, HIDDEN)
    begin, end = _share(load_int64(step, NUM_TOKENS), thread, threads)
    residual = load_int64(step, RESIDUAL)
    if load_int64(step, HAS_PARTIAL):
        call(load_int64(step, ADD), (begin, end, residual, load_int64(step, PARTIAL), size))
    call(kernel, (begin, end, residual, weight, size, out, out_stride, load_float64(step, EPS), kind))


@jit()
def _finish_part(
    step: Any, x: Any, x_stride: Any, num_in: Any, linear: Any, thread: Any, threads: Any, scratch: Any, team: Any,
    left: Any, kind: Any,
) -> None:  # fmt: skip
    """The product a part ends with: added to the residual, or left for the ranks to sum."""
    size = load_int64(step, HIDDEN)
    rows = load_int64(step, NUM_TOKENS)
    if load_int64(step, IS_SPLIT):
        out, mode = load_int64(step, PARTIAL), products.STORE
    else:
        out, mode = load_int64(step, RESIDUAL), products.ADD
    call(
        load_int64(step, MULTIPLY),
        (thread, threads, x, x_stride, rows, num_in, linear, size, out, size, mode, scratch,
         team + 8 * TEAM_LAST_UNITS, left, kind),
    )  # fmt: skip


@jit()
def _attend(step: Any, layer: Any, thread: Any, threads: Any, scratch: Any, team: Any, left: Any, kind: Any) -> None:
    """Attention of all items, handed out one by one because they differ in length."""
    num_kv_heads, dim = load_int64(step, NUM_KV_HEADS), load_int64(step, HEAD_DIM)
    group = load_int64(step, NUM_HEADS) // num_kv_heads
    out, out_stride = load_int64(step, ATTENDED), load_int64(step, ATTENDED_STRIDE)
    # The heads of a page lie side by side in memory: one thread takes them in turn where there is enough for all.
    heads = num_kv_heads if load_int64(step, NUM_ITEMS) >= ITEMS_PER_THREAD * threads else 1
    taken = index = 0
    while True:
        if taken == 0:
            index = atomic_add(step + 8 * NEXT_ITEM, heads)
            taken = heads
        if index >= load_int64(step, NUM_ITEMS) * num_kv_heads:
            break
        item = load_int64(step, ITEMS) + 8 * attention.ITEM_FIELDS * (index // num_kv_heads)
        head = index % num_kv_heads
        index += 1
        taken -= 1
        call(load_int64(step, ATTEND), (
            item, head, load_int64(step, QKV), load_int64(step, QKV_STRIDE), load_int64(layer, KEYS),
            load_int64(layer, VALUES), out, out_stride, load_int64(step, QUERY_START), load_int64(step, SEQ_LENS),
            load_int64(step, BLOCK_TABLES), load_int64(step, MAX_BLOCKS), num_kv_heads, group, dim,
            load_int64(step, BLOCK_SIZE), load_int64(step, PAGE_TOKENS), load_int64(step, PAGE_DIMS),
            load_int64(step, PAGES_PER_CHUNK), load_int64(layer, WINDOW), load_int64(step, PARTS), scratch,
            load_float64(step, SCALE), left, kind))  # fmt: skip
    num_joins = load_int64(step, NUM_JOINS)
    if num_joins:
        barrier(team + 8 * TEAM_BARRIER, threads)
        begin, end = _share(num_joins * num_kv_heads, thread, threads)
        for index in range(begin, end):
            join = load_int64(step, JOINS) + 8 * 3 * (index // num_kv_heads)
            call(load_int64(step, JOIN), (
                load_int64(join, 0), load_int64(join, 1), load_int64(join, 2), index % num_kv_heads, num_kv_heads,
                group, dim, load_int64(step, PARTS), out, out_stride, left))  # fmt: skip


@jit()
def _project_part(
    step: Any, layer: Any, thread: Any, threads: Any, scratch: Any, team: Any, left: Any, kind: Any
) -> None:
    """queries, keys and values = rope(qkv(norm(residual))); keys and values go to the cache"""
    meet = team + 8 * TEAM_BARRIER
    rows, dim = load_int64(step, NUM_TOKENS), load_int64(step, HEAD_DIM)
    num_heads, num_kv_heads = load_int64(step, NUM_HEADS), load_int64(step, NUM_KV_HEADS)
    normed, normed_stride = load_int64(step, NORMED), load_int64(step, NORMED_STRIDE)
    qkv, qkv_stride = load_int64(step, QKV), load_int64(step, QKV_STRIDE)
    _start_part(
        step, load_int64(step, NORM), load_int64(layer, INPUT_NORM), normed, normed_stride, thread, threads, team, left
    )
    barrier(meet, threads)
    call(load_int64(step, MULTIPLY), (
        thread, threads, normed, normed_stride, rows, load_int64(step, HIDDEN), layer + 8 * QKV_LINEAR,
        (num_heads + 2 * num_kv_heads) * dim, qkv, qkv_stride, products.STORE, scratch, team + 8 * TEAM_UNITS, left,
        kind))  # fmt: skip
    barrier(meet, threads)
    begin, end = _share(rows, thread, threads)
    call(load_int64(step, ROPE_KV_WRITE), (
        begin, end, rows, qkv, qkv_stride, load_int64(step, ROPE_TABLE), load_int64(step, POSITIONS),
        load_int64(step, SLOT_MAPPING), load_int64(layer, KEYS), load_int64(layer, VALUES), num_heads, num_kv_heads,
        dim, load_int64(step, BLOCK_SIZE), load_int64(step, PAGE_TOKENS), load_int64(step, PAGE_DIMS),
        load_int64(layer, Q_NORM), load_int64(layer, K_NORM), load_float64(step, EPS), kind))  # fmt: skip
    if thread == 0:
        store_int64(step, NEXT_ITEM, 0)
    barrier(meet, threads)


@jit()
def _attend_part(
    step: Any, layer: Any, thread: Any, threads: Any, scratch: Any, team: Any, left: Any, kind: Any
) -> None:
    """residual += o(attention(queries, cache))"""
    meet = team + 8 * TEAM_BARRIER
    num_in = load_int64(step, NUM_HEADS) * load_int64(step, HEAD_DIM)
    attended, stride = load_int64(step, ATTENDED), load_int64(step, ATTENDED_STRIDE)
    _attend(step, layer, thread, threads, scratch, team, left, kind)
    barrier(meet, threads)
    _finish_part(step, attended, stride, num_in, layer + 8 * O_LINEAR, thread, threads, scratch, team, left, kind)
    barrier(meet, threads)


@jit()
def _mlp_part(step: Any, layer: Any, thread: Any, threads: Any, scratch: Any, team: Any, left: Any, kind: Any) -> None:
    """residual += down(silu(gate) * up), gate and up of norm(residual)"""
    meet = team + 8 * TEAM_BARRIER
    rows, size = load_int64(step, NUM_TOKENS), load_int64(step, INTERMEDIATE)
    normed, normed_stride = load_int64(step, NORMED), load_int64(step, NORMED_STRIDE)
    gated, gated_stride = load_int64(step, GATED), load_int64(step, GATED_STRIDE)
    _start_part(
        step, load_int64(step, NORM), load_int64(layer, MLP_NORM), normed, normed_stride, thread, threads, team, left
    )
    barrier(meet, threads)
    call(load_int64(step, MULTIPLY), (
        thread, threads, normed, normed_stride, rows, load_int64(step, HIDDEN), layer + 8 * GATE_UP_LINEAR, size,
        gated, gated_stride, products.SILU_MUL, scratch, team + 8 * TEAM_UNITS, left, kind))  # fmt: skip
    barrier(meet, threads)
    _finish_part(step, gated, gated_stride, size, layer + 8 * DOWN_LINEAR, thread, threads, scratch, team, left, kind)
    barrier(meet, threads)


@jit()
def _run_layers(step: Any, thread: Any, threads: Any, team: Any, left: Any, kind: Any) -> None:
    scratch = load_int64(step, SCRATCH) + thread * load_int64(step, SCRATCH_BYTES)
    begin, end = _share(load_int64(step, NUM_TOKENS), thread, threads)
    size = load_int64(step, HIDDEN)
    if load_int64(step, ENTERS):
        call(
            load_int64(step, ENTER),
            (begin, end, load_int64(step, X), size, load_int64(step, RESIDUAL), size, size, kind, products.F32),
        )
    for part in range(load_int64(step, BEGIN), load_int64(step, END)):
        layer = load_int64(step, LAYERS) + 8 * LAYER_FIELDS * (part // LAYER_PARTS)
        if part % LAYER_PARTS == PROJECT:
            _project_part(step, layer, thread, threads, scratch, team, left, kind)
        elif part % LAYER_PARTS == ATTEND_AND_SUM:
            _attend_part(step, layer, thread, threads, scratch, team, left, kind)
        else:
            _mlp_part(step, layer, thread, threads, scratch, team, left, kind)
    if load_int64(step, LEAVES):
        weight, out = load_int64(step, FINAL_NORM), load_int64(step, OUT)
        if weight != 0:
            _start_part(step, load_int64(step, NORM_AND_LEAVE), weight, out, size, thread, threads, team, kind)
        else:
            if load_int64(step, HAS_PARTIAL):
                call(load_int64(step, ADD), (begin, end, load_int64(step, RESIDUAL), load_int64(step, PARTIAL), size))
            call(
                load_int64(step, LEAVE),
                (begin, end, load_int64(step, RESIDUAL), size, out, size, size, products.F32, kind),
            )
    barrier(team + 8 * TEAM_BARRIER, threads)


@jit()
def _run_logits(step: Any, thread: Any, threads: Any, team: Any, left: Any, kind: Any) -> None:
    """LOGITS float32 [ROWS, VOCAB] = X [ROWS, HIDDEN] @ the head's weight.T"""
    meet = team + 8 * TEAM_BARRIER
    rows, size = load_int64(step, ROWS), load_int64(step, HIDDEN)
    scratch = load_int64(step, SCRATCH) + thread * load_int64(step, SCRATCH_BYTES)
    normed, stride = load_int64(step, NORMED), load_int64(step, NORMED_STRIDE)
    begin, end = _share(rows, thread, threads)
    if thread == 0:
        store_int64(team, TEAM_UNITS, 0)
    call(load_int64(step, TO_LEFT), (begin, end, load_int64(step, X), size, normed, stride, size, kind, left))
    barrier(meet, threads)
    vocab = load_int64(step, VOCAB)
    call(load_int64(step, MULTIPLY), (
        thread, threads, normed, stride, rows, size, step + 8 * HEAD, vocab, load_int64(step, LOGITS), vocab,
        products.STORE, scratch, team + 8 * TEAM_UNITS, left, kind))  # fmt: skip
    barrier(meet, threads)


@jit()
def _work(thread: Any, threads: Any, team: Any, left: Any, kind: Any) -> None:
    step = load_int64(team, TEAM_JOB)
    if load_int64(team, TEAM_KIND_OF_JOB) == LAYERS_JOB:
        _run_layers(step, thread, threads, team, left, kind)
    elif load_int64(team, TEAM_KIND_OF_JOB) == LOGITS_JOB:
        _run_logits(step, thread, threads, team, left, kind)
    else:  # any kernel (table, thread, threads), whose address is the first field of its table
        call(load_int64(step, 0), (step, thread, threads))
        barrier(team + 8 * TEAM_BARRIER, threads)


@jit()
def lead(job: Any, step: Any, threads: Any, team: Any, left: Any, kind: Any) -> None:
    """Runs a job as thread 0 together with the threads in `follow`; returns when all are done."""
    store_int64(team, TEAM_JOB, step)
    store_int64(team, TEAM_KIND_OF_JOB, job)
    if threads > 1:
        change_and_wake(team)
    if job != STOP_JOB:
        _work(0, threads, team, left, kind)


@jit()
def follow(thread: Any, threads: Any, team: Any, seen: Any, left: Any, kind: Any) -> None:
    """What every other thread does until the job is to stop. seen: the generation before the first job."""
    while True:
        seen = sleep_until_changed(team, seen)
        if load_int64(team, TEAM_KIND_OF_JOB) == STOP_JOB:
            return
        _work(thread, threads, team, left, kind)
