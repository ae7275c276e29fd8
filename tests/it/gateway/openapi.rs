//! The OpenAPI document agrees with the running service: its examples are sent, and all answers
//! are held against its schemas and headers.

use dnc::domain::{KeyOwner, Scope};
use reqwest::{Method, Response, header::HeaderMap};
use serde_json::{Map, Value, json};

use crate::harness::{TestServer, database, http_client};

/// The document that a server serves.
struct Document(Value);

impl Document {
    async fn of(server: &TestServer) -> Self {
        let response = http_client().get(format!("{}/openapi.json", server.http_url)).send().await.unwrap();
        assert_eq!(response.status(), 200);
        Self(response.json().await.unwrap())
    }

    /// Follows a reference.
    fn resolve<'a>(&'a self, value: &'a Value) -> &'a Value {
        match value.get("$ref") {
            Some(reference) => self.0.pointer(&reference.as_str().unwrap()[1..]).unwrap_or_else(|| panic!("{reference}")),
            None => value,
        }
    }

    /// A schema and all that it is made of by `allOf`.
    fn parts<'a>(&'a self, schema: &'a Value) -> Vec<&'a Value> {
        let schema = self.resolve(schema);
        let more = schema["allOf"].as_array().into_iter().flatten().flat_map(|part| self.parts(part));
        [schema].into_iter().chain(more).collect()
    }

    /// Why the value does not fit the schema, if it does not. An object may have only the fields
    /// that the schema names.
    fn mismatch(&self, schema: &Value, value: &Value) -> Option<String> {
        let parts = self.parts(schema);
        for (keyword, limit) in parts.iter().flat_map(|part| part.as_object().unwrap()) {
            let fits = match keyword.as_str() {
                "type" => match limit {
                    Value::Array(types) => types.iter().any(|name| is_of_type(value, name)),
                    name => is_of_type(value, name),
                },
                "const" => value == limit,
                "enum" => limit.as_array().unwrap().contains(value),
                "minimum" => value.as_i64() >= limit.as_i64(),
                "maximum" => value.as_i64() <= limit.as_i64(),
                "maxLength" => value.as_str().unwrap().chars().count() as u64 <= limit.as_u64().unwrap(),
                "minItems" => value.as_array().unwrap().len() as u64 >= limit.as_u64().unwrap(),
                "maxItems" => value.as_array().unwrap().len() as u64 <= limit.as_u64().unwrap(),
                "required" => limit.as_array().unwrap().iter().all(|name| value.get(name.as_str().unwrap()).is_some()),
                "oneOf" => limit.as_array().unwrap().iter().filter(|one| self.mismatch(one, value).is_none()).count() == 1,
                "not" => self.mismatch(limit, value).is_some(),
                "items" => {
                    let wrong = value.as_array().into_iter().flatten().find_map(|item| self.mismatch(limit, item));
                    if wrong.is_some() {
                        return wrong;
                    }
                    true
                }
                "allOf" | "properties" | "additionalProperties" | "description" | "format" | "pattern" | "default" | "examples" => {
                    true
                }
                _ => panic!("this test does not know {keyword}"),
            };
            if !fits {
                return Some(format!("{keyword} {limit}: {value}"));
            }
        }
        let known: Map<String, Value> =
            parts.iter().filter_map(|part| part["properties"].as_object()).flat_map(Clone::clone).collect();
        if known.is_empty() {
            return None;
        }
        value.as_object().into_iter().flatten().find_map(|(name, field)| match known.get(name) {
            Some(schema) => self.mismatch(schema, field),
            None => Some(format!("{name} is not documented: {value}")),
        })
    }

    fn assert_fits(&self, schema: &Value, value: &Value) {
        if let Some(mismatch) = self.mismatch(schema, value) {
            panic!("{value} does not fit: {mismatch}");
        }
    }

    /// Asserts that the documented headers are there, and holds the answer against its schema.
    /// Returns the body.
    async fn assert_answer(&self, call: &Value, response: Response) -> Value {
        let documented = self.resolve(&call["responses"][response.status().as_str()]);
        assert!(documented.is_object(), "{} is not documented", response.status());
        self.assert_headers(documented, response.headers());
        let Some(content) = documented.get("content") else { return Value::Null };
        let media_type = response.headers()["content-type"].to_str().unwrap().split(';').next().unwrap().to_owned();
        let schema = &content[&media_type]["schema"];
        assert!(schema.is_object(), "{media_type} is not documented");
        let text = response.text().await.unwrap();
        let body = if media_type == "application/json" { serde_json::from_str(&text).unwrap() } else { json!(text) };
        if call["operationId"] != "document" {
            self.assert_fits(schema, &body);
        }
        body
    }

