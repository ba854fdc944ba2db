"""Small real servers that behave, and misbehave, as a test says."""
