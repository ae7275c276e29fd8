// Puts three entries on the list. Needs DNC_HTTP_URL and DNC_API_KEY; `dnc dev` prints both.
package main

import (
	"bytes"
	"encoding/json"
	"io"
	"log"
	"net/http"
	"os"
)

type entry struct {
	Email  string `json:"email"`
	Type   string `json:"type"`
	Reason string `json:"reason"`
}

func main() {
	body, err := json.Marshal(map[string][]entry{"entries": {
		{"bounce1@example.com", "email", "bounce"},
		{"bounce2@example.com", "email", "bounce"},
		{"badcompany.com", "domain", "manual"},
	}})
	if err != nil {
		log.Fatal(err)
	}
	request, err := http.NewRequest("POST", os.Getenv("DNC_HTTP_URL")+"/v1/dnc/import", bytes.NewReader(body))
	if err != nil {
		log.Fatal(err)
	}
	request.Header.Set("Content-Type", "application/json")
	request.Header.Set("X-Api-Key", os.Getenv("DNC_API_KEY"))
	response, err := http.DefaultClient.Do(request)
	if err != nil {
		log.Fatal(err)
	}
	defer response.Body.Close()
	if _, err := io.Copy(os.Stdout, response.Body); err != nil {
		log.Fatal(err)
	}
	if response.StatusCode != http.StatusOK {
		log.Fatal(response.Status)
	}
}
