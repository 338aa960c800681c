"""The experiments of both papers as graphs of cached artefacts."""
