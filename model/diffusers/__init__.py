"""Networks of diffusers: as supernets, and exported to its pipelines."""
