"""What a benchmark cannot be run for."""


class BenchError(Exception):
    """Flags, files or a server that cannot be used; the message is one sentence that says what would work."""
