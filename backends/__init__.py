"""One file for each framework: how it holds arrays, differentiates and runs fast. No mathematics of a loss."""
