"""Plays what goes wrong by seed in the simulated cluster (tests/support/simulation) and prints the seeds that fail.

python bench/fault_seeds.py [--first 0] [--count 1000]
python bench/fault_seeds.py --first 17 --count 1 --log    # one, with what happened and when
"""

import argparse
import asyncio
import logging
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.support.simulation.story import make_story, play

logger = logging.getLogger("fault_seeds")


class _VirtualTime(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        try:
            now_s = asyncio.get_running_loop().time()
        except RuntimeError:
            now_s = 0.0
        return f"{now_s:10.4f} s  {record.name.rpartition('.')[2]}: {record.getMessage()}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--log", action="store_true")
    args = parser.parse_args()
    if args.log:
        handler = logging.StreamHandler(sys.stdout)
        handler.setFormatter(_VirtualTime())
        logging.basicConfig(level=logging.INFO, handlers=[handler])
    else:
        logging.basicConfig(format="%(message)s")
        logging.getLogger("manta").setLevel(logging.CRITICAL)
    failed, began_s = [], time.perf_counter()
    for seed in range(args.first, args.first + args.count):
        story = make_story(seed)
        if args.log:
            print(f"{story.config.model_dump(include=_TOLD)}\n{story.sizes}\n{story.faults}")
        try:
            play(story, seed)
        except Exception:
            failed.append(seed)
            logger.exception("seed %d: %s", seed, story.faults)
    print(f"{args.count} seeds in {time.perf_counter() - began_s:.1f} s, {len(failed)} failed: {failed}")
    sys.exit(1 if failed else 0)


_TOLD = {"tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size", "scheduling_policy", "max_num_seqs"}

if __name__ == "__main__":
    main()
