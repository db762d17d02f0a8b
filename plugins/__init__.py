"""The first-party plugins, one file each. They use only what `metaplug` offers to everyone, and never each other."""
