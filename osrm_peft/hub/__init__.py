"""What others see: where a name leads, names without local folders, cards, pushes."""
