"""The first-party plugins, one file each. They use what `metaplug` offers to everyone, no more."""
