# Puts three entries on the list. Needs DNC_HTTP_URL and DNC_API_KEY; `dnc dev` prints both.
import json
import os
import sys
import urllib.error
import urllib.request

request = urllib.request.Request(
    os.environ["DNC_HTTP_URL"] + "/v1/dnc/import",
    headers={"Content-Type": "application/json", "X-Api-Key": os.environ["DNC_API_KEY"]},
    data=json.dumps({
        "entries": [
            {"email": "bounce1@example.com", "type": "email", "reason": "bounce"},
            {"email": "bounce2@example.com", "type": "email", "reason": "bounce"},
            {"email": "badcompany.com", "type": "domain", "reason": "manual"},
        ],
    }).encode(),
)
try:
    with urllib.request.urlopen(request) as response:
        print(json.dumps(json.load(response)))
except urllib.error.HTTPError as error:
    sys.exit(error.read().decode())
