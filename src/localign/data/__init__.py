"""Image sources, transforms, and the stream of samples, which resumes at any step."""
