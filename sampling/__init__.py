"""How images are made: samplers, noise, conditioning."""
