"""Examples, the position stream, augmentation."""
