"""The kernels in Triton. Importing this package needs triton; see the parent for the meaning."""
