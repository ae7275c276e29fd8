#!/bin/sh
# Puts three entries on the list. Needs DNC_HTTP_URL and DNC_API_KEY; `dnc dev` prints both.
curl --silent --show-error --fail-with-body -X POST "$DNC_HTTP_URL/v1/dnc/import" \
  -H "Content-Type: application/json" \
  -H "X-Api-Key: $DNC_API_KEY" \
  -d '{
    "entries": [
      {"email": "bounce1@example.com", "type": "email", "reason": "bounce"},
      {"email": "bounce2@example.com", "type": "email", "reason": "bounce"},
      {"email": "badcompany.com", "type": "domain", "reason": "manual"}
    ]
  }'
