"""All-reduce of small tensors through memory that GPUs of one host read of each other; NCCL for the rest.

NCCL's rings take several hops, which for the few hundred KiB of a decode step are most of the time. Forms: "one_shot",
every rank reads all others' values and sums them itself; "two_shot", every rank sums a part and writes it to all;
"multimem", as two_shot, with the sums made by the NVSwitch (NVIDIA, "multimem" instructions of PTX). Which of them work
is found out at start, on every rank, against what NCCL gives.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from manta.workers.collectives import Collectives

logger = logging.getLogger(__name__)

SMALL_BYTES = 256 * 2**10  # up to here one_shot
LARGE_BYTES = 1024 * 2**10  # up to here two_shot or multimem
GRAIN_BYTES = 16  # forms move so many at a time
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SMALL_FORMS, LARGE_FORMS = ("one_shot",), ("multimem", "two_shot")  # the first that works is taken
_TOLERANCE = {torch.bfloat16: 0.05, torch.float16: 0.01, torch.float32: 1e-5}  # of sums of values about 1
Form = Callable[[Tensor], None]  # sums a contiguous tensor over the ranks in place


class PeerMemory(Protocol):
    """Memory that other ranks reach. Every call may raise RuntimeError where there is no such thing."""

    def allocate(self, num_bytes: int) -> None:
        """Alone."""
        ...

    def connect(self) -> None:
        """All ranks together, when all have allocated."""
        ...

    def forms(self) -> Mapping[str, Form]:
        """By the names above, those that the hardware may have."""
        ...


@dataclass(frozen=True, slots=True)
class Choice:
    """The forms for tensors up to SMALL_BYTES and up to LARGE_BYTES."""

    small: tuple[str, Form]
    large: tuple[str, Form] | None


class SymmetricCollectives:
    """Small all-reduces by the forms chosen for their dtype, everything else by `otherwise`."""

    def __init__(self, choices: Mapping[torch.dtype, Choice], otherwise: Collectives) -> None:
        self._otherwise = otherwise
        self._choices = dict(choices)

    def all_reduce(self, x: Tensor) -> None:
        form = self._form_for(x)
        if form is None:
            self._otherwise.all_reduce(x)
        else:
            form(x)

    def all_gather_last_dim(self, x: Tensor) -> Tensor:
        return self._otherwise.all_gather_last_dim(x)

    def destroy(self) -> None:
        self._choices.clear()
        self._otherwise.destroy()

    def _form_for(self, x: Tensor) -> Form | None:
        choice, num_bytes = self._choices.get(x.dtype), x.nbytes
        if choice is None or not num_bytes or num_bytes % GRAIN_BYTES or not x.is_contiguous():
            return None
        if num_bytes <= SMALL_BYTES:
            return choice.small[1]
        return choice.large[1] if choice.large is not None and num_bytes <= LARGE_BYTES else None


def connect(
    memory: PeerMemory, otherwise: Collectives, *, rank: int, num_ranks: int, device: torch.device
) -> Collectives:
    """Collectives that use what works of the memory's forms, or `otherwise`; rank 0's log says which, and why.

    A call on all ranks alike. They agree after each step that may fail on one of them alone, before the next one that
    takes all.
    """
    agree = _Agreement(otherwise, num_ranks, device)
    forms: dict[str, Form] = {}
    reason = agree.on(lambda: memory.allocate(LARGE_BYTES)) or agree.on(memory.connect)
    reason = reason or agree.on(lambda: forms.update(memory.forms()))
    choices: dict[torch.dtype, Choice] = {}
    if reason is None:
        working, reason = _try_forms(forms, otherwise, agree, rank, device)
        choices = _choose(working)
    if rank == 0:
        _report(choices, num_ranks, reason)
    return SymmetricCollectives(choices, otherwise) if choices else otherwise


class _Agreement:
    """Whether something went well on every rank."""

    def __init__(self, collectives: Collectives, num_ranks: int, device: torch.device) -> None:
        self._collectives = collectives
        self._num_ranks = num_ranks
        self._device = device

    def on(self, step: Callable[[], object]) -> str | None:
        """Does the step; None if all ranks did. Otherwise what this rank knows of the reason: the exception's words, or
        a str that the step returned."""
        reason = None
        try:
            returned = step()
            reason = returned if isinstance(returned, str) else None
        except (RuntimeError, AttributeError, ImportError) as error:  # what a torch without it, or an old one, raises
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
        num_well = torch.tensor([reason is None], dtype=torch.int32, device=self._device)
        self._collectives.all_reduce(num_well)
        if int(num_well) == self._num_ranks:
            return None
        return reason or "it fails on another rank"


def _try_forms(
    forms: Mapping[str, Form], otherwise: Collectives, agree: _Agreement, rank: int, device: torch.device
) -> tuple[dict[torch.dtype, dict[str, Form]], str | None]:
    """What works, by dtype and name, and why something does not."""
    working: dict[torch.dtype, dict[str, Form]] = {}
    reason = None
    for dtype in DTYPES:
        for name in (*SMALL_FORMS, *LARGE_FORMS):
            has_form = agree.on(lambda name=name: None if name in forms else f"there is no {name}")  # type: ignore[misc]
            failure = has_form or _try_form(forms[name], dtype, otherwise, agree, rank, device)
            if failure is None:
                working.setdefault(dtype, {})[name] = forms[name]
            elif has_form is None:
                reason = f"{name} of {str(dtype).removeprefix('torch.')}: {failure}"
    return working, reason


def _try_form(
    form: Form, dtype: torch.dtype, otherwise: Collectives, agree: _Agreement, rank: int, device: torch.device
) -> str | None:
    """Compares with `otherwise` from the smallest to the largest size, twice each: buffers are used again."""
    for num_bytes in (GRAIN_BYTES, GRAIN_BYTES * 1001, SMALL_BYTES, LARGE_BYTES):
        generator = torch.Generator(device).manual_seed(1 + rank)
        for _ in range(2):
            values = torch.randn(num_bytes // dtype.itemsize, generator=generator, device=device).to(dtype)
            expected = values.clone()
            otherwise.all_reduce(expected)
            failure = agree.on(lambda values=values: form(values))  # type: ignore[misc]
            failure = failure or agree.on(
                lambda values=values, expected=expected: _difference(values, expected, otherwise)  # type: ignore[misc]
            )
            if failure is not None:
                return failure
    return None


def _difference(values: Tensor, expected: Tensor, otherwise: Collectives) -> str | None:
    """Why the sums cannot be used. All ranks must have the same bits: they sample the same tokens on their own."""
    everyone = otherwise.all_gather_last_dim(values).view(-1, values.shape[0]).view(torch.uint8)
    if not bool((everyone == everyone[0]).all()):
        return "ranks get different bits"
    error = (values.float() - expected.float()).abs().max() / expected.float().abs().max()
    return None if float(error) < _TOLERANCE[values.dtype] else "sums are not those of NCCL"


def _choose(working: Mapping[torch.dtype, Mapping[str, Form]]) -> dict[torch.dtype, Choice]:
    choices = {}
    for dtype, forms in working.items():
        large = next(((name, forms[name]) for name in LARGE_FORMS if name in forms), None)
        small = next(((name, forms[name]) for name in SMALL_FORMS if name in forms), large)
        assert small is not None
        choices[dtype] = Choice(small, large)
    return choices


def _report(choices: Mapping[torch.dtype, Choice], num_ranks: int, reason: str | None) -> None:
    parts = []
    for dtype, choice in choices.items():
        large = f"{choice.large[0]} up to {LARGE_BYTES // 2**10} KiB" if choice.large is not None else "NCCL"
        name = str(dtype).removeprefix("torch.")
        parts.append(f"{name} by {choice.small[0]} up to {SMALL_BYTES // 2**10} KiB and then by {large}")
    text = f"symmetric memory ({', '.join(parts)})" if parts else "NCCL alone"
    why = f"; {reason}" if reason is not None else ""
    logger.info("%d tensor-parallel ranks sum through %s%s", num_ranks, text, why)
