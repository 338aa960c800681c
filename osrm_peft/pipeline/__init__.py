"""From data to the merge to ship, as one recipe: written, checked, and run step by step."""
