"""An HTTP server that speaks OpenAI's API in front of the services: a user of the client library, and nothing more."""
