"""What the user has, whatever wrote it: folders, files and ranks opened as named tensors."""
