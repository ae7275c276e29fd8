# Puts three entries on the list. Needs DNC_HTTP_URL and DNC_API_KEY; `dnc dev` prints both.
require "json"
require "net/http"

response = Net::HTTP.post(
  URI("#{ENV.fetch("DNC_HTTP_URL")}/v1/dnc/import"),
  JSON.generate(
    entries: [
      { email: "bounce1@example.com", type: "email", reason: "bounce" },
      { email: "bounce2@example.com", type: "email", reason: "bounce" },
      { email: "badcompany.com", type: "domain", reason: "manual" },
    ],
  ),
  "Content-Type" => "application/json",
  "X-Api-Key" => ENV.fetch("DNC_API_KEY"),
)
puts response.body
exit response.is_a?(Net::HTTPOK)
