"""A link to a worker with plain blocking sockets: an independent reading of what worker.proto says of links."""

import socket
import struct

from manta.protos import worker_pb2 as pb

DEADLINE_S = 60.0


class LinkStream:
    def __init__(self, port: int, socket_name: str, key: bytes) -> None:
        if socket_name:
            self._socket = socket.socket(socket.AF_UNIX)
            self._socket.connect("\0" + socket_name)
        else:
            self._socket = socket.create_connection(("127.0.0.1", port))
        self._socket.settimeout(DEADLINE_S)
        self.send_frame(key)
        self.is_taken = self.receive_frame() == key != b""  # the key comes back

    def send(self, plan: pb.StepPlan) -> None:
        self.send_frame(plan.SerializeToString())

    def send_frame(self, data: bytes) -> None:
        self._socket.sendall(struct.pack("<I", len(data)) + data)

    def receive(self) -> pb.StepResult:
        frame = self.receive_frame()
        assert frame, "the worker ended the link"
        return pb.StepResult.FromString(frame)

    def receive_frame(self) -> bytes:
        """b"" for an empty frame, and when the worker has ended the link."""
        try:
            header = self._receive(4)
            return self._receive(*struct.unpack("<I", header)) if header else b""
        except ConnectionResetError:
            return b""

    def step(self, plan: pb.StepPlan) -> pb.StepResult:
        self.send(plan)
        return self.receive()

    def close(self) -> None:
        """No plans follow; results may still come."""
        self._socket.shutdown(socket.SHUT_WR)

    def _receive(self, num_bytes: int) -> bytes:
        data = b""
        while len(data) < num_bytes:
            part = self._socket.recv(num_bytes - len(data))
            if not part:
                return b""
            data += part
        return data
