"""What a task shows the others: moments of its layer inputs; and its Fisher information."""
