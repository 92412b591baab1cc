"""Results of evaluations: what one file holds, its rows per example and its images, and several of them together."""
