"""`python -m metaplug` is the `metaplug` command."""

from metaplug.cli.main import main

if __name__ == "__main__":
    main()
