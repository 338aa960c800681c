"""The study of how much of an adaptation merging keeps: what is run, how, and its tables."""
