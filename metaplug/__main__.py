"""Run the `metaplug` command by `python -m metaplug`."""

from metaplug.cli.main import main

if __name__ == "__main__":
    main()