    fn assert_headers(&self, documented: &Value, headers: &HeaderMap) {
        for (name, header) in documented["headers"].as_object().unwrap() {
            let header = self.resolve(header);
            let Some(value) = headers.get(name) else {
                assert!(header.get("required").is_none(), "{name} is missing");
                continue;
            };
            if let Some(fixed) = header["schema"].get("const") {
                assert_eq!(value.to_str().unwrap(), fixed, "{name}");
            }
        }
    }

    /// Method, path and description of each call, in the order of their tags.
    fn calls(&self) -> Vec<(Method, String, &Value)> {
        let mut found = Vec::new();
        for tag in self.0["tags"].as_array().unwrap() {
            for (path, calls) in self.0["paths"].as_object().unwrap() {
                for (method, call) in calls.as_object().unwrap() {
                    if call["tags"][0] == tag["name"] {
                        found.push((method.to_uppercase().parse().unwrap(), path.clone(), call));
                    }
                }
            }
        }
        found
    }

    /// Name and example of each parameter that goes into the URL.
    fn query(&self, call: &Value) -> Vec<(String, String)> {
        let parameters = call["parameters"].as_array().unwrap().iter().map(|parameter| self.resolve(parameter));
        let with_example =
            parameters.filter(|parameter| parameter["in"] == "query" && parameter["schema"].get("examples").is_some());
        with_example
            .map(|parameter| {
                let example = &parameter["schema"]["examples"][0];
                self.assert_fits(&parameter["schema"], example);
                let text = example.as_str().map_or_else(|| example.to_string(), str::to_owned);
                (parameter["name"].as_str().unwrap().to_owned(), text)
            })
            .collect()
    }
}

fn is_of_type(value: &Value, name: &Value) -> bool {
    match name.as_str().unwrap() {
        "object" => value.is_object(),
        "array" => value.is_array(),
        "string" => value.is_string(),
        "boolean" => value.is_boolean(),
        "integer" => value.is_i64() || value.is_u64(),
        "null" => value.is_null(),
        name => panic!("this test does not know the type {name}"),
    }
}

/// Whether an answer looks like its example: the same fields, and the same codes and messages.
fn is_alike(example: &Value, answer: &Value) -> bool {
    match (example, answer) {
        (Value::Object(example), Value::Object(answer)) => {
            example.len() == answer.len()
                && example.iter().all(|(name, field)| {
                    let must_be_equal = ["code", "message", "field", "index", "suppressed", "status"].contains(&name.as_str());
                    answer.get(name).is_some_and(|other| if must_be_equal { field == other } else { is_alike(field, other) })
                })
        }
        (Value::Array(example), Value::Array(answer)) => {
            example.len() == answer.len() && example.iter().zip(answer).all(|(example, answer)| is_alike(example, answer))
        }
        _ => std::mem::discriminant(example) == std::mem::discriminant(answer),
    }
}

/// The examples of a media type, by name.
fn examples(content: &Value) -> Vec<(String, Value)> {
    let examples = content["examples"].as_object().into_iter().flatten();
    examples.map(|(name, example)| (name.clone(), example["value"].clone())).collect()
}

#[tokio::test]
async fn every_example_of_a_request_is_answered_as_documented() {
    let server = TestServer::start().await;
    let document = Document::of(&server).await;
    let calls = document.calls();
    let count: usize = document.0["paths"].as_object().unwrap().values().map(|calls| calls.as_object().unwrap().len()).sum();
    assert_eq!(calls.len(), count, "each call has a known tag");
    let mut sent = 0;
    for (method, path, call) in calls {
        let url = format!("{}{path}", server.http_url);
        let answers = &call["responses"]["200"]["content"];
        let query = document.query(call);
        // A body without parameters, each parameter alone, then all of them together.
        let mut queries: Vec<Vec<(String, String)>> = call.get("requestBody").map(|_| Vec::new()).into_iter().collect();
        queries.extend(query.iter().map(|parameter| vec![parameter.clone()]));
        queries.push(query);
        for query in &queries {
            let request = http_client().request(method.clone(), &url).header("x-api-key", &server.key).query(query);
            let Some(bodies) = call.get("requestBody") else {
                let response = request.send().await.unwrap();
                assert_eq!(response.status(), 200, "{method} {path} {query:?}");
                let media_type = response.headers()["content-type"].to_str().unwrap().split(';').next().unwrap().to_owned();
                let answer = document.assert_answer(call, response).await;
                sent += 1;
                if Some(query) == queries.last() {
                    for (name, example) in examples(&answers[&media_type]) {
                        assert!(is_alike(&example, &answer), "{method} {path}, {name}: {answer}");
                    }
                }
                continue;
            };
            for (media_type, content) in bodies["content"].as_object().unwrap() {
                assert!(!examples(content).is_empty(), "{method} {path} has no example of {media_type}");
                for (name, example) in examples(content) {
                    document.assert_fits(&content["schema"], &example);
                    let body = example.as_str().map_or_else(|| example.to_string(), str::to_owned);
                    let request = request.try_clone().unwrap().header("content-type", media_type).body(body);
                    let response = request.send().await.unwrap();
                    assert_eq!(response.status(), 200, "{method} {path} {query:?} {media_type} {name}");
                    let of_answer = if answers.get(media_type).is_some() { media_type } else { "application/json" };
                    let answer = document.assert_answer(call, response).await;
                    sent += 1;
                    let found = examples(&answers[of_answer]).into_iter().find(|(other, _)| *other == name);
                    match found {
                        Some((_, example)) if example.is_string() => assert_eq!(example, answer, "{method} {path}"),
                        Some((_, example)) => assert!(is_alike(&example, &answer), "{method} {path}, {name}: {answer}"),
                        None => {}
                    }
                }
            }
        }
        // The examples of the answers fit their own schemas.
        for content in answers.as_object().unwrap().values() {
            for (_, example) in examples(content) {
                document.assert_fits(&content["schema"], &example);
            }
        }
    }
    assert!(sent > 30, "{sent}");
}

