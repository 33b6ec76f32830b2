"""How long and how much a server bears from one client, before the client costs others something."""

SLOW_READER_S = 60.0  # an answer that waits so long for its reader is cut
SLOW_SENDER_S = 60.0  # a request whose head, or the next piece of whose body, does not come in this time is given up
MAX_HEAD_BYTES = 32 * 2**10  # request line and headers of HTTP; metadata of gRPC
MAX_BODY_BYTES = 32 * 2**20  # of HTTP; a message of gRPC
