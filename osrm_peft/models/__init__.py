"""The base model: loaded by name, its layers, what identifies it."""
