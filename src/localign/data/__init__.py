"""Sources of images, transforms, and the stream of samples that can be continued anywhere."""
