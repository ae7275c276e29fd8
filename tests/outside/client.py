"""Imports, checks, scrubs, lists, exports and deletes with the client that grpcio generates. Needs DNC_GRPC_URL and DNC_API_KEY."""
import os

import grpc
from dnc.v1 import dnc_pb2 as dnc
from dnc.v1 import dnc_pb2_grpc

channel = grpc.insecure_channel(os.environ["DNC_GRPC_URL"].removeprefix("http://"))
service = dnc_pb2_grpc.DncServiceStub(channel)
key = {"metadata": [("x-api-key", os.environ["DNC_API_KEY"])], "timeout": 60}


def expect(found, expected):
    assert found == expected, f"expected {expected}, found {found}"


def messages():
    for number in range(3):
        entries = [dnc.Entry(email=f"python{number}{index}@example.com", reason="bounce") for index in range(5_000)]
        yield dnc.ImportEntriesRequest(entries=entries)
    yield dnc.ImportEntriesRequest(entries=[
        dnc.Entry(email="python.example.net", type=dnc.ENTRY_TYPE_DOMAIN),
        dnc.Entry(email="python00@example.com"),
        dnc.Entry(email="nonsense"),
    ])


answer = service.ImportEntries(messages(), **key)
expect((answer.imported, answer.skipped, answer.failed), (15_001, 1, 1))
expect([(error.index, error.code) for error in answer.errors], [(15_002, "INVALID_EMAIL")])

addresses = ["python00@example.com", "someone@mail.python.example.net", "free@example.org", "nonsense"]
results = service.CheckEntries(dnc.CheckEntriesRequest(emails=addresses), **key).results
expect([result.suppressed for result in results], [True, True, False, True])
expect([result.email for result in results], addresses)
expect(results[1].entry.email, "python.example.net")
expect(results[3].error.code, "INVALID_EMAIL")

scrubbed = service.ScrubEntries((dnc.ScrubEntriesRequest(emails=addresses[n:n + 2]) for n in (0, 2)), **key)
expect([[result.suppressed for result in message.results] for message in scrubbed], [[True, True], [False, True]])

found, token = [], ""
while True:
    search = dnc.EntryFilter(search="python0")
    page = service.ListEntries(dnc.ListEntriesRequest(filter=search, page_size=1_000, page_token=token), **key)
    found += [entry.email for entry in page.entries]
    token = page.next_page_token
    if not token:
        break
expect((len(found), len(set(found))), (5_000, 5_000))
exported = service.ExportEntries(dnc.ExportEntriesRequest(filter=dnc.EntryFilter(search="python")), **key)
expect(sum(len(message.entries) for message in exported), 15_001)

expect(service.DeleteEntries(dnc.DeleteEntriesRequest(emails=addresses[:1]), **key).deleted, 1)
everything = dnc.DeleteEntriesRequest(all=True, filter=dnc.EntryFilter(search="python"))
expect(service.DeleteEntries(everything, **key).deleted, 15_000)

try:
    service.ListEntries(dnc.ListEntriesRequest(), metadata=[("x-api-key", "sk_nonsense")])
except grpc.RpcError as error:
    expect(error.code(), grpc.StatusCode.UNAUTHENTICATED)
else:
    raise AssertionError("a wrong key was accepted")
print("the generated Python client: ok")
