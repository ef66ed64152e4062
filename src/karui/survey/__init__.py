"""The catalogue: 80 papers and the techniques that implement them."""
