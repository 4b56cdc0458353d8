"""The laboratory: trains, samples, scores and compares methods, and knows none of them by name."""
