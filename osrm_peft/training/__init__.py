"""One adapter trained, and the recipe that names how."""
