"""Images: named sets, folders, batches, latents."""
