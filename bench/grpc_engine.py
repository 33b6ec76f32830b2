"""`traced_engine` that does not use the links of its workers: plans and results go over gRPC streams."""

import sys

import traced_engine

from manta.cluster.engine.workers import WorkerGroup


def main() -> int:
    WorkerGroup.note_links = lambda self, described: None  # type: ignore[method-assign]
    return traced_engine.main()


if __name__ == "__main__":
    sys.exit(main())
