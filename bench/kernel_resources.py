"""Writes what every Triton kernel takes of a GPU (registers, stack, shared memory) into docs/kernels.md. Needs no GPU.
Ends with 1 and says where, if any spills registers or wants more shared memory than there is.

.venv/bin/python bench/kernel_resources.py            # sm_80, sm_90 and sm_100
.venv/bin/python bench/kernel_resources.py --print    # to the terminal instead
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tests.support import aot  # noqa: E402

BEGIN, END = "<!-- written by bench/kernel_resources.py -->", "<!-- end -->"
HEAD = """
| family | launch | kernel | sm | warps | stages | registers | stack bytes | shared bytes | blocks per SM |
| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |
"""


def table() -> tuple[str, list[str]]:
    """One line per kernel, launch and device; what is wrong with any of them."""
    lines, problems = [], []
    for family in aot.families():
        for item in aot.resources_of(family):
            cells = [family, item.launch, f"`{item.kernel}`", item.capability, item.num_warps, item.num_stages,
                     item.registers, item.stack_bytes, item.shared_bytes, item.blocks_per_sm]  # fmt: skip
            lines.append("| " + " | ".join(map(str, cells)) + " |\n")
            problems += item.problems()
    return HEAD + "".join(lines), problems


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--print", action="store_true", help="print the table and leave docs/kernels.md as it is")
    only_print = parser.parse_args().print
    written, problems = table()
    for problem in problems:
        print(problem, file=sys.stderr)
    if only_print:
        print(written)
        return len(problems)
    path = ROOT / "docs" / "kernels.md"
    before, _, rest = path.read_text().partition(BEGIN)
    after = rest.partition(END)[2]
    path.write_text(f"{before}{BEGIN}\n{written}\n{END}{after}")
    return len(problems)


if __name__ == "__main__":
    sys.exit(min(1, main()))
