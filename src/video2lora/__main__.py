"""`python -m video2lora`: the command line."""

from video2lora.cli import main

if __name__ == "__main__":
    main()
