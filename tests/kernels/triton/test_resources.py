"""Every Triton kernel, as it is launched, compiles for sm_80, sm_90 and sm_100: no spills, within shared memory."""

from dataclasses import replace

import pytest

from tests.support import aot

pytest.importorskip("triton", reason="triton is not installed")


THINNED = ("paged_attention",)  # by far the most launches; bench/kernel_resources.py compiles them all


@pytest.mark.timeout(900)  # over a hundred compilations
@pytest.mark.parametrize("family", aot.families())
def test_no_spills_and_shared_memory_within_limits(family: str) -> None:
    found = aot.resources_of(family, thinned=family in THINNED)
    assert found
    problems = [problem for resources in found for problem in resources.problems()]
    assert not problems, "\n".join(problems)


def test_products_of_few_and_of_many_rows_take_the_same_matrix_instructions() -> None:
    """So that rows have the same bits, whichever of the two forms is launched: see `matmul_triton`."""
    found = [item for item in aot.resources_of("matmul", thinned=False) if item.kernel == "_product_kernel"]
    for capability in aot.NUM_SMS:
        for kind in ("", "fp8 ") if capability >= 90 else ("",):
            names = {f"{kind}14336 -> 4096, {rows} rows" for rows in (8, 8192)}
            forms = [item for item in found if item.launch in names and item.capability == capability]
            assert len(forms) == 2
            assert forms[0].matrix_instructions == forms[1].matrix_instructions != "", forms


def test_what_is_a_problem() -> None:
    fine = aot.Resources("f", "l", "k", 80, 4, 3, 255, 0, 163 * 1024)
    assert not fine.problems()
    assert fine.blocks_per_sm == 1
    assert "8 bytes per thread" in replace(fine, stack_bytes=8).problems()[0]
    assert "166913 bytes" in replace(fine, shared_bytes=163 * 1024 + 1).problems()[0]
    assert not replace(fine, shared_bytes=163 * 1024 + 1, capability=90).problems()
