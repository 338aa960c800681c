"""Features, by which a task shows itself to the others: moments of layer inputs, and Fisher information."""
