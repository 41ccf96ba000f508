"""Which device does the matrix work, and how the matrices get there and back."""
