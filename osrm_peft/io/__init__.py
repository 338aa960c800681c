"""Bytes on disk: complete or absent, and what says how they were made. Knows no model."""
