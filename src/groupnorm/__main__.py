"""`python -m groupnorm`: the command line."""

from groupnorm.cli import main

if __name__ == "__main__":
    main()
