# Asks before every message whether its recipient may be written to, over one connection that is kept.
# Reads recipients from standard input, a line each.
#
# Needs DNC_GRPC_URL and DNC_API_KEY (the scope `check` is enough), and the client that the head of stream_file.py generates.
import os
import sys

import grpc
from dnc.v1 import dnc_pb2, dnc_pb2_grpc

# The channel connects again by itself. A ping tells a dead connection from a quiet one.
OPTIONS = [
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.enable_retries", 1),
    ("grpc.service_config", """{"methodConfig": [{
        "name": [{"service": "dnc.v1.DncService", "method": "CheckEntries"}],
        "retryPolicy": {"maxAttempts": 4, "initialBackoff": "0.1s", "maxBackoff": "1s", "backoffMultiplier": 3,
                        "retryableStatusCodes": ["UNAVAILABLE"]}}]}"""),
]


class Gate:
    def __init__(self, url, key):
        self.channel = grpc.insecure_channel(url.removeprefix("http://"), options=OPTIONS)
        self.service = dnc_pb2_grpc.DncServiceStub(self.channel)
        self.metadata = [("x-api-key", key)]

    def may_send(self, recipient):
        """True only if the service says so. Without an answer nothing is sent: that can be done later."""
        try:
            request = dnc_pb2.CheckEntriesRequest(emails=[recipient])
            [result] = self.service.CheckEntries(request, metadata=self.metadata, timeout=5).results
        except grpc.RpcError as error:
            print(f"not sent, to be tried again: {error.code().name}", file=sys.stderr)
            return False
        # Also what is no address counts as suppressed.
        return not result.suppressed


def main():
    gate = Gate(os.environ["DNC_GRPC_URL"], os.environ["DNC_API_KEY"])
    for line in sys.stdin:
        recipient = line.strip()
        print(f"{recipient}: {'sent' if gate.may_send(recipient) else 'held back'}", flush=True)


main()
