"""Bytes on disk: files complete or absent, and manifests. Knows no model."""
