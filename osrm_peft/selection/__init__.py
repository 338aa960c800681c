"""Which merge to ship: candidates merged, scored on held-out rows, and ranked."""
