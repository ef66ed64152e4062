"""`python -m karui` and the `karui` command."""

from karui.cli import main

if __name__ == "__main__":
    main()
