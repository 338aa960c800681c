"""OSRM (Zhang & Zhou, ACL 2025): A chosen against the other tasks' features."""
