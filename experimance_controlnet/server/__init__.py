"""HTTP: from a validated body to a request for the engine, and from its pixels to an answer."""