#[tokio::test]
async fn the_example_of_every_error_is_what_the_service_answers() {
    let server = TestServer::start_with(&["--requests-per-sec-max", "1000"], &database().await).await;
    let slow = TestServer::start_with(&["--requests-per-sec-max", "1"], &database().await).await;
    let document = Document::of(&server).await;
    let reader = server.store.issue_key(KeyOwner::Workspace(server.workspace), Scope::Read, "", None).await.unwrap().1;
    let import = || http_client().post(format!("{}/v1/dnc/import", server.http_url));
    let list = || http_client().get(format!("{}/v1/dnc", server.http_url));
    let entries = |email: &str| json!({"entries": [{"email": email}]});
    import()
        .header("x-api-key", &server.key)
        .header("idempotency-key", "once")
        .json(&entries("a@example.com"))
        .send()
        .await
        .unwrap();
    let slow_list = || http_client().get(format!("{}/v1/dnc", slow.http_url)).header("x-api-key", &slow.key);
    let mut expected: Vec<String> = Vec::new();
    for (status, name, request) in [
        ("400", "body", import().header("x-api-key", &server.key).json(&json!({"entries": [{"email": 5}]}))),
        ("400", "parameter", list().header("x-api-key", &server.key).query(&[("limit", "0")])),
        ("400", "workspace", list().header("x-api-key", &server.platform_key)),
        ("401", "missing", list()),
        ("401", "unknown", list().bearer_auth("sk_nonsense")),
        ("403", "scope", import().header("x-api-key", reader.reveal()).json(&entries("a@example.com"))),
        ("403", "workspace", list().header("x-api-key", &server.key).header("x-workspace-id", "ws_987654")),
        (
            "413",
            "bytes",
            import().header("x-api-key", &server.key).header("content-type", "application/json").body(" ".repeat((8 << 20) + 1)),
        ),
        ("415", "type", import().header("x-api-key", &server.key).header("content-type", "text/plain").body("a@example.com")),
        (
            "422",
            "used",
            import().header("x-api-key", &server.key).header("idempotency-key", "once").json(&entries("b@example.com")),
        ),
        ("429", "limit", slow_list()),
    ] {
        let mut response = request.try_clone().unwrap().send().await.unwrap();
        while status == "429" && response.status() == 200 {
            response = request.try_clone().unwrap().send().await.unwrap();
        }
        assert_eq!(response.status().as_str(), status, "{name}");
        let example = &document.0["components"]["responses"][status]["content"]["application/json"]["examples"][name]["value"];
        let path = if response.url().path() == "/v1/dnc" { ("/v1/dnc", "get") } else { ("/v1/dnc/import", "post") };
        let answer = document.assert_answer(&document.0["paths"][path.0][path.1], response).await;
        assert_eq!(&answer, example, "{status} {name}");
        expected.push(format!("{status} {name}"));
    }
    let responses = document.0["components"]["responses"].as_object().unwrap();
    let all = responses.iter().flat_map(|(status, response)| {
        examples(&response["content"]["application/json"]).into_iter().map(move |(name, _)| format!("{status} {name}"))
    });
    assert_eq!(all.collect::<Vec<_>>(), expected);
}

#[tokio::test]
async fn the_document_is_sent_again_only_when_it_has_changed() {
    let server = TestServer::start().await;
    let url = format!("{}/openapi.json", server.http_url);
    let first = http_client().get(&url).send().await.unwrap();
    assert_eq!(first.headers()["content-type"], "application/json");
    let tag = first.headers()["etag"].clone();
    assert_eq!(first.json::<Value>().await.unwrap()["openapi"], "3.1.0");
    let second = http_client().get(&url).header("if-none-match", &tag).send().await.unwrap();
    assert_eq!((second.status().as_u16(), &second.headers()["etag"]), (304, &tag));
    let other = http_client().get(&url).header("if-none-match", "\"other\"").send().await.unwrap();
    assert_eq!(other.status(), 200);
}
