"""How the weights that ship with the project were made: formula-driven images, training, and the probe."""
