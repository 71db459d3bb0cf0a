"""The demonstration: the package's main job on real images, with a report of what came out."""
