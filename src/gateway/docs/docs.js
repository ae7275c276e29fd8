// Shows the OpenAPI document with Swagger UI. A key stays in the memory of the page, and goes to this server alone.
SwaggerUIBundle({
  dom_id: "#calls",
  url: "/openapi.json",
  presets: [SwaggerUIBundle.presets.apis],
  layout: "BaseLayout",
  persistAuthorization: false,
  queryConfigEnabled: false,
  validatorUrl: null,
  displayRequestDuration: true,
  defaultModelsExpandDepth: 0,
});
