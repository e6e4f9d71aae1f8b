"""Pure tensor functions from a weight to codes and scales and back; nothing here knows of files or models."""
