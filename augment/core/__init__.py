"""What knows nothing of images: errors, random generators, files, locks, records."""
