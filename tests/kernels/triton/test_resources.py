"""Every Triton kernel, as it is launched, compiles for sm_80, sm_90 and sm_100: no spills, within shared memory."""

import pytest

from tests.support import aot

pytest.importorskip("triton", reason="triton is not installed")


@pytest.mark.parametrize("family", aot.families())
def test_no_spills_and_shared_memory_within_limits(family: str) -> None:
    found = aot.resources_of(family)
    assert found
    problems = [problem for resources in found for problem in resources.problems()]
    assert not problems, "\n".join(problems)
