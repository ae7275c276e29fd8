# Streams a file with an address a line into the list, in constant memory: python3 stream_file.py FILE
#
# Needs DNC_GRPC_URL and DNC_API_KEY, which `dnc dev` prints, and the generated client:
#   pip install grpcio grpcio-tools
#   python3 -m grpc_tools.protoc -I proto --python_out=. --grpc_python_out=. proto/dnc/v1/dnc.proto
import itertools
import os
import sys

import grpc
from dnc.v1 import dnc_pb2, dnc_pb2_grpc

MESSAGE_ENTRIES = 1_000


def messages(lines):
    """One message for a thousand lines. gRPC asks for the next one when the last has left."""
    addresses = (line.strip() for line in lines)
    entries = (dnc_pb2.Entry(email=address, reason="unsubscribe_link") for address in addresses if address)
    while chunk := list(itertools.islice(entries, MESSAGE_ENTRIES)):
        yield dnc_pb2.ImportEntriesRequest(entries=chunk)


def main(path):
    target = os.environ["DNC_GRPC_URL"].removeprefix("http://")
    with grpc.insecure_channel(target) as channel, open(path, encoding="utf-8") as lines:
        service = dnc_pb2_grpc.DncServiceStub(channel)
        # An import that breaks may be sent again as a whole: what is stored is skipped.
        answer = service.ImportEntries(messages(lines), metadata=[("x-api-key", os.environ["DNC_API_KEY"])])
    print(f"imported {answer.imported}, skipped {answer.skipped}, failed {answer.failed}")
    for error in answer.errors[:10]:
        print(f"entry {error.index}: {error.code}: {error.message}", file=sys.stderr)


main(sys.argv[1])
