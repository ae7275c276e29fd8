// Puts three entries on the list. Needs DNC_HTTP_URL and DNC_API_KEY; `dnc dev` prints both.
const response = await fetch(`${process.env.DNC_HTTP_URL}/v1/dnc/import`, {
  method: "POST",
  headers: { "Content-Type": "application/json", "X-Api-Key": process.env.DNC_API_KEY },
  body: JSON.stringify({
    entries: [
      { email: "bounce1@example.com", type: "email", reason: "bounce" },
      { email: "bounce2@example.com", type: "email", reason: "bounce" },
      { email: "badcompany.com", type: "domain", reason: "manual" },
    ],
  }),
});
console.log(JSON.stringify(await response.json()));
process.exitCode = response.ok ? 0 : 1;
