"""Real parts to test against: images, a registry, users, and what this machine can do."""
