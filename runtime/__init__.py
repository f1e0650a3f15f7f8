"""What every part stands on: files, processes, errors. Knows nothing of images or networks."""
