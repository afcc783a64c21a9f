"""The comparisons, costs and figures of this project: see README.md."""
