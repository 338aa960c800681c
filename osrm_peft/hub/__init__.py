"""The Hub: download by a name, names without local folders, model cards, pushes."""
