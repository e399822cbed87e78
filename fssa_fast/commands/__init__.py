"""The commands of `fssa`, one module each."""
