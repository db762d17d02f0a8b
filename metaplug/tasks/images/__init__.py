"""Tasks from images: sources that read them, and the one conversion to pixels.

`folder` reads class folders and zips, found by `class_files`, and keeps what it decoded: `decoded`
is the file in the cache, and `fingerprint` tells whether it is still right; both go through the
folders by `walking`. `labelled` and `arrays` take what is in memory. `pixels` decodes and converts
an image for all of them, `class_images` holds a split's images in one tensor, and `augmentations`
turns, mirrors and shifts them in training.
"""
