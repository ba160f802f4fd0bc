"""``python -m lightning_vae fit --config ...``: the command line of an installed package."""

from .main import main

if __name__ == "__main__":
    main()
