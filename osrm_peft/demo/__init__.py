"""The demo: adapters, merges, scores and a report from one command."""
