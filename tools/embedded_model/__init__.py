"""Recipe of the model family that ships inside the package: SDXL's architecture made tiny."""
