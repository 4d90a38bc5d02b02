"""What the 3D rooms share: cameras, capture loaders, rigs."""
