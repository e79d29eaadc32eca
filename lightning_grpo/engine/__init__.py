"""The embedded CPU inference engine, behind SGLang's HTTP API."""
