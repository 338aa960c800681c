"""The command `osrm-peft`: a thin skin over the library's functions."""
